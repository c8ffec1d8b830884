"""Attention over a paged KV cache, and writing to it.

A cache lies in rows, keys [blocks, block_size, Hkv, D] and values [blocks, block_size, Hkv, Dv], or with a ``tile`` of
x in words of x numbers, which CPU kernels read without shuffles: [blocks, Hkv, D/x, block_size, x] and
[blocks, Hkv, block_size/x, Dv, x].

Where it holds int8, each key and each value of one token and one head is a row of codes with one float32 scale (per
token and head, as in vLLM's int8 caches): ``row = code * scale``. Scales are [blocks, block_size, Hkv], or tiled
[blocks, Hkv, block_size]. Rows are rounded as quantize_per_token rounds them, so an element errs by at most half a
scale. Scales of 16 bits would save 2 bytes of 68 at D = 64 and want a rounding of their own; float32 has its range.
"""

from __future__ import annotations

import torch

from .attention import ATTENTION_OPTIONS, attention
from .op import compute_dtype, op
from .quantized import nearest_int8

_SCALES = "Tensor{key}? key_scale=None, Tensor{value}? value_scale=None"


def tile_of(dtype: torch.dtype) -> int:
    """Values of ``dtype`` that lie side by side in a tiled cache: as many as 32 bits hold."""
    return max(1, 4 // dtype.itemsize)


def _gathered(cache: torch.Tensor, blocks: torch.Tensor, length: int, tile: int, is_key: bool) -> torch.Tensor:
    """The first ``length`` positions in ``blocks`` of a cache of either layout: [Hkv, length, D]."""
    found = cache[blocks]
    if tile and is_key:  # [blocks, Hkv, D / tile, block_size, tile]
        found = found.permute(0, 3, 1, 2, 4).flatten(3)
    elif tile:  # [blocks, Hkv, block_size / tile, D, tile]
        found = found.permute(0, 2, 4, 1, 3).flatten(1, 2)
    return found.flatten(0, 1)[:length].transpose(0, 1)


def _gathered_scale(scale: torch.Tensor, blocks: torch.Tensor, length: int, tile: int) -> torch.Tensor:
    """The scales of the same positions: [Hkv, length, 1]."""
    found = scale[blocks].transpose(1, 2) if tile else scale[blocks]
    return found.flatten(0, 1)[:length].transpose(0, 1)[..., None]


def _fake_paged_attention(query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, *_, **__):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape[0], query.shape[1], value_cache.shape[3])


@op(
    "paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables, Tensor seq_lens,"
    f" Tensor query_start_loc, Tensor? alibi_slopes=None, Tensor? sinks=None, *, {ATTENTION_OPTIONS}, int tile=0,"
    f" {_SCALES.format(key='', value='')}) -> Tensor",
    fake=_fake_paged_attention,
)
def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    *,
    scale: float,
    sliding_window: int | None = None,
    logit_softcap: float | None = None,
    tile: int = 0,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of packed queries over a paged cache (Kwon et al. 2023): [T, H, D] -> [T, H, Dv].

    The caches already hold this step's tokens; those of int8 come with ``key_scale`` and ``value_scale``. Sequence b
    owns query rows ``query_start_loc[b]:query_start_loc[b+1]``, its newest ``seq_lens[b]`` positions lie in
    ``block_tables[b]``. Each sequence is computed alone.
    """
    block_size = key_cache.shape[3 if tile else 1]
    output = query.new_empty(query.shape[0], query.shape[1], value_cache.shape[3])
    dtype = compute_dtype(query)
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    for sequence, length in enumerate(lengths):
        first, last = starts[sequence], starts[sequence + 1]
        blocks = block_tables[sequence, : -(-length // block_size)]
        key = _gathered(key_cache, blocks, length, tile, is_key=True)
        value = _gathered(value_cache, blocks, length, tile, is_key=False)
        if key_scale is not None and value_scale is not None:
            key = key.to(dtype) * _gathered_scale(key_scale, blocks, length, tile).to(dtype)
            value = value.to(dtype) * _gathered_scale(value_scale, blocks, length, tile).to(dtype)
        output[first:last] = attention.definition(
            query[first:last].transpose(0, 1)[None],
            key[None],
            value[None],
            None,
            alibi_slopes,
            sinks,
            scale=scale,
            sliding_window=sliding_window,
            logit_softcap=logit_softcap,
            is_causal=True,
        )[0].transpose(0, 1)
    return output


def _rounded(
    rows: torch.Tensor, scale: torch.Tensor | None, slots: torch.Tensor, block_size: int, tile: int
) -> torch.Tensor:
    """``rows`` [T, Hkv, D] as the cache holds them; where those are codes, their scales go into their slots."""
    if scale is None:
        return rows
    codes, steps = nearest_int8(rows)
    if tile:
        scale[slots // block_size, :, slots % block_size] = steps[..., 0].to(scale.dtype)
    else:
        scale.view(-1, scale.shape[2]).index_copy_(0, slots, steps[..., 0].to(scale.dtype))
    return codes


@op(
    "write_kv(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slot_mapping,"
    f" int tile=0, *, {_SCALES.format(key='(c!)', value='(d!)')}) -> ()",
    fake=lambda *_, **__: None,
)
def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    tile: int = 0,
    *,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
) -> None:
    """Write key [T, Hkv, D] and value [T, Hkv, Dv] into the slots [T] (block * block_size + offset) of the cache.

    With ``key_scale`` and ``value_scale`` the caches are int8: rows are rounded as quantize_per_token does it.
    """
    block_size = key_cache.shape[3 if tile else 1]
    key = _rounded(key, key_scale, slot_mapping, block_size, tile)
    value = _rounded(value, value_scale, slot_mapping, block_size, tile)
    if tile:
        blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
        key_cache[blocks, :, :, offsets] = key.unflatten(-1, (-1, tile))
        value_cache[blocks, :, offsets // tile, :, offsets % tile] = value
        return
    key_cache.view(-1, *key_cache.shape[2:]).index_copy_(0, slot_mapping, key)
    value_cache.view(-1, *value_cache.shape[2:]).index_copy_(0, slot_mapping, value)
