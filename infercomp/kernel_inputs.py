"""What random values the inputs of a dumped kernel may take: indices stay in range, sums fit what they are sums of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from .codegen.grouping import is_weight_merge
from .codegen.model_graph import value_of
from .codegen.ops import paged_attention, write_kv
from .codegen.regions import is_inlined, named_arguments

_CACHES = ("key_cache", "value_cache", "key_scale", "value_scale")


class InputKinds:
    """Kinds of the ``leaves`` that the calls in ``body`` read; ``size`` writes an extent as text."""

    def __init__(self, body: Collection[fx.Node], leaves: Collection[fx.Node], size: Callable[[Any], str]) -> None:
        self._body, self._leaves, self._size = body, leaves, size

    def kind(self, leaf: fx.Node) -> tuple[str, str]:
        """The kind of ``kernel_check.Input`` that a leaf is, and its limit as text."""
        value = value_of(leaf)
        for node, given in self._calls():
            roles = {name for name, argument in given.items() if self._leaf(argument) is leaf}
            if roles & {"scale", "weight_scale", "key_scale", "value_scale"}:
                return "scale", "1"
            if "weight_indices" in roles:
                return "places", "1"
            if "weight_zero" in roles:
                return "index", "128"
            if "sums" in roles and (quantized := self._leaf(given["q"])) is not None:
                return "sums", repr(quantized.name)
            if node.target in (paged_attention.overload, write_kv.overload) and (found := self._step(given, roles)):
                return found
        if value.dtype in (torch.int8, torch.uint8):
            return "codes", "1"
        if value.dtype == torch.bool or value.is_floating_point():
            is_weight = (leaf.op == "placeholder" or is_weight_merge(leaf)) and value.dim() == 2
            return "normal", f"{self._size(value.shape[-1])} ** -0.5" if is_weight else "1"
        bounds = [self._size(value_of(table).shape[dim]) for _, table, dim in self._lookups()]
        return "index", f"min({', '.join(bounds)}, 2**31)" if bounds else "8"

    def _step(self, given: Mapping[str, Any], roles: set[str]) -> tuple[str, str] | None:
        blocks, block_size = (self._size(value_of(given["key_cache"]).shape[dim]) for dim in (0, 3))
        if "slot_mapping" in roles:
            return "slots", f"{blocks} * {block_size}"
        if "block_tables" in roles:
            return "index", blocks
        if "seq_lens" in roles:
            return "lengths", f"{self._size(value_of(given['block_tables']).shape[1])} * {block_size}"
        if "query_start_loc" in roles:
            return "starts", self._size(value_of(given["query"]).shape[0])
        return None

    def _calls(self, *targets: object) -> Iterator[tuple[fx.Node, dict[str, Any]]]:
        for node in self._body:
            if isinstance(node.target, torch._ops.OpOverload) and (not targets or node.target in targets):
                yield node, named_arguments(node)

    def _leaf(self, node: Any) -> fx.Node | None:
        """The input behind a chain of views."""
        while isinstance(node, fx.Node) and node not in self._leaves:
            if not is_inlined(node) or not node.all_input_nodes:
                return None
            node = node.all_input_nodes[0]
        return node if isinstance(node, fx.Node) else None

    def tables(self) -> set[fx.Node]:
        """Leaves of which only some rows are read."""
        found = {self._leaf(table) for _, table, _ in self._lookups()}
        found |= {self._leaf(given[n]) for _, given in self.caches() for n in _CACHES}
        return {node for node in found if node is not None}

    def caches(self) -> Iterator[tuple[fx.Node, dict[str, Any]]]:
        """Calls that read or write a paged cache, with their arguments."""
        return self._calls(paged_attention.overload, write_kv.overload)

    def _lookups(self) -> Iterator[tuple[Any, fx.Node, int]]:
        """Indices, the table that they index, and its dimension."""
        for _, given in self._calls():
            table, indices = given.get("weight", given.get("self")), given.get("indices")
            if isinstance(indices, (list, tuple)):
                yield from ((index, table, dim) for dim, index in enumerate(indices) if index is not None)
            elif indices is not None:
                yield indices, table, 0
            elif isinstance(given.get("index"), fx.Node):
                yield given["index"], table, given["dim"]
