"""Quantised linears against float64 and integers from numpy; rounding against scalars; grids that are met exactly."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infercomp.codegen.ops import (
    group_embedding,
    group_linear,
    group_weight_linear,
    int8_embedding,
    int8_linear,
    int8_weight_linear,
    quantize_per_token,
    quantize_weight_groups,
    quantize_weight_int8,
)
from infercomp.codegen.ops.group_codes import packed_codes, unpacked_codes

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
GROUP_SIZES = [8, 32]
BITS = [3, 4, 8]
seeds = st.integers(0, 2**32 - 1)
magnitudes = st.sampled_from([1e-6, 1e-2, 1.0, 300.0])


def _random(seed: int, *shape: int, magnitude: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    heavy_tailed = torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator).exp()
    return magnitude * heavy_tailed


def _codes(packed: torch.Tensor, bits: int) -> np.ndarray:
    """Bit i of byte j of a row is bit 8 j + i of a stream, and so many bits are a code, the lowest first."""
    stream = np.unpackbits(packed.numpy(), axis=-1, bitorder="little").astype(np.int64)
    return stream.reshape(len(packed), -1, bits) @ (1 << np.arange(bits))


def _restored(packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int, group_size: int) -> np.ndarray:
    has_values = zero.dtype == torch.float16
    scale, zero = (each.double().repeat_interleave(group_size, -1).numpy() for each in (scale, zero))
    codes = _codes(packed, bits)
    return scale * codes + zero if has_values else scale * (codes - zero)


@given(seeds, st.sampled_from(BITS), st.integers(1, 4))
def test_codes_are_a_stream_of_bits(seed: int, bits: int, num_bytes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (3, 8 * num_bytes), generator=generator, dtype=torch.uint8)
    packed = packed_codes(codes, bits)
    assert packed.shape == (3, bits * num_bytes)
    assert np.array_equal(_codes(packed, bits), codes.numpy())
    assert torch.equal(unpacked_codes(packed, bits), codes)


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
        group_linear(
            q, scale, sums, *quantize_weight_groups(_random(1, 4, 32), 4, 32, False), None, 4, 32, torch.float32
        ),
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
    for bits, group_size in ((3, 8192), (4, 8192), (8, 512)):
        codes = torch.full((1, group_size * bits // 8), 255, dtype=torch.uint8)
        scale, zero = torch.ones(1, 1, dtype=torch.float16), torch.zeros(1, 1, dtype=torch.uint8)
        q = torch.full((1, group_size), -127, dtype=torch.int8)
        sums = q.sum(-1, keepdim=True, dtype=torch.int32)
        found = group_linear(q, one[None], sums, codes, scale, zero, None, bits, group_size, torch.float32)
        assert found.item() == -127 * (2**bits - 1) * group_size


ZEROS = ["middle", "points", "values"]


def _groups(seed: int, bits: int, zeros: str, group_size: int, *shape: int) -> tuple[torch.Tensor, ...]:
    """Codes, scales and zeros of a random weight, the zeros of one of three kinds."""
    packed, scale, zero = quantize_weight_groups(_random(seed, *shape), bits, group_size, zeros == "middle")
    return packed, scale, -(zero * scale).half() if zeros == "values" else zero


@given(
    seeds,
    st.sampled_from(FLOATS),
    st.sampled_from(GROUP_SIZES),
    st.sampled_from(BITS),
    st.sampled_from(ZEROS),
    st.booleans(),
    st.sampled_from([(), (1,), (5,), (2, 3)]),
)
def test_group_linear_is_its_formula(
    seed: int, dtype: torch.dtype, group_size: int, bits: int, zeros: str, has_bias: bool, shape: tuple[int, ...]
) -> None:
    num_groups = 3
    num_channels = num_groups * group_size
    q, scale, sums = quantize_per_token(_random(seed, *shape, num_channels), group_size)
    packed, weight_scale, zero = _groups(seed + 1, bits, zeros, group_size, 6, num_channels)
    bias = _random(seed, 6).to(dtype) if has_bias else None
    given_zero = None if zeros == "middle" else zero
    found = group_linear(q, scale, sums, packed, weight_scale, given_zero, bias, bits, group_size, dtype)
    codes = _codes(packed, bits)
    total = np.zeros((*shape, 6), dtype=np.float32)
    for group in range(num_groups):
        part = slice(group * group_size, (group + 1) * group_size)
        product = (q.numpy()[..., part].astype(np.int64) @ codes[:, part].T).astype(np.float32)
        shift = zero[:, group].float().numpy() * sums.numpy()[..., group, None].astype(np.float32)
        if zeros == "values":
            total = (total + weight_scale[:, group].float().numpy() * product) + shift
        else:
            total = total + weight_scale[:, group].float().numpy() * (product - shift)
    expected = total * scale.numpy()
    expected = expected if bias is None else expected + bias.float().numpy()
    assert expected.dtype == np.float32
    assert torch.equal(found, torch.from_numpy(expected).to(dtype))


@given(seeds, st.sampled_from(BITS), st.sampled_from(ZEROS))
def test_quantized_linears_compute_the_linear_of_the_restored_values(seed: int, bits: int, zeros: str) -> None:
    """float64 over what the codes stand for: only the float32 steps of the result are left as an error."""
    q, scale, sums = quantize_per_token(_random(seed, 4, 64), 32)
    x = q.double().numpy() * scale.double().numpy()
    weight = _random(seed + 1, 6, 64)
    codes, row_scale = quantize_weight_int8(weight)
    expected = x @ (codes.double() * row_scale.double()[:, None]).numpy().T
    found = int8_linear(q, scale, sums, codes, row_scale, None, torch.float32)
    np.testing.assert_allclose(found, expected, rtol=3e-7, atol=1e-12)
    packed, group_scale, zero = _groups(seed + 1, bits, zeros, 32, 6, 64)
    expected = x @ _restored(packed, group_scale, zero, bits, 32).T
    found = group_linear(q, scale, sums, packed, group_scale, zero, None, bits, 32, torch.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_weight_only_linears_round_once(dtype: torch.dtype, has_bias: bool) -> None:
    x, bias = _random(0, 2, 3, 64).to(dtype), _random(1, 5).to(dtype) if has_bias else None
    weight = _random(2, 5, 64)
    codes, row_scale = quantize_weight_int8(weight)
    offset = 0 if bias is None else bias.double()
    cases = [(int8_weight_linear(x, codes, row_scale, bias), codes.double() * row_scale.double()[:, None])]
    for bits, zeros in itertools.product(BITS, ZEROS):
        packed, group_scale, zero = _groups(2, bits, zeros, 32, 5, 64)
        found = group_weight_linear(x, packed, group_scale, zero, bias, bits, 32)
        cases.append((found, torch.from_numpy(_restored(packed, group_scale, zero, bits, 32))))
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
    for bits, zeros in itertools.product(BITS, ZEROS):
        packed, scale, zero = _groups(0, bits, zeros, 32, 9, 64)
        expected = torch.from_numpy(_restored(packed, scale, zero, bits, 32)).float()[ids].to(dtype)
        found = group_embedding(packed, scale, None if zeros == "middle" else zero, ids, bits, dtype)
        torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@given(seeds, magnitudes)
def test_int8_weights_err_half_a_step_and_keep_their_codes(seed: int, magnitude: float) -> None:
    weight = _random(seed, 5, 48, magnitude=magnitude)
    codes, scale = quantize_weight_int8(weight)
    restored = codes.double() * scale.double()[:, None]
    assert ((restored - weight.double()).abs() <= 0.5001 * scale.double()[:, None]).all()
    assert torch.equal(quantize_weight_int8(restored)[0], codes)
    merged = quantize_weight_int8(torch.cat([weight, 2 * weight]))
    assert torch.equal(merged[0], torch.cat([codes, codes]))


@given(seeds, st.sampled_from([1e-2, 1.0, 300.0]), st.sampled_from(GROUP_SIZES), st.sampled_from(BITS), st.booleans())
def test_codes_err_half_a_step(seed: int, magnitude: float, group_size: int, bits: int, symmetric: bool) -> None:
    weight = _random(seed, 4, 2 * group_size, magnitude=magnitude)
    packed, scale, zero = quantize_weight_groups(weight, bits, group_size, symmetric)
    step = scale.double().abs().repeat_interleave(group_size, -1).numpy()
    error = np.abs(_restored(packed, scale, zero, bits, group_size) - weight.double().numpy())
    # -8 … 7 leaves out +8; a rounded zero shifts the ends of the grid; float16 rounds the scale.
    assert (error <= (1.01 if symmetric else 1.02) * step + 2.0**bits * step * 2.0**-11).all()
    assert not symmetric or (zero == 2 ** (bits - 1)).all()


@given(seeds, st.sampled_from([0.003, 0.1, 4.0]), st.booleans())
def test_an_asymmetric_grid_is_met(seed: int, step: float, goes_through_zero: bool) -> None:
    """AWQ's grids go through 0 and keep their codes; those that start anywhere are met to half a step."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (6, 4, 32), generator=generator)
    codes[..., 3], codes[..., 17] = 0, 15
    scale = (step * (0.5 + torch.rand(6, 4, 1, generator=generator))).half().float()
    zero = 15 * torch.rand(6, 4, 1, generator=generator)
    zero = zero.round() if goes_through_zero else zero
    weight = ((codes - zero) * scale).flatten(1)
    packed, found_scale, found_zero = quantize_weight_groups(weight, 4, 32, False)
    torch.testing.assert_close(found_scale.float(), scale.squeeze(-1), rtol=2**-11, atol=0)
    if goes_through_zero:
        assert np.array_equal(_codes(packed, 4), codes.flatten(1).numpy())
        assert torch.equal(found_zero.float(), zero.squeeze(-1))
    restored = torch.from_numpy(_restored(packed, found_scale, found_zero, 4, 32))
    of_the_zero = 0 if goes_through_zero else 0.5
    allowed = scale.repeat_interleave(32, -1).flatten(1) * (of_the_zero + 30 * 2**-11)
    assert ((restored - weight).abs() <= allowed).all()


@given(seeds, st.sampled_from([0.01, 1.0]), st.sampled_from(BITS))
def test_a_symmetric_grid_is_met_exactly(seed: int, step: float, bits: int) -> None:
    generator, middle = torch.Generator().manual_seed(seed), 2 ** (bits - 1)
    codes = torch.randint(1 - middle, middle, (6, 2, 32), generator=generator)
    codes[..., 5] = torch.where(torch.rand(6, 2, generator=generator) < 0.5, -middle, middle - 1)
    scale = (step * (0.5 + torch.rand(6, 2, 1, generator=generator))).half().float()
    weight = (codes * scale).flatten(1)
    packed, found_scale, zero = quantize_weight_groups(weight, bits, 32, True)
    np.testing.assert_array_equal(_restored(packed, found_scale, zero, bits, 32), weight.double().numpy())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_constant_groups_are_kept(symmetric: bool, bits: int) -> None:
    weight = torch.tensor([0.0, 0.75, -0.75, 1e-9])[:, None].expand(4, 32).contiguous()
    packed, scale, zero = quantize_weight_groups(weight, bits, 32, symmetric)
    restored = _restored(packed, scale, zero, bits, 32)
    np.testing.assert_allclose(restored, weight.double().numpy(), rtol=1e-3, atol=1e-8)


@settings(max_examples=20)
@given(seeds, st.booleans())
def test_rows_are_quantized_alone(seed: int, symmetric: bool) -> None:
    """Merged weights may be quantised apart, and tokens in any batch."""
    weight = _random(seed, 6, 64)
    whole = quantize_weight_groups(weight, 3, 32, symmetric)
    parts = [quantize_weight_groups(part, 3, 32, symmetric) for part in weight.split([1, 3, 2])]
    for one, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(one, torch.cat(pieces))
    alone = [quantize_per_token(row, 32) for row in weight]
    for one, pieces in zip(quantize_per_token(weight, 32), zip(*alone, strict=True), strict=True):
        assert torch.equal(one, torch.stack(pieces))
