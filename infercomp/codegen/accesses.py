"""Which elements a loop touches, and how much it computes: counted from its spec, without running it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import sympy

from .indexing import Element, LoopVariable, affine
from .scalar import REDUCTIONS, Scalar
from .specs import Store

Sizes = Mapping[sympy.Symbol, int]
Box = Mapping[LoopVariable, tuple[int, int]]
"""First value and end of each loop variable."""

# What moves a value or names it, and computes nothing.
_FREE = frozenset(
    {"load", "constant", "index", "index_less", "cast", "wrap", "round", "accumulator", "bits", "from_bits"}
)


@dataclass(frozen=True)
class Access:
    """Elements of ``buffer`` at ``index``, for every value of the loop variables in ``box``."""

    buffer: str
    index: sympy.Expr
    box: Box


@dataclass
class Counted:
    """What stores touch and compute; a read of what an earlier store of the same row wrote is no read of memory."""

    reads: list[Access]
    writes: list[Access]
    num_operations: int

    def elements_read(self, buffer: str) -> int:
        return num_elements([access for access in self.reads if access.buffer == buffer])

    def elements_written(self, buffer: str) -> int:
        return num_elements([access for access in self.writes if access.buffer == buffer])


def count_stores(row: LoopVariable, stores: Sequence[Store], sizes: Sizes) -> Counted:
    """All accesses and operations of ``stores`` over every row."""
    counted = Counted([], [], 0)
    for store in stores:
        box = {row: (0, evaluate(row.extent, sizes)), store.column: (0, evaluate(store.column.extent, sizes))}
        visit = _Visit(sizes, frozenset(box))
        visit.value(store.value, box)
        visit.index(store.index, box)
        counted.reads += visit.reads
        counted.writes.append(Access(store.buffer, _without_elements(store.index.subs(sizes)), box))
        counted.num_operations += visit.num_operations()
    return counted


def evaluate(expression: sympy.Expr, sizes: Sizes) -> int:
    return int(sympy.sympify(expression).subs(sizes))


class _Visit:
    """One walk over a stored value; a branch that depends on the column is walked with the columns it is taken for."""

    def __init__(self, sizes: Sizes, loops: frozenset[LoopVariable]) -> None:
        self.reads: list[Access] = []
        self._sizes = sizes
        self._loops = loops
        self._boxes: dict[Scalar, list[Box]] = {}
        self._seen: set[tuple[Scalar, frozenset]] = set()
        self._variables: dict[Scalar, frozenset[LoopVariable]] = {}

    def value(self, node: Scalar, box: Box) -> None:
        key = (node, frozenset(box.items()))
        if key in self._seen:
            return
        self._seen.add(key)
        inner = box
        if node.op in REDUCTIONS:
            variable, extent = node.payload  # type: ignore[misc]
            inner = {**box, variable: (0, evaluate(extent, self._sizes))}
        if not _is_free(node):
            body = node.args[0] if node.op in REDUCTIONS else node
            variables = self._variables_of(body) | ({node.payload[0]} if node.op in REDUCTIONS else set())  # type: ignore[index]
            self._boxes.setdefault(node, []).append({v: inner[v] for v in variables})
        if node.op == "load":
            buffer, index, _ = node.payload  # type: ignore[misc]
            self.reads.append(Access(buffer, _without_elements(index.subs(self._sizes)), box))
            self.index(index, box)
        elif node.op == "index":
            self.index(node.payload, box)  # type: ignore[arg-type]
        for position, argument in enumerate(node.args):
            self.value(argument, self._branch(node, position, inner))

    def index(self, expression: sympy.Expr, box: Box) -> None:
        """The integers that an index reads from buffers."""
        for element in expression.atoms(Element):
            position = _without_elements(element.args[1].subs(self._sizes))
            self.reads.append(Access(str(element.args[0]), position, box))

    def num_operations(self) -> int:
        return sum(
            prod(last - first for first, last in box.values())
            for boxes in self._boxes.values()
            for i, box in enumerate(boxes)
            if not any(_is_inside(box, other) for j, other in enumerate(boxes) if j != i and (other != box or j < i))
        )

    def _branch(self, node: Scalar, position: int, box: Box) -> Box:
        if node.op != "where" or position == 0 or node.args[0].op != "index_less":
            return box
        expression, bound = (part.subs(self._sizes) for part in node.args[0].payload)  # type: ignore[union-attr]
        for variable, (first, last) in box.items():
            point = sympy.expand(bound - expression + variable)
            if point.is_Integer:
                middle = min(max(int(point), first), last)
                return {**box, variable: (first, middle) if position == 1 else (middle, last)}
        return box

    def _variables_of(self, node: Scalar) -> frozenset[LoopVariable]:
        found = self._variables.get(node)
        if found is None:
            variables = {v for e in _indices(node) for v in e.free_symbols if isinstance(v, LoopVariable)}
            variables = variables.union(*map(self._variables_of, node.args))
            if node.op == "accumulator":
                variables |= self._loops
            found = frozenset(variables - ({node.payload[0]} if node.op in REDUCTIONS else set()))  # type: ignore[index]
            self._variables[node] = found
        return found


def _is_free(node: Scalar) -> bool:
    # A choice by the column is made when the loop is written, not when it runs.
    return node.op in _FREE or (node.op == "where" and node.args[0].op == "index_less")


def _indices(node: Scalar) -> Iterator[sympy.Expr]:
    if node.op == "load":
        yield node.payload[1]  # type: ignore[index]
    elif node.op == "index":
        yield node.payload  # type: ignore[misc]
    elif node.op == "index_less":
        yield from node.payload  # type: ignore[misc]


def _is_inside(box: Box, other: Box) -> bool:
    return all(other[v][0] <= first and last <= other[v][1] for v, (first, last) in box.items())


def _without_elements(index: sympy.Expr) -> sympy.Expr:
    """The index with every integer read from memory replaced by its place: rows gathered count as neighbours."""
    return index.replace(Element, lambda buffer, position, *rest: position)


def num_elements(accesses: Iterable[Access]) -> int:
    """Distinct elements of one buffer.

    Indices that differ by a constant only are united exactly; others are taken to name other elements.
    """
    united: dict[tuple, list[tuple[int, int]]] = {}
    for access in accesses:
        inner = _inner_variable(access)
        if inner is None:
            offset, step, first, last = access.index, sympy.Integer(1), 0, 1
        else:
            offset, (step,) = affine(access.index, [inner])  # type: ignore[misc]
            first, last = access.box[inner]
        constant, rest = sympy.expand(offset).as_coeff_Add()
        quotient, remainder = divmod(int(constant), int(step))
        box = tuple(sorted(((v, access.box[v]) for v in _loops(rest)), key=str))
        united.setdefault((rest, step, remainder, box), []).append((first + quotient, last + quotient))
    return sum(_num_points(rest, box) * _union(spans) for (rest, _, _, box), spans in united.items())


def _inner_variable(access: Access) -> LoopVariable | None:
    """The loop that is walked with a fixed step, the row last."""
    for variable in sorted(_loops(access.index), key=lambda v: (v.name == "r", v.name)):
        found = affine(access.index, [variable])
        if found is not None and found[1][0].is_Integer and not found[0].has(variable):
            return variable
    return None


def _loops(expression: sympy.Expr) -> list[LoopVariable]:
    return [symbol for symbol in expression.free_symbols if isinstance(symbol, LoopVariable)]


def _num_points(rest: sympy.Expr, box: Iterable[tuple[LoopVariable, tuple[int, int]]]) -> int:
    """Distinct values of an index over a box."""
    names = [variable for variable, _ in box]
    ranges = [np.arange(first, last) for _, (first, last) in box]
    if not names:
        return 1
    function = sympy.lambdify(names, rest, modules=[{"FloorDiv": np.floor_divide}, "numpy"])
    return int(np.unique(function(*np.meshgrid(*ranges, indexing="ij"))).size)


def _union(spans: Sequence[tuple[int, int]]) -> int:
    """Integers in at least one of the spans."""
    total, reached = 0, None
    for first, last in sorted(spans):
        start = first if reached is None else max(first, reached)
        total += max(0, last - start)
        reached = last if reached is None else max(reached, last)
    return total
