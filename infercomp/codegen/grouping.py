"""Which graph nodes become one kernel, and what each kernel is: the first half of lowering.

A fusion pass marks nodes with ``meta["kernel"]``; nodes of one mark are one group, every other call is a
group of its own. A group that no kernel takes is taken apart, and a single call that none takes runs
as its ATen op (or its definition), with the reason kept.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import sympy
from torch import fx

from .attention_regions import build_attention, build_paged_attention, build_write_kv
from .lazy_tensor import Refused
from .matmul_regions import NotRowMajor, build_matmul, linear_of
from .model_graph import ModelGraph, value_of
from .ops import attention, merge_weights, paged_attention, write_kv
from .regions import PackedWeight, Region, Source, build_loop, is_inlined, is_tensor, signature
from .specs import KernelSpec
from .triton.emit_specs import emit_spec


@dataclass
class Group:
    """Nodes computed by one kernel: ``results`` are stored, ``sources`` read, ``symbols`` behind n0, n1 …"""

    nodes: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]
    spec: KernelSpec
    sources: tuple[Source, ...]
    symbols: tuple[sympy.Symbol, ...]

    @property
    def operands(self) -> tuple[Source, ...]:
        """What the spec's buffers stand for."""
        return (*self.sources, *self.results)


@dataclass
class Plan:
    """What runs how: groups with a kernel, calls without one and why, and reasons of groups taken apart."""

    groups: list[Group] = field(default_factory=list)
    refused: dict[fx.Node, str] = field(default_factory=dict)
    taken_apart: list[tuple[tuple[fx.Node, ...], str]] = field(default_factory=list)


def is_weight_merge(node: fx.Node) -> bool:
    return node.target == merge_weights.overload


def is_computed(node: fx.Node) -> bool:
    """Whether a node does work at run time: no placeholder, view, constant, size or merge of weights."""
    if node.op != "call_function" or is_inlined(node) or is_weight_merge(node):
        return False
    return is_tensor(node) or (not isinstance(value_of(node), (int, float, bool)) and not _is_size(node))


def _is_size(node: fx.Node) -> bool:
    return hasattr(value_of(node), "node") and not is_tensor(node)


@dataclass(frozen=True)
class _Built:
    """A spec, its sources by their place in the region's signature, and the graph's symbols behind its sizes."""

    spec: KernelSpec
    source_numbers: tuple[object, ...]
    symbols: tuple[sympy.Symbol, ...]


class Planner:
    """Plans one graph for kernels in "cpp" or "triton"; equal regions are built once."""

    def __init__(self, model_graph: ModelGraph, language: str = "cpp") -> None:
        self._model_graph = model_graph
        self._language = language
        self._nodes = [node for node in model_graph.graph.nodes if is_computed(node)]
        self._order = {node: i for i, node in enumerate(model_graph.graph.nodes)}
        self._built: dict[object, _Built] = {}
        self._stored_views: set[fx.Node] = set()

    def plan(self) -> Plan:
        while True:
            try:
                return self._attempt()
            except NotRowMajor as error:
                if error.node in self._stored_views:
                    raise AssertionError(f"{error.node} is stored and still not row-major") from error
                self._stored_views.add(error.node)

    def _attempt(self) -> Plan:
        plan = Plan()
        for nodes in self._initial_groups():
            self._place(nodes, plan)
        plan.groups.sort(key=lambda group: self._order[group.nodes[-1]])
        return plan

    def _initial_groups(self) -> Iterable[list[fx.Node]]:
        marked: dict[object, list[fx.Node]] = {}
        for node in sorted([*self._nodes, *self._stored_views], key=self._order.__getitem__):
            marked.setdefault(self._mark(node), []).append(node)
        return marked.values()

    def _mark(self, node: fx.Node) -> object:
        if node.target is operator.getitem:
            return self._mark(node.args[0])  # type: ignore[arg-type]
        return node.meta.get("kernel", node.name)

    def _place(self, nodes: list[fx.Node], plan: Plan) -> None:
        try:
            plan.groups.append(self._group(nodes))
        except Refused as refusal:
            if isinstance(refusal, NotRowMajor) and is_inlined(refusal.node):
                raise
            self._take_apart(nodes, str(refusal), plan)

    def _take_apart(self, nodes: list[fx.Node], reason: str, plan: Plan) -> None:
        parts = self._parts(nodes)
        if len(parts) == 1:
            plan.refused.update(dict.fromkeys(nodes, reason))
            return
        plan.taken_apart.append((tuple(nodes), reason))
        for part in parts:
            self._place(part, plan)

    def _parts(self, nodes: list[fx.Node]) -> list[list[fx.Node]]:
        """Single calls, a call of several results together with those."""
        parts: dict[fx.Node, list[fx.Node]] = {}
        for node in nodes:
            base = node.args[0] if node.target is operator.getitem else node
            parts.setdefault(base, []).append(node)  # type: ignore[arg-type]
        return list(parts.values())

    def _group(self, nodes: list[fx.Node]) -> Group:
        results = tuple(node for node in nodes if is_tensor(node) and self._is_read_outside(node, set(nodes)))
        key, order = signature(nodes, results, self._is_stored)
        built = self._built.get(key)
        if built is None:
            region = Region(nodes, self._is_stored, self._language)
            spec = self._build(region, nodes, results)
            self._require_weights(region)
            if self._language == "triton":
                emit_spec(spec, "kernel")  # refuses what has no text
            numbers = tuple(_numbered(source, order) for source in region.sources)
            built = self._built[key] = _Built(spec, numbers, region.symbols)
        sources = tuple(_renumbered(number, order) for number in built.source_numbers)
        return Group(tuple(nodes), results, built.spec, sources, built.symbols)

    def _build(self, region: Region, nodes: list[fx.Node], results: tuple[fx.Node, ...]) -> KernelSpec:
        targets = {node.target for node in nodes}
        if paged_attention.overload in targets:
            return build_paged_attention(region, nodes, results)
        if attention.overload in targets:
            return build_attention(region, nodes, results)
        if write_kv.overload in targets:
            return build_write_kv(region, nodes, results)
        if not results:
            raise Refused("nothing reads it")
        linear = linear_of(nodes)
        if linear is None:
            return build_loop(region, results)
        # A graph that owns its weights packs them; a caller's stay in place, where a change by the caller is seen.
        return build_matmul(region, linear, results, packs_floats=self._model_graph.frozen)

    def _require_weights(self, region: Region) -> None:
        parts = (part for source in region.sources if isinstance(source, PackedWeight) for part in source.parts)
        if not all(is_weight_merge(part) or self._model_graph.is_weight(part) for part in parts):
            raise Refused("its weight is computed or given by the caller, not a parameter")

    def _is_stored(self, node: fx.Node) -> bool:
        return node in self._stored_views

    def _is_read_outside(self, node: fx.Node, inside: set[fx.Node]) -> bool:
        pending, seen = [node], set()
        while pending:
            current = pending.pop()
            for user in current.users:
                if user in seen or user in inside:
                    continue
                seen.add(user)
                if is_inlined(user) and not self._is_stored(user):
                    pending.append(user)
                else:
                    return True
        return False


def _numbered(source: Source, order: tuple[fx.Node, ...]) -> object:
    if isinstance(source, PackedWeight):
        return replace(source, parts=tuple(order.index(part) for part in source.parts))  # type: ignore[arg-type]
    return order.index(source)


def _renumbered(number: object, order: tuple[fx.Node, ...]) -> Source:
    if isinstance(number, PackedWeight):
        return replace(number, parts=tuple(order[position] for position in number.parts))  # type: ignore[index]
    return order[number]  # type: ignore[call-overload,no-any-return]
