"""recognize_norm: every spelling of RMSNorm and LayerNorm, and nothing that only looks like one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from graph_testing import (
    FileCheck,
    assert_graph_agrees,
    assert_rounds_like_eager,
    captured,
    count,
    run_passes,
    text,
)
from torch import nn

from infercomp.codegen.ops import layer_norm, rms_norm

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
PASSES = ("normalize", "recognize_norm")
EPS = 1e-5


class Norm(nn.Module):
    """A norm over 8 channels, spelled by a function of the input and the weight."""

    def __init__(self, forward: Forward, size: int = 8, weight_size: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(weight_size or size, generator=torch.Generator().manual_seed(0)))
        self.spelling = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.spelling(x, self.weight)


def _llama(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * h.to(x.dtype)


def _gemma(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return (h * (1.0 + weight.float())).type_as(x)


def _powers(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * (EPS + (x * x).mean(-1, keepdim=True)) ** -0.5 * weight


def _gemma_by_power(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.pow(x.square().mean(-1, keepdim=True) + EPS, -0.5) * (weight + 1)


def _division(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


def _bare(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).type_as(x)


def _torch_function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (8,), weight, EPS)


SPELLINGS = {
    "llama": (_llama, "(%x, %p_weight, 1e-05)"),
    "gemma": (_gemma, "(%x, %p_weight, 1e-05, True)"),
    "powers": (_powers, "(%x, %p_weight, 1e-05)"),
    "gemma by power": (_gemma_by_power, "(%x, %p_weight, 1e-05, True)"),
    "division": (_division, "(%x, %p_weight, 1e-05)"),
    "no weight": (_bare, "(%x, None, 1e-05)"),
    "torch's own": (_torch_function, "(%x, %p_weight, 1e-05)"),
}


@pytest.mark.parametrize(("spelling", "arguments"), SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fires(spelling: Forward, arguments: str, dtype: torch.dtype) -> None:
    norm, x = Norm(spelling).to(dtype), torch.randn(1, 5, 8, dtype=dtype)
    model_graph = captured(norm, x, dynamic={0: 1})
    records = run_passes(model_graph, *PASSES, inputs=[x])
    assert records[1].matches == 1
    assert records[1].max_error < 1e-9
    assert not records[1].near_misses
    expected = f"rms_norm.default](args = {arguments}"
    FileCheck().check(expected).check_not("rsqrt").check_not("mean").run(text(model_graph))
    assert_graph_agrees(model_graph, norm, [x], 1e-6)


@pytest.mark.parametrize("spelling", [_powers, _gemma_by_power, _division, _torch_function])
def test_numbers_in_float64(spelling: Forward) -> None:
    """Spellings without a cast inside can be held to the bound of an exact pass directly."""
    norm, x = Norm(spelling).double(), 100 * torch.randn(2, 3, 8, dtype=torch.float64)
    model_graph = captured(norm, x)
    run_passes(model_graph, *PASSES, inputs=[x])
    assert count(model_graph, rms_norm) == 1
    assert_graph_agrees(model_graph, norm, [x])
    assert_graph_agrees(model_graph, norm, [torch.zeros_like(x)])


@pytest.mark.parametrize("spelling", [each for each, _ in SPELLINGS.values()], ids=SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounds_like_eager(spelling: Forward, dtype: torch.dtype) -> None:
    assert_rounds_like_eager(Norm(spelling), [torch.randn(4, 16, 8, dtype=torch.float64)], dtype, *PASSES)


class _KeepsFloat32(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.to(torch.promote_types(x.dtype, torch.float32))
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)


def test_result_that_is_used_in_float32_is_not_rounded_to_bfloat16() -> None:
    assert_rounds_like_eager(_KeepsFloat32(), [torch.randn(4, 16, 8, dtype=torch.float64)], torch.bfloat16, *PASSES)


def _other_axis(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS))


def _cube(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * (x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + EPS))


def _two_inputs(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * (x * torch.rsqrt(x.exp().pow(2).mean(-1, keepdim=True) + EPS))


def _eps_is_a_tensor(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + weight))


def _eps_is_scaled(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * (x * torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), EPS, alpha=2)))


NEAR_MISSES = {
    "other axis": (_other_axis, "expected -1, found 1"),
    "cube": (_cube, "expected 2, found 3"),
    "variance of something else": (_two_inputs, "x is x in one place and exp.default (exp) in another"),
    "eps is a tensor": (_eps_is_a_tensor, "eps is a tensor"),
    "eps is scaled": (_eps_is_scaled, "other operands than add"),
}


@pytest.mark.parametrize(("spelling", "reason"), NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_miss_is_left_and_recorded(spelling: Forward, reason: str) -> None:
    norm, x = Norm(spelling), torch.rand(1, 8, 8)
    model_graph = captured(norm, x)
    before = count(model_graph, torch.ops.aten.rsqrt.default)
    records = run_passes(model_graph, *PASSES, inputs=[x])
    assert records[1].matches == 0
    assert any(reason in miss.reason for miss in records[1].near_misses), records[1].near_misses
    assert count(model_graph, torch.ops.aten.rsqrt.default) == before
    assert records[1].near_misses[0].where is not None
    assert "test_recognize_norm.py" in records[1].near_misses[0].where
    assert_graph_agrees(model_graph, norm, [x], 1e-6)


def _two_plus_weight(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (2.0 + weight) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


def test_two_plus_weight_is_no_unit_offset() -> None:
    """It is a norm with a computed scale: the offset must neither be dropped nor taken for 1."""
    norm, x = Norm(_two_plus_weight).double(), torch.randn(1, 5, 8, dtype=torch.float64)
    model_graph = captured(norm, x)
    run_passes(model_graph, *PASSES, inputs=[x])
    FileCheck().check("aten.add.Tensor](args = (%p_weight, 2.0)").check("(%x, %add, 1e-05)").run(text(model_graph))
    assert_graph_agrees(model_graph, norm, [x])


@pytest.mark.parametrize("size", [1, 4], ids=["one number", "a column"])
def test_scale_of_another_shape_stays_a_product(size: int) -> None:
    def spelling(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        scale = weight if size == 1 else weight[:, None]
        return scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))

    norm, x = Norm(spelling, weight_size=size).double(), torch.randn(1, 4, 8, dtype=torch.float64)
    model_graph = captured(norm, x)
    records = run_passes(model_graph, *PASSES, inputs=[x])
    FileCheck().check("(%x, None, 1e-05)").check("aten.mul.Tensor").run(text(model_graph))
    assert any("the scale" in miss.reason for miss in records[1].near_misses)
    assert_graph_agrees(model_graph, norm, [x])


def test_second_use_of_the_variance_keeps_it() -> None:
    def spelling(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return weight * (x * torch.rsqrt(variance + EPS)) + variance

    norm, x = Norm(spelling).double(), torch.randn(1, 5, 8, dtype=torch.float64)
    model_graph = captured(norm, x)
    run_passes(model_graph, *PASSES, inputs=[x])
    FileCheck().check("mean.dim").check("rms_norm").check_not("rsqrt").run(text(model_graph))
    assert_graph_agrees(model_graph, norm, [x])


def test_norm_that_is_used_with_and_without_weight_becomes_two() -> None:
    def spelling(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
        return weight * h - h.exp()

    norm, x = Norm(spelling).double(), torch.randn(1, 5, 8, dtype=torch.float64)
    model_graph = captured(norm, x)
    run_passes(model_graph, *PASSES, inputs=[x])
    assert count(model_graph, rms_norm) == 2
    assert_graph_agrees(model_graph, norm, [x])


def test_layer_norm() -> None:
    norm, x = nn.LayerNorm(8, eps=1e-3).double(), torch.randn(2, 5, 8, dtype=torch.float64)
    model_graph = captured(norm, x)
    run_passes(model_graph, *PASSES, inputs=[x])
    FileCheck().check("infercomp.layer_norm.default](args = (%input, %p_weight, %p_bias, 0.001)").run(text(model_graph))
    assert_graph_agrees(model_graph, norm, [x])


@pytest.mark.parametrize(
    "function", [lambda x: F.layer_norm(x, (8,)), lambda x: F.layer_norm(x, (8,), torch.ones(8), None, 1e-6)]
)
def test_layer_norm_without_bias_or_weight(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.randn(2, 5, 8)
    model_graph = captured(function, x)
    run_passes(model_graph, *PASSES, inputs=[x])
    assert count(model_graph, layer_norm) == 1
    assert_graph_agrees(model_graph, function, [x])


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: F.layer_norm(x, (5, 8)), "normalises 2 dimensions"),
        (lambda x: F.rms_norm(x, (5, 8), None, EPS), "normalises 2 dimensions"),
        (lambda x: F.rms_norm(x, (8,)), "eps is left to torch"),
    ],
)
def test_other_norms_of_torch_are_left(function: Callable[[torch.Tensor], torch.Tensor], reason: str) -> None:
    x = torch.randn(2, 5, 8)
    model_graph = captured(function, x)
    records = run_passes(model_graph, *PASSES, inputs=[x])
    assert reason in records[1].near_misses[0].reason
    assert count(model_graph, rms_norm) + count(model_graph, layer_norm) == 0
