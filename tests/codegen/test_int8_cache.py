"""Caches of int8: the definitions of write_kv and paged_attention against attention in float64 on what was written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infercomp.codegen.ops import attention, paged_attention, write_kv
from infercomp.codegen.ops.paged_attention import tile_of
from infercomp.runtime.kv_pools import Pool

HEADS, KV_HEADS, DIM, VALUE_DIM, BLOCK_SIZE = 4, 2, 8, 12, 16
TILE = tile_of(torch.int8)


@dataclass
class Int8Cache:
    """One sequence in shuffled blocks; codes that nobody wrote are -128, and their scales NaN."""

    blocks: Tensor
    tile: int

    def __post_init__(self) -> None:
        pools = Pool(KV_HEADS, DIM, self.tile, True), Pool(KV_HEADS, VALUE_DIM, self.tile, False)
        sizes = len(self.blocks), BLOCK_SIZE
        self.codes = [torch.full(pool.shape(*sizes), -128, dtype=torch.int8) for pool in pools]
        self.scales = [torch.full(pool.scale_shape(*sizes), torch.nan) for pool in pools]

    @property
    def options(self) -> dict[str, Any]:
        return {"tile": self.tile, "key_scale": self.scales[0], "value_scale": self.scales[1]}

    def write(self, key: Tensor, value: Tensor, first: int = 0) -> None:
        positions = torch.arange(first, first + len(key))
        slots = self.blocks[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        write_kv(key, value, *self.codes, slots, **self.options)

    def attend(self, query: Tensor, length: int, **options: Any) -> Tensor:
        starts = torch.tensor([0, len(query)])
        table, lengths = self.blocks[None], torch.tensor([length])
        return paged_attention(query, *self.codes, table, lengths, starts, **self.options, **options)


def rows(length: int, heads: int, dim: int) -> Tensor:
    """Rows of very different sizes, so that one token's scale is not another's."""
    return torch.randn(length, heads, dim).double() * torch.randn(length, heads, 1).exp()


def error_and_bound(found: Tensor, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """How far a result is from exact attention, and how far rounding to codes may move it.

    An element errs by half a scale, so a score by E = |scale| |q|₁ scale_k / 2 at most (a softcap makes it no more), a
    probability by a factor of exp(2 E), and the result by half of a value's scale and (exp(2 E) - 1) Σ p |v|.
    """
    operands = [each.transpose(0, 1)[None] for each in (query, key, value)]
    exact = attention.definition(*operands, None, is_causal=True, **options)[0].transpose(0, 1)
    size = attention.definition(*operands[:2], operands[2].abs(), None, is_causal=True, **options)[0].transpose(0, 1)
    half_step = [each.abs().amax(-1) / 127 / 2 * (1 + 1e-5) for each in (key, value)]  # [length, KV_HEADS]
    of_score = abs(options["scale"]) * query.abs().sum(-1).max() * half_step[0].max()
    return (found - exact).abs(), half_step[1].max() + torch.expm1(2 * of_score) * size


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 5},
    "softcap": {"logit_softcap": 2.0},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 1.0])},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 0.0, 2.0])},
}


@given(st.integers(1, 40), st.integers(0, 1000), st.sampled_from(sorted(OPTIONS)), st.sampled_from([0, TILE]))
@settings(max_examples=40)
def test_the_definitions_err_by_the_rounding_and_no_more(length: int, seed: int, variant: str, tile: int) -> None:
    torch.manual_seed(seed)
    query, key, value = rows(length, HEADS, DIM), rows(length, KV_HEADS, DIM), rows(length, KV_HEADS, VALUE_DIM)
    options = {"scale": 0.05, **OPTIONS[variant]}
    cache = Int8Cache(torch.randperm(4), tile)
    cache.write(key, value)
    error, bound = error_and_bound(cache.attend(query, length, **options), query, key, value, **options)
    assert (error <= bound).all()
    # Later queries alone, after a prompt that was written in two pieces.
    pieces = Int8Cache(torch.randperm(4), tile)
    for first, last in ((0, length // 2), (length // 2, length)):
        pieces.write(key[first:last], value[first:last], first)
    later = pieces.attend(query[length // 2 :], length, **options)
    torch.testing.assert_close(later, cache.attend(query, length, **options)[length // 2 :], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("role", [0, 1], ids=["key", "value"])
@pytest.mark.parametrize("tile", [0, TILE])
def test_the_scale_of_the_neighbouring_token_is_caught(role: int, tile: int) -> None:
    torch.manual_seed(0)
    query, key, value = rows(30, HEADS, DIM), rows(30, KV_HEADS, DIM), rows(30, KV_HEADS, VALUE_DIM)
    cache = Int8Cache(torch.arange(2), tile)
    cache.write(key, value)
    error, bound = error_and_bound(cache.attend(query, 30, scale=0.05), query, key, value, scale=0.05)
    assert (error <= bound).all()
    cache.scales[role] = cache.scales[role].roll(1, 2 if tile else 1)
    error, bound = error_and_bound(cache.attend(query[1:], 30, scale=0.05), query[1:], key, value, scale=0.05)
    assert not (error <= bound).all()


def test_both_layouts_hold_the_same() -> None:
    torch.manual_seed(0)
    query, key, value = rows(20, HEADS, DIM), rows(20, KV_HEADS, DIM), rows(20, KV_HEADS, VALUE_DIM)
    results = []
    for tile in (0, TILE):
        cache = Int8Cache(torch.tensor([1, 0]), tile)
        cache.write(key, value)
        assert sum(int((codes != -128).sum()) for codes in cache.codes) == 20 * KV_HEADS * (DIM + VALUE_DIM)
        assert sum(int(scale.isfinite().sum()) for scale in cache.scales) == 2 * 20 * KV_HEADS
        results.append(cache.attend(query, 20, scale=0.1))
    assert torch.equal(*results)


def test_rows_that_are_zero_or_not_finite() -> None:
    """Zeros are kept exactly; an infinity makes NaN of what sees it, and of nothing before it."""
    torch.manual_seed(0)
    query, key, value = rows(6, HEADS, DIM), rows(6, KV_HEADS, DIM), rows(6, KV_HEADS, VALUE_DIM)
    value[:3] = 0
    key[4, 0, 2] = torch.inf
    cache = Int8Cache(torch.arange(1), TILE)
    cache.write(key, value)
    result = cache.attend(query, 6, scale=0.1)
    assert (result[:3] == 0).all() and result[3].isfinite().all()
    assert result[4:, : HEADS // 2].isnan().all() and result[4:, HEADS // 2 :].isfinite().all()
