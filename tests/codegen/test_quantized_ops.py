"""Quantised linears against float64 and integers from numpy; rounding against scalars; grids that are met exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infercomp.codegen.ops import (
    int4_embedding,
    int4_linear,
    int4_weight_linear,
    int8_embedding,
    int8_linear,
    int8_weight_linear,
    quantize_per_token,
    quantize_weight_int4,
    quantize_weight_int8,
)
from infercomp.codegen.ops.quantized import PARTS_OF_A_STEP

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
GROUP_SIZES = [2, 8, 32]
seeds = st.integers(0, 2**32 - 1)
magnitudes = st.sampled_from([1e-6, 1e-2, 1.0, 300.0])


def _random(seed: int, *shape: int, magnitude: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    heavy_tailed = torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator).exp()
    return magnitude * heavy_tailed


def _codes(packed: torch.Tensor) -> np.ndarray:
    """Channel 2 i is the low nibble of byte i."""
    codes = np.empty((packed.shape[0], 2 * packed.shape[1]), dtype=np.int64)
    codes[:, 0::2], codes[:, 1::2] = packed.numpy() % 16, packed.numpy() // 16
    return codes


def _restored(packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, group_size: int) -> np.ndarray:
    scale, zero = (each.double().repeat_interleave(group_size, -1).numpy() for each in (scale, zero))
    return scale * (_codes(packed) - zero / PARTS_OF_A_STEP)


@given(seeds, magnitudes, st.sampled_from(FLOATS), st.sampled_from(GROUP_SIZES), st.integers(1, 3))
def test_quantize_per_token_is_its_formula(
    seed: int, magnitude: float, dtype: torch.dtype, group_size: int, num_groups: int
) -> None:
    x = _random(seed, 3, group_size * num_groups, magnitude=magnitude).to(dtype)
    q, scale, sums = quantize_per_token(x, group_size)
    rows = x.float().numpy()
    maximum = np.abs(rows).max(-1, keepdims=True)
    assert maximum.dtype == np.float32
    np.testing.assert_array_equal(q.numpy(), np.rint(rows * (np.float32(127) / maximum)))
    np.testing.assert_array_equal(scale.numpy(), maximum * np.float32(1 / 127))
    np.testing.assert_array_equal(sums.numpy(), q.numpy().reshape(3, num_groups, -1).sum(-1))
    assert (q.dtype, scale.dtype, sums.dtype) == (torch.int8, torch.float32, torch.int32)
    assert q.abs().amax(-1).eq(127).all()
    error = (q.double() * scale.double() - x.double()).abs()
    assert (error <= 0.5001 * scale.double()).all()


@given(seeds, magnitudes)
def test_quantizing_again_changes_nothing(seed: int, magnitude: float) -> None:
    q, scale, sums = quantize_per_token(_random(seed, 5, 64, magnitude=magnitude), 32)
    again, _, sums_again = quantize_per_token(q * scale, 32)
    assert torch.equal(again, q) and torch.equal(sums_again, sums)


def test_ties_go_to_the_even_code() -> None:
    q, _, _ = quantize_per_token(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]), 6)
    assert q.tolist() == [[127, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize("tiny", [0.0, 1e-31, 1e-42])
def test_a_row_without_values_is_zero_at_scale_one(tiny: float) -> None:
    x = torch.tensor([[tiny, -tiny, 0.0, 0.0], [1e-29, 0.0, 0.0, 0.0]])
    q, scale, sums = quantize_per_token(x, 2)
    assert q.tolist() == [[0, 0, 0, 0], [127, 0, 0, 0]]
    assert scale[0].item() == 1.0 and 0 < scale[1].item() < 1e-30
    assert sums.tolist() == [[0, 0], [127, 0]]


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_row_that_is_no_number_gives_no_number(bad: float) -> None:
    x = _random(0, 3, 32)
    x[1, 7] = bad
    q, scale, sums = quantize_per_token(x, 32)
    assert (q[1] == 0).all() and (sums[1] == 0).all()
    weight, weight_scale = quantize_weight_int8(_random(1, 4, 32))
    for output in (
        int8_linear(q, scale, sums, weight, weight_scale, None, torch.float32),
        int4_linear(q, scale, sums, *quantize_weight_int4(_random(1, 4, 32), 32, False), None, 32, torch.float32),
    ):
        assert output[1].isnan().all() and output[[0, 2]].isfinite().all()


@given(seeds, st.sampled_from(FLOATS), st.booleans(), st.sampled_from([(), (1,), (5,), (2, 3)]))
def test_int8_linear_is_its_formula(seed: int, dtype: torch.dtype, has_bias: bool, shape: tuple[int, ...]) -> None:
    num_channels = 1500  # more than one exact part
    q, scale, sums = quantize_per_token(_random(seed, *shape, num_channels), num_channels)
    weight, weight_scale = quantize_weight_int8(_random(seed + 1, 7, num_channels))
    bias = _random(seed, 7).to(dtype) if has_bias else None
    found = int8_linear(q, scale, sums, weight, weight_scale, bias, dtype)
    product = q.numpy().astype(np.int64) @ weight.numpy().astype(np.int64).T
    expected = product.astype(np.float32) * scale.numpy() * weight_scale.numpy()
    expected = expected if bias is None else expected + bias.float().numpy()
    assert torch.equal(found, torch.from_numpy(expected).to(dtype))


def test_the_largest_integers_stay_exact() -> None:
    q = torch.full((2, 5000), -127, dtype=torch.int8)
    q[1, 4999] = -126
    weight = torch.full((1, 5000), -127, dtype=torch.int8)
    one = torch.ones(1)
    found = int8_linear(q, torch.ones(2, 1), q, weight, one, None, torch.float64)
    assert found.flatten().tolist() == [float(np.float32(5000 * 127**2)), float(np.float32(5000 * 127**2 - 127))]
    codes = torch.full((1, 4096), 255, dtype=torch.uint8)
    scale, zero = torch.ones(1, 1, dtype=torch.float16), torch.zeros(1, 1, dtype=torch.float16)
    sums = q[:, :8192].sum(-1, keepdim=True, dtype=torch.int32)
    q = torch.full((1, 8192), -127, dtype=torch.int8)
    found = int4_linear(q, one[None], sums[:1], codes, scale, zero, None, 8192, torch.float32)
    assert found.item() == -127 * 15 * 8192


@given(
    seeds,
    st.sampled_from(FLOATS),
    st.sampled_from(GROUP_SIZES),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(), (1,), (5,), (2, 3)]),
)
def test_int4_linear_is_its_formula(
    seed: int, dtype: torch.dtype, group_size: int, symmetric: bool, has_bias: bool, shape: tuple[int, ...]
) -> None:
    num_groups = 3
    num_channels = num_groups * group_size
    q, scale, sums = quantize_per_token(_random(seed, *shape, num_channels), group_size)
    packed, weight_scale, zero = quantize_weight_int4(_random(seed + 1, 6, num_channels), group_size, symmetric)
    bias = _random(seed, 6).to(dtype) if has_bias else None
    found = int4_linear(q, scale, sums, packed, weight_scale, None if symmetric else zero, bias, group_size, dtype)
    codes = _codes(packed)
    total = np.zeros((*shape, 6), dtype=np.float32)
    for group in range(num_groups):
        part = slice(group * group_size, (group + 1) * group_size)
        product = (q.numpy()[..., part].astype(np.int64) @ codes[:, part].T).astype(np.float32)
        steps = zero[:, group].float().numpy() / PARTS_OF_A_STEP
        centred = product - steps * sums.numpy()[..., group, None].astype(np.float32)
        total = total + weight_scale[:, group].float().numpy() * centred
    expected = total * scale.numpy()
    expected = expected if bias is None else expected + bias.float().numpy()
    assert expected.dtype == np.float32
    assert torch.equal(found, torch.from_numpy(expected).to(dtype))


@given(seeds, st.booleans())
def test_quantized_linears_compute_the_linear_of_the_restored_values(seed: int, symmetric: bool) -> None:
    """float64 over what the codes stand for: only the float32 steps of the result are left as an error."""
    q, scale, sums = quantize_per_token(_random(seed, 4, 64), 32)
    x = q.double().numpy() * scale.double().numpy()
    weight = _random(seed + 1, 6, 64)
    codes, row_scale = quantize_weight_int8(weight)
    expected = x @ (codes.double() * row_scale.double()[:, None]).numpy().T
    found = int8_linear(q, scale, sums, codes, row_scale, None, torch.float32)
    np.testing.assert_allclose(found, expected, rtol=3e-7, atol=1e-12)
    packed, group_scale, zero = quantize_weight_int4(weight, 32, symmetric)
    expected = x @ _restored(packed, group_scale, zero, 32).T
    found = int4_linear(q, scale, sums, packed, group_scale, zero, None, 32, torch.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_weight_only_linears_round_once(dtype: torch.dtype, has_bias: bool) -> None:
    x, bias = _random(0, 2, 3, 64).to(dtype), _random(1, 5).to(dtype) if has_bias else None
    weight = _random(2, 5, 64)
    codes, row_scale = quantize_weight_int8(weight)
    packed, group_scale, zero = quantize_weight_int4(weight, 32, False)
    offset = 0 if bias is None else bias.double()
    cases = [
        (int8_weight_linear(x, codes, row_scale, bias), codes.double() * row_scale.double()[:, None]),
        (
            int4_weight_linear(x, packed, group_scale, zero, bias, 32),
            torch.from_numpy(_restored(packed, group_scale, zero, 32)),
        ),
    ]
    for found, restored in cases:
        expected = x.double() @ restored.T + offset
        # One rounding of the result, and those of a sum of 65 products of which each is rounded three times.
        of_the_sum = 68 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        allowed = torch.finfo(dtype).eps * expected.abs() + of_the_sum * (x.double().abs() @ restored.abs().T + 1)
        assert found.dtype == dtype
        assert ((found.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_embeddings_are_the_restored_rows(dtype: torch.dtype) -> None:
    table, ids = _random(0, 9, 64), torch.tensor([[3, 0, 8], [3, 3, 1]])
    codes, row_scale = quantize_weight_int8(table)
    expected = (codes.float() * row_scale[:, None])[ids].to(dtype)
    assert torch.equal(int8_embedding(codes, row_scale, ids, dtype), expected)
    for symmetric in (False, True):
        packed, scale, zero = quantize_weight_int4(table, 32, symmetric)
        expected = torch.from_numpy(_restored(packed, scale, zero, 32)).float()[ids].to(dtype)
        assert torch.equal(int4_embedding(packed, scale, None if symmetric else zero, ids, 32, dtype), expected)


@given(seeds, magnitudes)
def test_int8_weights_err_half_a_step_and_keep_their_codes(seed: int, magnitude: float) -> None:
    weight = _random(seed, 5, 48, magnitude=magnitude)
    codes, scale = quantize_weight_int8(weight)
    restored = codes.double() * scale.double()[:, None]
    assert ((restored - weight.double()).abs() <= 0.5001 * scale.double()[:, None]).all()
    assert torch.equal(quantize_weight_int8(restored)[0], codes)
    merged = quantize_weight_int8(torch.cat([weight, 2 * weight]))
    assert torch.equal(merged[0], torch.cat([codes, codes]))


@given(seeds, st.sampled_from([1e-2, 1.0, 300.0]), st.sampled_from(GROUP_SIZES), st.booleans())
def test_int4_weights_err_half_a_step(seed: int, magnitude: float, group_size: int, symmetric: bool) -> None:
    weight = _random(seed, 4, 2 * group_size, magnitude=magnitude)
    packed, scale, zero = quantize_weight_int4(weight, group_size, symmetric)
    step = scale.double().abs().repeat_interleave(group_size, -1).numpy()
    error = np.abs(_restored(packed, scale, zero, group_size) - weight.double().numpy())
    # -8 … 7 leaves out +8; a rounded zero shifts the ends of the grid; float16 rounds the scale.
    assert (error <= (1.01 if symmetric else 0.52 + 0.5 / PARTS_OF_A_STEP) * step).all()
    assert not symmetric or (zero == 8 * PARTS_OF_A_STEP).all()


@given(seeds, st.sampled_from([0.003, 0.1, 4.0]), st.booleans())
def test_an_asymmetric_grid_is_met(seed: int, step: float, goes_through_zero: bool) -> None:
    """AWQ's grids go through 0 and keep their codes; Q4_1's start anywhere and are met to a part of a step."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (6, 4, 32), generator=generator)
    codes[..., 3], codes[..., 17] = 0, 15
    scale = (step * (0.5 + torch.rand(6, 4, 1, generator=generator))).half().float()
    zero = 15 * torch.rand(6, 4, 1, generator=generator)
    zero = zero.round() if goes_through_zero else zero
    weight = ((codes - zero) * scale).flatten(1)
    packed, found_scale, found_zero = quantize_weight_int4(weight, 32, False)
    torch.testing.assert_close(found_scale.float(), scale.squeeze(-1), rtol=2**-11, atol=0)
    if goes_through_zero:
        assert np.array_equal(_codes(packed), codes.flatten(1).numpy())
        assert torch.equal(found_zero.float(), PARTS_OF_A_STEP * zero.squeeze(-1))
    restored = torch.from_numpy(_restored(packed, found_scale, found_zero, 32))
    of_the_zero = 0 if goes_through_zero else 0.5 / PARTS_OF_A_STEP
    allowed = scale.repeat_interleave(32, -1).flatten(1) * (of_the_zero + 30 * 2**-11)
    assert ((restored - weight).abs() <= allowed).all()


@given(seeds, st.sampled_from([0.01, 1.0]))
def test_a_symmetric_grid_is_met_exactly(seed: int, step: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-7, 8, (6, 2, 32), generator=generator)
    codes[..., 5] = torch.where(torch.rand(6, 2, generator=generator) < 0.5, -8, 7)
    scale = (step * (0.5 + torch.rand(6, 2, 1, generator=generator))).half().float()
    weight = (codes * scale).flatten(1)
    packed, found_scale, zero = quantize_weight_int4(weight, 32, True)
    np.testing.assert_array_equal(_restored(packed, found_scale, zero, 32), weight.double().numpy())


@pytest.mark.parametrize("symmetric", [False, True])
def test_constant_groups_are_kept(symmetric: bool) -> None:
    weight = torch.tensor([0.0, 0.75, -0.75, 1e-9])[:, None].expand(4, 32).contiguous()
    packed, scale, zero = quantize_weight_int4(weight, 32, symmetric)
    restored = _restored(packed, scale, zero, 32)
    np.testing.assert_allclose(restored, weight.double().numpy(), rtol=1e-3, atol=1e-8)


@settings(max_examples=20)
@given(seeds, st.booleans())
def test_rows_are_quantized_alone(seed: int, symmetric: bool) -> None:
    """Merged weights may be quantised apart, and tokens in any batch."""
    weight = _random(seed, 6, 64)
    whole = quantize_weight_int4(weight, 32, symmetric)
    parts = [quantize_weight_int4(part, 32, symmetric) for part in weight.split([1, 3, 2])]
    for one, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(one, torch.cat(pieces))
    alone = [quantize_per_token(row, 32) for row in weight]
    for one, pieces in zip(quantize_per_token(weight, 32), zip(*alone, strict=True), strict=True):
        assert torch.equal(one, torch.stack(pieces))
