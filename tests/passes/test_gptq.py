"""GPTQ and its grids against float64 references that are written another way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infercomp.codegen.ops import group_weight_linear, int8_weight_linear
from infercomp.passes import gptq
from infercomp.passes.gptq import gptq_codes
from infercomp.passes.linear_recipes import W4A16, W8A16, LinearRecipe
from infercomp.passes.rounding import GPTQ
from infercomp.passes.weight_grids import WeightGrid, fitted_grid, nearest_codes
from infercomp.runtime.errors import NumericalError

RECIPES = (W8A16(), W4A16(32, True), W4A16(32, False), W4A16(64, True))
WHOLE_RANGE = torch.ones(1)


def weight_and_inputs(seed: int, num_rows: int = 5, num_channels: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [N, K] in float64 and inputs [tokens, K] whose channels depend on each other and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(num_channels, num_channels, generator=generator, dtype=torch.float64)
    inputs = torch.randn(96, num_channels, generator=generator, dtype=torch.float64) @ (mixing / 4 + torch.eye(64))
    return torch.randn(num_rows, num_channels, generator=generator, dtype=torch.float64), inputs


def values_of(codes: torch.Tensor, grid: WeightGrid) -> torch.Tensor:
    scale, zero = grid.of_channels(torch.arange(codes.shape[1]))
    return scale.double() * (codes.double() - zero.double())


def channel_by_channel(weight: torch.Tensor, hessian: torch.Tensor, grid: WeightGrid, method: GPTQ) -> torch.Tensor:
    """What GPTQ does, with an inverse of its own for the channels that are left before each."""
    rest = weight.clone()
    codes = torch.zeros_like(weight)
    hessian = hessian + method.damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    order = sorted(range(len(hessian)), key=lambda k: -float(hessian[k, k]) if method.act_order else k)
    for place, channel in enumerate(order):
        left = torch.tensor(order[place:])
        inverse = torch.linalg.inv(hessian[left][:, left])
        scale, zero = (each[:, 0] for each in grid.of_channels(left[:1]))
        codes[:, channel] = nearest_codes(rest[:, channel], scale, zero, grid.recipe)
        error = rest[:, channel] - scale.double() * (codes[:, channel] - zero)
        rest[:, left] -= error[:, None] * (inverse[0] / inverse[0, 0])
    return codes


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from(RECIPES), st.booleans(), st.sampled_from((7, 32, 128)))
def test_codes_are_those_of_the_definition(seed: int, recipe: LinearRecipe, act_order: bool, block_size: int) -> None:
    assert_codes_are_right(seed, recipe, GPTQ(act_order=act_order, block_size=block_size))


def assert_codes_are_right(seed: int, recipe: LinearRecipe, method: GPTQ) -> None:
    weight, inputs = weight_and_inputs(seed)
    hessian = inputs.t() @ inputs
    grid = fitted_grid(weight, recipe, hessian, WHOLE_RANGE)
    found = gptq_codes(weight, hessian, grid, method)
    expected = channel_by_channel(weight, hessian, grid, method)
    assert torch.equal(found.double(), expected)


FACTOR = gptq.factor_of_inverse
BUGS: dict[str, Callable[[torch.Tensor, float, str], torch.Tensor]] = {
    "damping forgotten": lambda hessian, damp, name: FACTOR(hessian, 1e-12, name),
    "the other factor": lambda hessian, damp, name: FACTOR(hessian, damp, name).t().flip(0, 1),
    "errors kept to themselves": lambda hessian, damp, name: torch.eye(len(hessian), dtype=hessian.dtype),
}


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_planted_bug_is_caught(
    bug: Callable[[torch.Tensor, float, str], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq, "factor_of_inverse", bug)
    with pytest.raises(AssertionError):
        assert_codes_are_right(1, W8A16(), GPTQ(damp=0.1))


def test_inputs_that_do_not_depend_on_each_other_leave_the_nearest_codes() -> None:
    weight, _ = weight_and_inputs(2)
    grid = fitted_grid(weight, W4A16(32, True), torch.eye(64), WHOLE_RANGE)
    scale, zero = grid.of_channels(torch.arange(64))
    codes = gptq_codes(weight, torch.eye(64, dtype=torch.float64), grid, GPTQ())
    assert torch.equal(codes.double(), nearest_codes(weight, scale, zero, grid.recipe))


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_outputs_err_less_than_with_the_nearest_codes(recipe: LinearRecipe) -> None:
    for seed in range(8):
        weight, inputs = weight_and_inputs(seed, num_rows=32)
        hessian = inputs.t() @ inputs
        errors = []
        for shares in (WHOLE_RANGE, torch.linspace(1, 0.5, 32)):
            grid = fitted_grid(weight, recipe, hessian, shares)
            scale, zero = grid.of_channels(torch.arange(64))
            for codes in (nearest_codes(weight, scale, zero, recipe), gptq_codes(weight, hessian, grid, GPTQ())):
                errors.append(float((inputs @ (values_of(codes, grid) - weight).t()).square().sum()))
        assert errors[1] < 0.7 * errors[0] and errors[3] < 0.7 * errors[2]


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from(RECIPES))
def test_a_search_never_errs_more_by_its_own_measure(seed: int, recipe: LinearRecipe) -> None:
    weight, inputs = weight_and_inputs(seed, num_rows=24)
    hessian = inputs.t() @ inputs
    group_size = recipe.group_size or 64

    def error(shares: torch.Tensor) -> torch.Tensor:
        grid = fitted_grid(weight, recipe, hessian, shares)
        codes = nearest_codes(weight.float(), *grid.of_channels(torch.arange(64)), recipe)
        difference = (values_of(codes, grid) - weight).split(group_size, 1)
        outputs = [part @ each.t() for part, each in zip(inputs.split(group_size, 1), difference, strict=True)]
        return torch.stack([each.square().sum(0) for each in outputs])

    whole, searched = error(WHOLE_RANGE), error(torch.linspace(1, 0.5, 64))
    assert (searched <= whole * (1 + 1e-5)).all()
    # 8 bits leave little to gain.
    assert searched.sum() < (0.97 if recipe.weight_bits == 4 else 1) * whole.sum()


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from(RECIPES), st.sampled_from((0.0, 1e-33, 1.0, 3e4)))
def test_stored_integers_stand_for_the_points_of_the_grid(seed: int, recipe: LinearRecipe, size: float) -> None:
    """What the program computes with is what the codes were chosen as, for weights of any size."""
    weight = weight_and_inputs(seed)[0].float() * size
    grid = fitted_grid(weight, recipe, torch.eye(64), WHOLE_RANGE)
    codes = nearest_codes(weight, *grid.of_channels(torch.arange(64)), recipe)
    stored = grid.stored(codes)
    eye = torch.eye(64, dtype=torch.float64)
    if recipe.weight_bits == 8:
        found = int8_weight_linear.definition(eye, *stored, None)
    else:
        stored = (*stored, None) if recipe.symmetric else stored
        found = group_weight_linear.definition(eye, *stored, None, recipe.weight_bits, recipe.group_size)
    assert torch.equal(found.t(), values_of(codes, grid))
    step = grid.of_channels(torch.arange(64))[0].abs()
    assert ((found.t() - weight).abs() <= step * 1.01).all() or size == 3e4


def test_channels_that_are_always_zero_are_no_obstacle() -> None:
    weight, inputs = weight_and_inputs(4)
    inputs[:, 7] = 0
    hessian = inputs.t() @ inputs
    grid = fitted_grid(weight, W8A16(), hessian, WHOLE_RANGE)
    error = values_of(gptq_codes(weight, hessian, grid, GPTQ()), grid) - weight
    assert float((inputs @ error.t()).abs().max()) < 0.5


def test_a_hessian_without_an_inverse_is_a_named_error() -> None:
    weight, inputs = weight_and_inputs(5)
    grid = fitted_grid(weight, W8A16(), torch.eye(64), WHOLE_RANGE)
    hessian = -(inputs.t() @ inputs)
    with pytest.raises(NumericalError, match="no Cholesky factor") as caught:
        gptq_codes(weight, hessian, grid, GPTQ())
    assert caught.value.field == "damp"
