"""Keys and values are kept as 8-bit integers, each of a token and a head with a scale of its own.

    write_kv(k, v, keys, values, slots)        ->  write_kv(k, v, keys, values, slots, key_scale=…, value_scale=…)
    y = paged_attention(q, keys, values, …)        y = paged_attention(q, keys, values, …, key_scale=…, value_scale=…)

Does nothing unless the option ``kv_cache_dtype`` is ``int8``. The caches become int8, and inputs beside them hold the
scales: a row of 64 channels takes 68 bytes, where bfloat16 takes 128. A layer that is switched off keeps its floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..codegen.model_graph import ModelGraph, value_of
from ..codegen.ops import paged_attention, write_kv
from ..codegen.ops.paged_attention import tile_of
from ..runtime.kv_pools import Pool
from .graph_pass import LOSSY, InputAdapter, Pass, PassContext


@dataclass(frozen=True)
class _Rounded:
    """A cache of codes, and the input that holds its scales."""

    cache: fx.Node
    scale: fx.Node
    pool: Pool


def run(model_graph: ModelGraph, context: PassContext) -> None:
    if context.config.kv_cache_dtype != "int8":
        return
    writes = {node.args[2]: node for node in model_graph.calls(write_kv.overload)}
    rounded: list[_Rounded] = []
    for node in model_graph.calls(paged_attention.overload):
        site = context.claim(node)
        if site is None:
            continue
        _, keys, values, *_ = node.args
        write = writes[keys]
        layer = _rounded_layer(model_graph, keys, values, node.kwargs["tile"])
        options = {"tile": layer[0].pool.tile, "key_scale": layer[0].scale, "value_scale": layer[1].scale}
        with model_graph.inserting_before(write) as emit:
            emit(write_kv, *write.args[:5], **options)
        model_graph.graph.erase_node(write)
        with model_graph.inserting_before(node) as emit:
            new = emit(paged_attention, *node.args, **{**node.kwargs, **options})
        context.replace(site, node, new)
        rounded += layer
    model_graph.eliminate_dead_code()
    context.input_adapter = _adapter(rounded)


def _rounded_layer(model_graph: ModelGraph, keys: fx.Node, values: fx.Node, tile: int) -> tuple[_Rounded, _Rounded]:
    """The caches of one layer with their new values, and inputs for their scales.

    Heads that are no whole words of codes lie in rows, which every definition reads and no kernel does.
    """
    key, value = value_of(keys), value_of(values)
    sizes = key.shape[0], key.shape[3 if tile else 1]
    num_heads, width = (key.shape[1], key.shape[2] * tile) if tile else key.shape[2:]
    new_tile = tile_of(torch.int8) if tile and width % tile_of(torch.int8) == 0 else 0
    layer = []
    for cache, pool in (
        (keys, Pool(num_heads, width, new_tile, True)),
        (values, Pool(num_heads, value.shape[3], new_tile, False)),
    ):
        with model_graph.fake_mode:
            cache.meta["val"] = torch.empty(pool.shape(*sizes), dtype=torch.int8, device=key.device)
            scale = torch.empty(pool.scale_shape(*sizes), dtype=torch.float32, device=key.device)
        layer.append(_Rounded(cache, model_graph.add_placeholder(f"{cache.name}_scale", scale), pool))
    return layer[0], layer[1]


def _adapter(rounded: list[_Rounded]) -> InputAdapter:
    """Inputs of a step with its caches in codes, all zero."""

    def adapt(inputs: Mapping[str, Any]) -> dict[str, Any]:
        adapted = dict(inputs)
        for each in rounded:
            old = inputs[each.cache.name]
            sizes = len(old), old[0].numel() // (each.pool.num_kv_heads * each.pool.width)
            adapted[each.cache.name] = torch.zeros(each.pool.shape(*sizes), dtype=torch.int8, device=old.device)
            adapted[each.scale.name] = torch.zeros(each.pool.scale_shape(*sizes), device=old.device)
        return adapted

    return adapt


QUANTIZE_KV_CACHE = Pass("quantize_kv_cache", run, LOSSY, after=("page_attention",), serving=True)
