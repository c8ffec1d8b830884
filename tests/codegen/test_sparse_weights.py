"""2:4 weights: compressed and restored bit for bit, and refused where more than two of four are kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infercomp import ConfigError
from infercomp.codegen.ops import (
    group_weight_linear,
    int8_linear,
    quantize_per_token,
    sparse_group_weight_linear,
    sparse_int8_linear,
    sparse_weight_linear,
)
from infercomp.codegen.ops.group_codes import nearest_grid, packed_codes
from infercomp.codegen.sparse_weights import compress_2_of_4, kept_channels, packed_channels, restore_2_of_4


@st.composite
def sparse_weights(draw: st.DrawFn) -> torch.Tensor:
    """At most two nonzeros in each group of four, at any places; NaN and infinities are among the floats."""
    num_outputs, num_bytes = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.int8)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = (50 * torch.randn(num_outputs, 2 * num_bytes, 4, generator=generator)).to(dtype)
    if dtype.is_floating_point:
        weight.flatten()[:3] = torch.tensor((float("nan"), float("inf"), 1e-40))[: weight.numel()].to(dtype)
    places = torch.rand(weight.shape, generator=generator).argsort(-1)
    at_most = torch.randint(0, 3, weight.shape[:2], generator=generator)
    return torch.where(places < at_most[..., None], weight, torch.zeros_like(weight)).flatten(1)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@settings(max_examples=60, deadline=None)
@given(sparse_weights(), st.booleans())
def test_what_was_compressed_is_restored(weight: torch.Tensor, lies_transposed: bool) -> None:
    values, indices = compress_2_of_4(weight.t().contiguous().t() if lies_transposed else weight)
    num_outputs, num_inputs = weight.shape
    assert (values.shape, values.dtype) == ((num_outputs, num_inputs // 2), weight.dtype)
    assert (indices.shape, indices.dtype) == ((num_outputs, num_inputs // 8), torch.uint8)
    assert torch.equal(bits(restore_2_of_4(values, indices)), bits(weight))
    channels = kept_channels(indices)
    assert bool((channels[:, ::2] < channels[:, 1::2]).all()) and torch.equal(packed_channels(channels), indices)


def test_a_place_off_by_one_is_noticed() -> None:
    """Planted: indices that name the next input of the group."""
    weight = torch.arange(1.0, 17.0).view(2, 8) * torch.tensor((1, 0, 0, 1, 0, 1, 1, 0))
    values, indices = compress_2_of_4(weight)
    assert values.tolist() == [[1, 4, 6, 7], [9, 12, 14, 15]] and indices.tolist() == [[0b10011100]] * 2
    moved = packed_channels(kept_channels(indices) + 1 & 3)
    assert torch.equal(restore_2_of_4(values, indices), weight)
    assert not torch.equal(restore_2_of_4(values, moved), weight)


def test_zeros_that_a_mask_left_negative_are_zeros() -> None:
    weight = torch.tensor([[-0.0, -1.0, -0.0, 2.0, -0.0, -0.0, -0.0, -3.0]])
    restored = restore_2_of_4(*compress_2_of_4(weight))
    assert torch.equal(restored, weight) and not torch.signbit(restored[weight == 0]).any()


def test_what_is_not_2_of_4_is_refused() -> None:
    weight = torch.zeros(3, 16)
    weight[1, 4:7] = 1.0
    with pytest.raises(ConfigError, match="inputs 4 to 7 of output 1 have 3 nonzeros") as caught:
        compress_2_of_4(weight)
    assert caught.value.field == "weight" and "dense" in str(caught.value)
    with pytest.raises(ConfigError, match="in eights, not 12"):
        compress_2_of_4(torch.zeros(2, 12))


@settings(max_examples=20, deadline=None)
@given(sparse_weights(), st.integers(1, 5), st.booleans())
def test_definitions_are_those_of_the_dense_weight(weight: torch.Tensor, rows: int, has_bias: bool) -> None:
    weight = weight.nan_to_num(1.0, 1.0, 1.0) if weight.is_floating_point() else weight
    x, scale = torch.randn(rows, weight.shape[1]), torch.rand(len(weight))
    bias = torch.randn(len(weight)) if has_bias else None
    parts = compress_2_of_4(weight)
    is_int8 = weight.dtype == torch.int8
    expected = x.double() @ weight.double().T * (scale[:, None].T if is_int8 else 1) + (bias if has_bias else 0)
    found = sparse_weight_linear(x.double(), *parts, scale if is_int8 else None, bias)
    torch.testing.assert_close(found, expected)
    if is_int8:
        q = quantize_per_token(x, x.shape[1])
        expected = int8_linear(*q, weight, scale, bias, torch.float32)
        assert torch.equal(sparse_int8_linear(*q, *parts, scale, bias, torch.float32), expected)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([4, 8]), st.integers(1, 3), st.integers(1, 5), st.booleans(), st.integers(0, 999))
def test_codes_in_groups_are_those_of_the_dense_weight(
    bits: int, num_groups: int, rows: int, symmetric: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, num_groups * 8, 4, generator=generator)
    weight = weight.scatter(2, weight.abs().argsort(2)[..., :2], 0).flatten(1)
    codes, scale, zero = nearest_grid(weight, bits, 32, symmetric)
    steps, indices = compress_2_of_4((codes - zero.repeat_interleave(32, 1)).to(torch.int16))
    kept = packed_codes(steps + zero.repeat_interleave(16, 1).to(torch.int16), bits)
    zeros = None if symmetric else zero.to(torch.uint8)
    x = torch.randn(rows, weight.shape[1], generator=generator).double()
    expected = group_weight_linear(x, packed_codes(codes, bits), scale.half(), zeros, None, bits, 32)
    found = sparse_group_weight_linear(x, kept, indices, scale.half(), zeros, None, bits, 32)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
