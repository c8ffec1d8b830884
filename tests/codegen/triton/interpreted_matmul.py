"""Run by ``test_interpreted.py`` in a process where Triton interprets kernels instead of compiling them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from codegen.triton import kernel_cases
from codegen.triton.kernel_cases import assert_near, check_matmul, normal, run_matmul
from hypothesis import given, settings
from hypothesis import strategies as st

from infercomp.codegen.ops import ACTIVATIONS
from infercomp.codegen.triton import fragments
from infercomp.codegen.triton.specs import NOTHING, Fragment, MatmulSpec

SMALL = {"tile_rows": 16, "tile_columns": 16, "tile_inner": 32, "num_warps": 1, "group_row_tiles": 2}


@st.composite
def products(draw: st.DrawFn) -> MatmulSpec:
    input_dtype = draw(st.sampled_from(["fp32", "fp16", "i8"]))
    weight_format = "i8" if input_dtype == "i8" else draw(st.sampled_from(["same", "i8", "u4"]))
    is_single_row = draw(st.booleans())
    is_gated = draw(st.booleans())
    num_columns = draw(st.sampled_from([16, 24, 40]))
    can_describe = not is_single_row and weight_format != "u4" and num_columns % 16 == 0
    return MatmulSpec(
        **{**SMALL, "tile_rows": 1 if is_single_row else 16},
        input_dtype=input_dtype,
        output_dtype="fp32" if input_dtype == "fp32" else "fp16",
        num_columns=num_columns,
        num_inner=draw(st.sampled_from([32, 64, 80 if weight_format != "u4" else 96])),
        weight_format=weight_format,
        is_transposed=weight_format != "u4" and draw(st.booleans()),
        group_size=draw(st.sampled_from([16, 32])) if weight_format == "u4" else 0,
        has_zero=weight_format == "u4" and draw(st.booleans()),
        is_gated=is_gated,
        epilogue=fragments.gate("silu") if is_gated else NOTHING,
        is_single_row=is_single_row,
        num_splits=1 if is_single_row else draw(st.sampled_from([1, 2])),
        is_persistent=not is_single_row and draw(st.booleans()),
        use_descriptors=can_describe and draw(st.booleans()),
    )


@settings(max_examples=24)
@given(spec=products(), num_rows=st.sampled_from([1, 5, 33]), seed=st.integers(0, 99))
def test_products_equal_their_definition(spec: MatmulSpec, num_rows: int, seed: int) -> None:
    check_matmul(spec, num_rows, "cpu", seed)


PLAIN = MatmulSpec(input_dtype="fp32", output_dtype="fp32", num_columns=24, num_inner=32, **SMALL)


def run_with(
    epilogue: Fragment = NOTHING, prologue: Fragment = NOTHING, **changes: object
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    spec = replace(PLAIN, epilogue=epilogue, prologue=prologue, **changes)
    generator = torch.Generator().manual_seed(1)
    named = {
        "input": (5, 32),
        "weight": (24, 32),
        "bias": (24,),
        "residual": (5, 24),
        "row_scale": (5,),
        "inner_scale": (32,),
    }
    inputs = {name: normal(*shape, dtype="fp32", device="cpu", generator=generator) for name, shape in named.items()}
    exact = inputs["input"].double() @ inputs["weight"].double().t()
    return run_matmul(spec, 5, inputs, "cpu"), inputs, exact


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activation_epilogues(name: str) -> None:
    found, _, exact = run_with(fragments.activation(name))
    assert_near(found, ACTIVATIONS[name](exact))


@pytest.mark.parametrize("changes", [{}, {"num_splits": 2, "tile_inner": 16}, {"is_single_row": True, "tile_rows": 1}])
def test_epilogues_compose_in_order(changes: dict[str, object]) -> None:
    epilogue = fragments.bias("fp32") + fragments.softcap(2.0) + fragments.residual("fp32")
    found, inputs, exact = run_with(epilogue, **changes)
    assert_near(found, 2 * torch.tanh((exact + inputs["bias"]) / 2) + inputs["residual"])


@pytest.mark.parametrize("changes", [{}, {"is_single_row": True, "tile_rows": 1}])
def test_a_prologue_scales_rows_and_inner(changes: dict[str, object]) -> None:
    prologue = fragments.scale_rows() + fragments.scale_inner("fp32")
    found, inputs, _ = run_with(prologue=prologue, **changes)
    scaled = inputs["input"].double() * inputs["row_scale"][:, None] * inputs["inner_scale"]
    assert_near(found, scaled @ inputs["weight"].double().t())


@pytest.mark.parametrize(
    ("fixed", "bug"),
    [
        ("range(0, NUM_INNER", "range(TILE_INNER, NUM_INNER"),
        ("packed >> 4", "packed & 15"),
        ("first_inner // GROUP_SIZE", "0"),
        ("(w - zero)", "(w - 8.0)"),
    ],
)
def test_a_planted_bug_is_caught(fixed: str, bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(PLAIN, num_inner=64, weight_format="u4", group_size=32, has_zero=True)
    text = kernel_cases.emit(spec)
    assert fixed in text
    monkeypatch.setattr(kernel_cases, "emit", lambda _: text.replace(fixed, bug))
    with pytest.raises(AssertionError):
        check_matmul(spec, 15, "cpu")


def test_a_row_does_not_depend_on_the_number_of_rows() -> None:
    spec = replace(PLAIN, num_splits=2, tile_inner=16)
    generator = torch.Generator().manual_seed(1)
    x = normal(33, 32, dtype="fp32", device="cpu", generator=generator)
    weight = normal(24, 32, dtype="fp32", device="cpu", generator=generator)
    together = run_matmul(spec, 33, {"input": x, "weight": weight}, "cpu")
    alone = run_matmul(spec, 1, {"input": x[20:21].clone(), "weight": weight}, "cpu")
    assert torch.equal(alone[0], together[20])
