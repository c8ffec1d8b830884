"""From attention, paged attention and cache writes to their specs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from .indexing import LoopVariable, affine, flatten, floor_div, modulo, product
from .lazy_tensor import LazyTensor, Refused, Shape
from .matmul_regions import NotRowMajor
from .model_graph import value_of
from .ops import write_kv
from .ops.paged_attention import tile_of
from .regions import Region, buffers_of, column_variable, named_arguments, row_variable
from .row_ops import nearest_int8
from .specs import AttentionSpec, Buffer, LoopSpec, PagedAttentionSpec, Store
from .view_ops import as_position


def strided(region: Region, node: fx.Node) -> tuple[sympy.Expr, tuple[sympy.Expr, ...]]:
    """Offset and strides of a view of one buffer whose last dimension is contiguous; else NotRowMajor."""
    tensor = region.tensor(node)
    variables = [LoopVariable(f"d{dim}", extent) for dim, extent in enumerate(tensor.shape)]
    index = [v if extent != 1 else sympy.Integer(0) for v, extent in zip(variables, tensor.shape, strict=True)]
    element = tensor.at(index)
    found = affine(element.payload[1], variables) if element.op == "load" else None  # type: ignore[index]
    if found is None or (tensor.shape[-1] != 1 and found[1][-1] != 1):
        raise NotRowMajor(node)
    is_plain = not any(isinstance(part, sympy.Function) for part in sympy.preorder_traversal(element.payload[1]))  # type: ignore[index]
    if not is_plain or element.payload[2] != tensor.dtype:  # type: ignore[index]
        raise NotRowMajor(node)
    return found


def _float_row(region: Region, node: fx.Node | None) -> str | None:
    """The buffer of a float32 vector, or None."""
    if node is None:
        return None
    if value_of(node).dtype != torch.float32:
        raise Refused(f"slopes or sinks of {value_of(node).dtype}")
    offset, strides = strided(region, node)
    if offset != 0 or (strides != (1,) and value_of(node).shape[0] != 1):
        raise NotRowMajor(node)
    return _buffer_of(region, node)


def _buffer_of(region: Region, node: fx.Node) -> str:
    tensor = region.tensor(node)
    return str(tensor.at([sympy.Integer(0)] * tensor.dim).payload[0])  # type: ignore[index]


def _extent(value: sympy.Expr, what: str) -> int:
    if not value.is_Integer:
        raise Refused(f"{what} is not known when compiling")
    return int(value)


def _only(nodes: Sequence[fx.Node]) -> fx.Node:
    if len(nodes) != 1:
        raise Refused("nothing is computed in the kernel of an attention but the attention")
    return nodes[0]


def build_paged_attention(region: Region, nodes: Sequence[fx.Node], results: Sequence[fx.Node]) -> PagedAttentionSpec:
    node = _only(nodes)
    given = named_arguments(node)
    dtype = value_of(node).dtype
    if dtype not in (torch.float32, torch.bfloat16):
        raise Refused(f"no attention kernel for {dtype}")
    scales = _scales(given)
    if scales and region.language == "triton":
        raise Refused("the cache is int8, which only the C++ kernels read")
    _require_layout(region, given["tile"], tile_of(value_of(given["key_cache"]).dtype))
    query = region.tensor(given["query"])
    offset, strides = strided(region, given["query"])
    tokens, num_heads, head_dim = query.shape
    for name in ("key_cache", "value_cache", "block_tables", "seq_lens", "query_start_loc", *scales):
        region.tensor(given[name])
        region.source_name(given[name])
    key_cache, value_cache = (region.shape(given[name]) for name in ("key_cache", "value_cache"))
    table = region.shape(given["block_tables"])
    heads_dim, positions_dim = (1, 3) if given["tile"] else (2, 1)
    slopes, sinks = _float_row(region, given["alibi_slopes"]), _float_row(region, given["sinks"])
    return PagedAttentionSpec(
        buffers_of(region, results),
        tokens,
        table[0],
        table[1],
        key_cache[positions_dim],
        _extent(num_heads, "the number of heads"),
        _extent(key_cache[heads_dim], "the number of key heads"),
        _extent(head_dim, "the head size"),
        _extent(value_cache[3], "the head size"),
        offset,
        (strides[0], strides[1]),
        given["scale"],
        given["sliding_window"],
        given["logit_softcap"],
        slopes,
        sinks,
    )


def _scales(given: Mapping[str, Any]) -> tuple[str, ...]:
    """The arguments that only an int8 cache has."""
    return ("key_scale", "value_scale") if given["key_scale"] is not None else ()


def _require_layout(region: Region, tile: int, wanted_tile: int) -> None:
    if region.language == "triton" and tile:
        raise Refused("the cache is tiled, which only the C++ kernels read")
    if region.language == "cpp" and tile != wanted_tile:
        raise Refused(f"the cache is not tiled: block_size must be a multiple of 16, the head size of {wanted_tile}")


def build_attention(region: Region, nodes: Sequence[fx.Node], results: Sequence[fx.Node]) -> AttentionSpec:
    node = _only(nodes)
    given = named_arguments(node)
    dtype = value_of(node).dtype
    if dtype not in (torch.float32, torch.bfloat16):
        raise Refused(f"no attention kernel for {dtype}")
    views = {name: (region.tensor(given[name]), *strided(region, given[name])) for name in ("query", "key", "value")}
    names = (_buffer_of(region, given["query"]), _buffer_of(region, given["key"]), _buffer_of(region, given["value"]))
    bias = _bias(region, given["bias"])
    slopes, sinks = _float_row(region, given["alibi_slopes"]), _float_row(region, given["sinks"])
    (query, *_), (key, *_), (value, *_) = views.values()
    return AttentionSpec(
        buffers_of(region, results),
        names,
        tuple(offset for _, offset, _ in views.values()),
        tuple(tuple(strides[:3]) for _, _, strides in views.values()),
        (query.shape[0], query.shape[2], key.shape[2]),
        _extent(query.shape[1], "the number of heads"),
        _extent(key.shape[1], "the number of key heads"),
        _extent(query.shape[3], "the head size"),
        _extent(value.shape[3], "the head size"),
        bias,
        given["scale"],
        given["is_causal"],
        given["sliding_window"],
        given["logit_softcap"],
        slopes,
        sinks,
    )


def _bias(region: Region, node: fx.Node | None) -> tuple[str, torch.dtype, sympy.Expr, Shape] | None:
    """A mask's buffer, dtype, offset and strides over [B, H, Sq, Skv], 0 where it is broadcast."""
    if node is None:
        return None
    tensor = region.tensor(node)
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.bool):
        raise Refused(f"a mask of {tensor.dtype}")
    offset, strides = _strides_of_any(region, node, tensor)
    if region.language == "cpp" and strides and strides[-1] not in (0, 1):
        # The C++ kernel adds whole registers of a row; T5 makes its mask with the heads innermost.
        raise NotRowMajor(node)
    padded = (*[sympy.Integer(0)] * (4 - tensor.dim), *strides)
    return _buffer_of(region, node), tensor.dtype, offset, padded


def _strides_of_any(region: Region, node: fx.Node, tensor: LazyTensor) -> tuple[sympy.Expr, Shape]:
    variables = [LoopVariable(f"d{dim}", extent) for dim, extent in enumerate(tensor.shape)]
    index = [v if extent != 1 else sympy.Integer(0) for v, extent in zip(variables, tensor.shape, strict=True)]
    element = tensor.at(index)
    found = affine(element.payload[1], variables) if element.op == "load" else None  # type: ignore[index]
    if found is None or element.payload[2] != tensor.dtype:  # type: ignore[index]
        raise NotRowMajor(node)
    return found


def build_write_kv(region: Region, nodes: Sequence[fx.Node], results: Sequence[fx.Node]) -> LoopSpec:
    """A loop over tokens and heads that scatters into the caches, whatever computes the keys inside of it."""
    node = next(node for node in nodes if node.target == write_kv.overload)
    given = named_arguments(node)
    if results or node is not nodes[-1]:
        raise Refused("the keys that are written are also read elsewhere")
    tile, scales = given["tile"], _scales(given)
    _require_layout(region, tile, tile or tile_of(value_of(given["key_cache"]).dtype))
    key, value = region.tensor(given["key"]), region.tensor(given["value"])
    row, index = row_variable(key.shape[:-1])
    block_size = region.shape(given["key_cache"])[3 if tile else 1]
    num_slots = product((region.shape(given["key_cache"])[0], block_size))
    slot = as_position(region.tensor(given["slot_mapping"]).at(index[:1]), num_slots)
    stores = []
    for rows, role in ((key, "key"), (value, "value")):
        if scales:
            rows, steps = nearest_int8(rows)
            stores.append(_scale_store(region, given[f"{role}_scale"], steps, index, slot, block_size, tile))
        cache = given[f"{role}_cache"]
        stores.append(_cache_store(region, cache, rows, index, slot, block_size, tile, is_key=role == "key"))
    written = {region.source_name(given[name]) for name in ("key_cache", "value_cache", *scales)}
    buffers = tuple(Buffer(b.name, b.dtype, b.name in written) for b in buffers_of(region, ()))
    return LoopSpec(buffers, row, tuple(stores))


def _scale_store(
    region: Region,
    cache: fx.Node,
    steps: LazyTensor,
    index: tuple[sympy.Expr, ...],
    slot: sympy.Expr,
    block_size: sympy.Expr,
    tile: int,
) -> Store:
    column, position = column_variable(steps.shape[-1])
    place = flatten((slot, index[1]), (slot, steps.shape[1]))
    if tile:
        block, offset = floor_div(slot, block_size), modulo(slot, block_size)
        place = sympy.expand((block * steps.shape[1] + index[1]) * block_size + offset)
    return Store(region.source_name(cache), column, place, steps.at((*index, position)))


def _cache_store(
    region: Region,
    cache: fx.Node,
    rows: LazyTensor,
    index: tuple[sympy.Expr, ...],
    slot: sympy.Expr,
    block_size: sympy.Expr,
    tile: int,
    *,
    is_key: bool,
) -> Store:
    column, channel = column_variable(rows.shape[-1])
    if not tile:
        place = flatten((slot, index[1], channel), (slot, *rows.shape[1:]))
        return Store(region.source_name(cache), column, place, rows.at((*index, channel)))
    block, offset = floor_div(slot, block_size), modulo(slot, block_size)
    extent = rows.shape[-1]
    inside = (channel, offset) if is_key else (offset, channel)
    width = block_size if is_key else extent
    position = floor_div(inside[0], sympy.Integer(tile)) * width * tile + inside[1] * tile
    position += modulo(inside[0], sympy.Integer(tile))
    head = (block * rows.shape[1] + index[1]) * block_size * extent
    return Store(region.source_name(cache), column, sympy.expand(head + position), rows.at((*index, channel)))
