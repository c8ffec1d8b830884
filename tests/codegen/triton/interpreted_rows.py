"""Run by ``test_interpreted.py`` in a process where Triton interprets kernels instead of compiling them."""

from __future__ import annotations

import pytest
from codegen.triton import kernel_cases
from hypothesis import given, settings
from hypothesis import strategies as st

from infercomp.codegen.ops import ACTIVATIONS
from infercomp.codegen.triton.specs import GatedActivationSpec, NormSpec, QuantizeSpec, RotaryWriteKvSpec, WriteKvSpec

FLOATS = st.sampled_from(["fp32", "fp16"])


@settings(max_examples=25)
@given(
    dtype=FLOATS,
    num_columns=st.sampled_from([1, 33, 48]),
    is_layer_norm=st.booleans(),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.booleans()),
)
def test_norms(dtype: str, num_columns: int, is_layer_norm: bool, flags: tuple[bool, ...]) -> None:
    has_weight, has_bias, unit_offset, has_residual, is_quantized = flags
    spec = NormSpec(
        dtype=dtype,
        num_columns=num_columns,
        eps=1e-5,
        is_layer_norm=is_layer_norm,
        has_weight=has_weight,
        has_bias=is_layer_norm and has_bias,
        unit_offset=not is_layer_norm and unit_offset,
        has_residual=has_residual,
        is_quantized=is_quantized,
        group_size=16 if is_quantized and num_columns % 16 == 0 else 0,
    )
    kernel_cases.check_norm(spec, 5, "cpu")


@pytest.mark.parametrize(("num_columns", "group_size"), [(48, 16), (33, 0), (64, 64)])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_quantize(dtype: str, num_columns: int, group_size: int) -> None:
    kernel_cases.check_quantize(QuantizeSpec(dtype=dtype, num_columns=num_columns, group_size=group_size), 9, "cpu")


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_gated_activations(activation: str, dtype: str) -> None:
    spec = GatedActivationSpec(dtype=dtype, num_columns=40, activation=activation, tile_columns=32)
    kernel_cases.check_gated_activation(spec, 3, "cpu")


@given(dtype=FLOATS, num_kv_heads=st.integers(1, 3), value_dim=st.sampled_from([None, 5]))
@settings(max_examples=5)
def test_write_kv(dtype: str, num_kv_heads: int, value_dim: int | None) -> None:
    spec = WriteKvSpec(dtype=dtype, num_kv_heads=num_kv_heads, head_dim=8, value_dim=value_dim)
    kernel_cases.check_write_kv(spec, 7, "cpu")


@given(
    dtype=FLOATS,
    heads=st.sampled_from([(1, 1), (6, 2), (3, 3)]),
    rotary_dim=st.sampled_from([4, 12, 16]),
    is_interleaved=st.booleans(),
    value_dim=st.sampled_from([None, 5]),
)
@settings(max_examples=12)
def test_rotary_write_kv(
    dtype: str, heads: tuple[int, int], rotary_dim: int, is_interleaved: bool, value_dim: int | None
) -> None:
    spec = RotaryWriteKvSpec(
        dtype=dtype,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=16,
        rotary_dim=rotary_dim,
        value_dim=value_dim,
        is_interleaved=is_interleaved,
        angle_dtype=dtype,
    )
    kernel_cases.check_rotary_write_kv(spec, 5, "cpu")
