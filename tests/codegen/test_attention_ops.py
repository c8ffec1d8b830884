"""attention and paged_attention against one reference in plain loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infercomp.codegen.ops import attention, paged_attention


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    *,
    scale: float,
    sliding_window: int | None = None,
    logit_softcap: float | None = None,
    is_causal: bool = False,
) -> np.ndarray:
    """One score at a time; the last query stands at the last key."""
    batch, heads, queries, _ = query.shape
    groups, keys = heads // key.shape[1], key.shape[2]
    full_bias = None if bias is None else bias.expand(batch, heads, queries, keys)
    result = np.zeros((batch, heads, queries, value.shape[-1]))
    for b, h, i in np.ndindex(batch, heads, queries):
        position = i + keys - queries
        weights, total = {}, 0.0 if sinks is None else math.exp(float(sinks[h]))
        for j in range(keys):
            hidden = (is_causal and j > position) or (sliding_window is not None and position - j >= sliding_window)
            added = 0.0 if full_bias is None else full_bias[b, h, i, j].item()
            if hidden or added is False or added == -math.inf:
                continue
            score = float(query[b, h, i] @ key[b, h // groups, j]) * scale
            if logit_softcap is not None:
                score = logit_softcap * math.tanh(score / logit_softcap)
            score += 0.0 if added is True else added
            score += 0.0 if alibi_slopes is None else float(alibi_slopes[h]) * (j - position)
            weights[j] = math.exp(score)
            total += weights[j]
        for j, weight in weights.items():
            result[b, h, i] += weight / total * value[b, h // groups, j].numpy()
    return result


def _tensors(queries: int = 4, keys: int = 6, heads: int = 4, kv_heads: int = 2) -> list[torch.Tensor]:
    return [_random(2, heads, queries, 8), _random(2, kv_heads, keys, 8), _random(2, kv_heads, keys, 3)]


def _options() -> dict[str, dict[str, Any]]:
    seen = torch.rand(2, 1, 4, 6) > 0.4
    return {
        "plain": {},
        "causal": {"is_causal": True},
        "window": {"is_causal": True, "sliding_window": 2},
        "window of one": {"is_causal": True, "sliding_window": 1},
        "window without causal": {"sliding_window": 2},
        "softcap": {"logit_softcap": 0.5, "is_causal": True},
        "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 1.0]), "is_causal": True},
        "alibi without causal": {"alibi_slopes": _random(4)},
        "sinks": {"sinks": _random(4)},
        "causal sinks": {"sinks": _random(4), "is_causal": True},
        "float bias": {"bias": _random(2, 4, 4, 6)},
        "float bias of a row": {"bias": _random(6)},
        "bool bias": {"bias": seen},
        "infinite bias": {"bias": torch.zeros(2, 1, 4, 6).masked_fill(~seen, -torch.inf)},
        "everything": {
            "bias": _random(1, 4, 4, 6),
            "alibi_slopes": _random(4),
            "sinks": _random(4),
            "is_causal": True,
            "sliding_window": 3,
            "logit_softcap": 2.0,
        },
    }


@pytest.mark.parametrize("name", _options())
def test_attention_against_loops(name: str) -> None:
    tensors, options = _tensors(), _options()[name]
    found = attention(*tensors, **options, scale=0.4)
    np.testing.assert_allclose(found, _reference(*tensors, **options, scale=0.4), rtol=1e-11, atol=1e-13)


@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 4), st.booleans(), st.integers(1, 5))
def test_attention_of_any_sizes(
    kv_heads: int, groups: int, queries: int, cached: int, is_causal: bool, window: int
) -> None:
    tensors = _tensors(queries, queries + cached, kv_heads * groups, kv_heads)
    options: dict[str, Any] = {"scale": 0.4, "is_causal": is_causal, "sliding_window": window if is_causal else None}
    np.testing.assert_allclose(attention(*tensors, **options), _reference(*tensors, **options), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("bias", [torch.zeros(4, 6, dtype=torch.bool), torch.full((4, 6), -torch.inf)])
def test_row_that_sees_nothing_is_zero(bias: torch.Tensor) -> None:
    bias = bias.clone()
    bias[1] = True if bias.dtype == torch.bool else 0.0
    found = attention(*_tensors(), bias, scale=0.4)
    assert (found[:, :, [0, 2, 3]] == 0).all()
    assert (found[:, :, 1] != 0).all()


def test_more_queries_than_keys_leave_the_first_rows_without_a_key() -> None:
    found = attention(*_tensors(queries=6, keys=4), scale=0.4, is_causal=True)
    assert (found[:, :, :2] == 0).all()
    assert torch.isfinite(found).all()


def test_last_query_stands_at_the_last_key() -> None:
    query, key, value = _tensors(queries=6, keys=6)
    whole = attention(query, key, value, scale=0.4, is_causal=True)
    last = attention(query[:, :, -2:], key, value, scale=0.4, is_causal=True)
    torch.testing.assert_close(last, whole[:, :, -2:], rtol=1e-12, atol=0)


def test_attention_equals_torchs_own() -> None:
    query, key, value = _tensors(queries=6, keys=6)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attention(query, key, value, scale=8**-0.5, is_causal=True), expected)


def test_attention_in_bfloat16_rounds_once() -> None:
    tensors = [each.bfloat16() for each in _tensors()]
    exact = attention(*(each.double() for each in tensors), scale=0.4, is_causal=True)
    found = attention(*tensors, scale=0.4, is_causal=True)
    assert found.dtype == torch.bfloat16
    assert ((found.double() - exact).abs() <= exact.abs() * 2**-8 * 1.01).all()


BLOCK_SIZE = 4


def _paged(
    keys: list[torch.Tensor], values: list[torch.Tensor], order: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Caches that hold each sequence in blocks taken from ``order``; what no sequence wrote is NaN."""
    num_blocks = len(order)
    key_cache = torch.full((num_blocks, BLOCK_SIZE, *keys[0].shape[1:]), torch.nan, dtype=torch.float64)
    value_cache = torch.full((num_blocks, BLOCK_SIZE, *values[0].shape[1:]), torch.nan, dtype=torch.float64)
    needed = [-(-len(key) // BLOCK_SIZE) for key in keys]
    table = torch.full((len(keys), max(needed)), order[-1], dtype=torch.int32)
    free = iter(order)
    for sequence, (key, value) in enumerate(zip(keys, values, strict=True)):
        for number in range(needed[sequence]):
            block = table[sequence, number] = next(free)
            part = slice(number * BLOCK_SIZE, (number + 1) * BLOCK_SIZE)
            key_cache[block, : len(key[part])] = key[part]
            value_cache[block, : len(value[part])] = value[part]
    return key_cache, value_cache, table


_SEQUENCES = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)), min_size=1, max_size=4)
_VARIANTS = st.sampled_from(["plain", "window", "softcap", "alibi", "sinks"])


@settings(max_examples=40)
@given(_SEQUENCES, _VARIANTS, st.randoms(use_true_random=False))
def test_paged_attention_is_attention_of_each_sequence(
    sequences: list[tuple[int, int]], variant: str, random: Any
) -> None:
    """Lengths are ragged, blocks shuffled, and every slot that is not a sequence's own is poisoned."""
    keys = [_random(cached + new, 2, 8) for cached, new in sequences]
    values = [_random(cached + new, 2, 3) for cached, new in sequences]
    queries = [_random(new, 4, 8) for _, new in sequences]
    order = list(range(sum(-(-len(key) // BLOCK_SIZE) for key in keys) + 2))
    random.shuffle(order)
    key_cache, value_cache, table = _paged(keys, values, order)
    starts = torch.tensor([0, *np.cumsum([new for _, new in sequences])], dtype=torch.int32)
    lengths = torch.tensor([len(key) for key in keys], dtype=torch.int32)
    options: dict[str, Any] = {
        "plain": {},
        "window": {"sliding_window": 3},
        "softcap": {"logit_softcap": 0.7},
        "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 1.0])},
        "sinks": {"sinks": _random(4)},
    }[variant]
    found = paged_attention(torch.cat(queries), key_cache, value_cache, table, lengths, starts, scale=0.4, **options)
    for number, (query, key, value) in enumerate(zip(queries, keys, values, strict=True)):
        expected = _reference(
            *(each.transpose(0, 1)[None] for each in (query, key, value)), scale=0.4, is_causal=True, **options
        )
        rows = found[starts[number] : starts[number + 1]]
        np.testing.assert_allclose(rows.transpose(0, 1).numpy(), expected[0], rtol=1e-10, atol=1e-12)


def test_paged_attention_of_a_sequence_does_not_depend_on_its_neighbours() -> None:
    keys, values = [_random(7, 2, 8), _random(5, 2, 8)], [_random(7, 2, 3), _random(5, 2, 3)]
    queries = [_random(3, 4, 8), _random(1, 4, 8)]
    key_cache, value_cache, table = _paged(keys, values, [2, 0, 3, 1, 4])
    lengths, starts = torch.tensor([7, 5]), torch.tensor([0, 3, 4])
    both = paged_attention(torch.cat(queries), key_cache, value_cache, table, lengths, starts, scale=0.4)
    alone = paged_attention(queries[1], key_cache, value_cache, table[1:], lengths[1:], torch.tensor([0, 1]), scale=0.4)
    assert torch.equal(both[3:], alone)
