"""Segments and buffers: the second half of lowering.

Groups that do not wait for a call outside of our kernels run together as one native step. Inside it,
groups that do not depend on each other share a phase, and values that do not leave it share an arena
of slots, each reused once its last reader's phase is over.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeAlias

import networkx as nx
import sympy
from torch import fx

from .grouping import Group, Plan
from .indexing import product, size_expr
from .model_graph import mutates, value_of

Item: TypeAlias = Group | fx.Node


@dataclass
class Segment:
    """Groups of one native step with their phases."""

    groups: list[Group] = field(default_factory=list)
    phases: dict[int, int] = field(default_factory=dict)  # id of the group -> phase


@dataclass(frozen=True)
class Slot:
    """A piece of the arena: the bytes that the largest of its tenants needs, as an expression of the sizes."""

    num_bytes: sympy.Expr


def dependencies(graph: fx.Graph, plan: Plan) -> nx.DiGraph:
    """Groups and calls that run outside of kernels, with an edge wherever one must wait for another.

    Items are named by position in ``items_of``.
    """
    items = items_of(plan)
    producer = {node: i for i, item in enumerate(items) for node in _nodes_of(item)}
    order = {node: i for i, node in enumerate(graph.nodes)}
    dag = nx.DiGraph()
    dag.add_nodes_from(range(len(items)))
    for i, item in enumerate(items):
        for source in _read_by(item, producer):
            if producer[source] != i:
                dag.add_edge(producer[source], i)
    _order_mutations(graph, items, producer, order, dag)
    return dag


def items_of(plan: Plan) -> list[Item]:
    return [*plan.groups, *plan.refused]


def _nodes_of(item: Item) -> tuple[fx.Node, ...]:
    return (item,) if isinstance(item, fx.Node) else item.nodes


def _read_by(item: Item, producer: dict[fx.Node, int]) -> Iterable[fx.Node]:
    """The computed nodes that an item reads, through views."""
    pending = [source for node in _nodes_of(item) for source in node.all_input_nodes]
    seen: set[fx.Node] = set()
    while pending:
        source = pending.pop()
        if source in seen:
            continue
        seen.add(source)
        if source in producer:
            yield source
        else:
            pending.extend(source.all_input_nodes)


def _order_mutations(
    graph: fx.Graph, items: list[Item], producer: dict[fx.Node, int], order: dict[fx.Node, int], dag: nx.DiGraph
) -> None:
    """Calls on an input that some call changes keep their order around the changes."""
    for placeholder in (node for node in graph.nodes if node.op == "placeholder"):
        users = sorted((user for user in placeholder.users if user in producer), key=order.__getitem__)
        if not any(mutates(user) for user in users):
            continue
        for earlier, later in pairwise(users):
            if (mutates(earlier) or mutates(later)) and producer[earlier] != producer[later]:
                dag.add_edge(producer[earlier], producer[later])


def schedule(plan: Plan, dag: nx.DiGraph) -> list[Segment | fx.Node]:
    """Native segments as long as possible, and the calls between them."""
    items = items_of(plan)
    waiting = {i: dag.in_degree(i) for i in range(len(items))}
    ready = sorted(i for i, count in waiting.items() if count == 0)
    result: list[Segment | fx.Node] = []
    while ready:
        kernels = [i for i in ready if isinstance(items[i], Group)]
        if kernels:
            result.append(_segment(items, dag, waiting, ready))
            continue
        for i in list(ready):
            result.append(items[i])  # type: ignore[arg-type]
            _finish(i, dag, waiting, ready)
    return result


def _segment(items: list[Item], dag: nx.DiGraph, waiting: dict[int, int], ready: list[int]) -> Segment:
    segment = Segment()
    phase_of: dict[int, int] = {}
    while kernels := [i for i in ready if isinstance(items[i], Group)]:
        for i in kernels:
            before = [phase_of[j] for j in dag.predecessors(i) if j in phase_of]
            phase_of[i] = 1 + max(before, default=-1)
            segment.groups.append(items[i])  # type: ignore[arg-type]
            segment.phases[id(items[i])] = phase_of[i]
            _finish(i, dag, waiting, ready)
    segment.groups.sort(key=lambda group: segment.phases[id(group)])
    return segment


def _finish(i: int, dag: nx.DiGraph, waiting: dict[int, int], ready: list[int]) -> None:
    ready.remove(i)
    for j in dag.successors(i):
        waiting[j] -= 1
        if waiting[j] == 0:
            ready.append(j)


def plan_arena(segment: Segment, exported: set[fx.Node]) -> tuple[dict[fx.Node, int], list[Slot]]:
    """A slot for every value that does not leave the segment."""
    last_read: dict[fx.Node, int] = {}
    for group in segment.groups:
        for operand in group.operands:
            if isinstance(operand, fx.Node):
                last_read[operand] = max(last_read.get(operand, 0), segment.phases[id(group)])
    slots: list[Slot] = []
    free_after: list[int] = []
    slot_of: dict[fx.Node, int] = {}
    for group in segment.groups:
        phase = segment.phases[id(group)]
        for node in group.results:
            if node in exported:
                continue
            num_bytes = _num_bytes(node)
            position = _free_slot(slots, free_after, phase, num_bytes)
            if position is None:
                position = len(slots)
                slots.append(Slot(num_bytes))
                free_after.append(phase)
            elif slots[position].num_bytes != num_bytes:
                slots[position] = Slot(_larger(slots[position].num_bytes, num_bytes))
            slot_of[node] = position
            free_after[position] = last_read[node]
    return slot_of, slots


def _num_bytes(node: fx.Node) -> sympy.Expr:
    value = value_of(node)
    return sympy.expand(product([size_expr(extent) for extent in value.shape]) * value.dtype.itemsize)


def _free_slot(slots: list[Slot], free_after: list[int], phase: int, num_bytes: sympy.Expr) -> int | None:
    free = [i for i in range(len(slots)) if free_after[i] < phase]
    equal = [i for i in free if slots[i].num_bytes == num_bytes]
    return next(iter(equal or free), None)


def _larger(left: sympy.Expr, right: sympy.Expr) -> sympy.Expr:
    difference = sympy.expand(left - right)
    if difference.is_nonnegative:
        return left
    return right if difference.is_nonpositive else sympy.Max(left, right)


def exported_nodes(graph: fx.Graph, plan: Plan) -> set[fx.Node]:
    """Computed nodes that the output or a call outside of our kernels reads, through views."""
    computed = {node for group in plan.groups for node in group.results} | set(plan.refused)
    pending = list(next(reversed(graph.nodes)).all_input_nodes)
    pending += [source for node in plan.refused for source in node.all_input_nodes]
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in computed:
            found.add(node)
        else:
            pending.extend(node.all_input_nodes)
    return found
