"""From a group of graph nodes to a kernel spec.

A ``Region`` is the group with everything that is computed inside it: its own calls, and the views and
constants between them and the buffers they read. Buffers and sizes get names by order of discovery, so
that equal regions of different layers build equal specs; the spec of a region already seen is reused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx

from .indexing import LoopVariable, flatten, product, size_expr, unflatten
from .lazy_tensor import LazyTensor, Refused, Shape, check_dtype, stored
from .model_graph import value_of
from .pointwise_ops import pointwise
from .row_ops import MULTIPLE, ROWS
from .scalar import map_buffers
from .specs import Buffer, LoopSpec, Store
from .view_ops import GENERATORS, MOVES, VIEWS
from .weight_panels import PanelFormat


def is_inlined(node: fx.Node) -> bool:
    """Views and constants are computed where they are read and never stored."""
    return node.op == "call_function" and (node.target in VIEWS or node.target in GENERATORS)


def is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(value_of(node), torch.Tensor)


@dataclass(frozen=True)
class PackedWeight:
    """A weight that a matrix product reads in panels: ``parts`` are its tensors (values, scales, zeros).

    ``is_transposed`` says that the values lie [K, N].
    """

    parts: tuple[fx.Node, ...]
    panel_format: PanelFormat
    half_distance: int
    is_transposed: bool = False


Source: TypeAlias = fx.Node | PackedWeight


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """A call's arguments by the names of its schema, defaults filled in."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    return {
        a.name: node.args[i] if i < len(node.args) else node.kwargs.get(a.name, a.default_value)
        for i, a in enumerate(schema)
    }


class Region:
    """One group of nodes, evaluated lazily; ``sources`` are the buffers it reads, in order of discovery.

    ``language``, "cpp" or "triton", is what its kernel will be written in: the two read weights and caches
    in layouts of their own.
    """

    def __init__(self, nodes: Sequence[fx.Node], is_stored: Callable[[fx.Node], bool], language: str = "cpp") -> None:
        self.nodes = tuple(nodes)
        self.language = language
        self.sources: list[Source] = []
        self._sizes: dict[sympy.Symbol, sympy.Symbol] = {}
        self._tensors: dict[fx.Node, LazyTensor] = {}
        self._inside = set(nodes)
        self._is_stored = is_stored

    @property
    def symbols(self) -> tuple[sympy.Symbol, ...]:
        """The graph's own symbols behind ``n0``, ``n1`` …"""
        return tuple(self._sizes)

    def size(self, expression: Any) -> sympy.Expr:
        """An extent of the graph in the spec's own size names."""
        expression = size_expr(expression)
        for symbol in sorted(expression.free_symbols, key=str):
            if symbol not in self._sizes:
                self._sizes[symbol] = sympy.Symbol(f"n{len(self._sizes)}", integer=True, positive=True)
        return expression.subs(self._sizes)

    def shape(self, node: fx.Node) -> Shape:
        return tuple(self.size(extent) for extent in value_of(node).shape)

    def tensor(self, node: fx.Node) -> LazyTensor:
        found = self._tensors.get(node)
        if found is None:
            is_computed = node in self._inside or (is_inlined(node) and not self._is_stored(node))
            found = self._tensors[node] = self._computed(node) if is_computed else self._source(node)
        return found

    def bind(self, node: fx.Node, tensor: LazyTensor) -> None:
        """Let ``tensor`` stand for a node of the group: the product of a matrix multiplication."""
        self._tensors[node] = tensor

    def source_name(self, node: Source) -> str:
        """The name of a buffer that the region reads."""
        if node not in self.sources:
            self.sources.append(node)
        return f"b{self.sources.index(node)}"

    def _source(self, node: fx.Node) -> LazyTensor:
        value = value_of(node)
        check_dtype(value.dtype)
        return stored(self.source_name(node), self.shape(node), value.dtype)

    def _computed(self, node: fx.Node) -> LazyTensor:
        value = value_of(node)
        if node.target is operator.getitem:
            return self._outputs(node.args[0])[node.args[1]]  # type: ignore[index,arg-type]
        if not isinstance(value, torch.Tensor):
            raise Refused("it does not return one tensor")
        check_dtype(value.dtype)
        result = LazyTensor(self.shape(node), value.dtype, lambda index: self._tensors[node].at(index))
        positional, keyword = self.arguments(node)
        rule = VIEWS.get(node.target) or GENERATORS.get(node.target) or MOVES.get(node.target) or ROWS.get(node.target)
        if rule is not None:
            return rule(result, *positional)
        tensor = pointwise(node.target, result, [*positional, *keyword])
        if tensor is None:
            raise Refused("no kernel is generated for it")
        return tensor

    def _outputs(self, node: fx.Node) -> tuple[LazyTensor, ...]:
        rule = MULTIPLE.get(node.target)
        if rule is None:
            raise Refused("no kernel is generated for it")
        outputs = {user.args[1]: user for user in node.users}
        return rule(self, outputs, *self.arguments(node)[0])

    def arguments(self, node: fx.Node) -> tuple[list[Any], list[Any]]:
        """The schema's positional and keyword-only arguments with defaults; tensors lazy, sizes as expressions."""
        positional: list[Any] = []
        keyword: list[Any] = []
        if not isinstance(node.target, torch._ops.OpOverload):
            raise Refused("it is no operator")
        for i, argument in enumerate(node.target._schema.arguments):
            given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
            (keyword if argument.kwarg_only else positional).append(self._argument(given))
        return positional, keyword

    def _argument(self, given: Any) -> Any:
        if isinstance(given, (list, tuple)):
            return [self._argument(part) for part in given]
        if isinstance(given, fx.Node):
            value = value_of(given)
            if isinstance(value, torch.Tensor):
                return self.tensor(given)
            if isinstance(value, (torch.SymInt, int)):
                return self.size(value)
            raise Refused(f"an argument of type {type(value).__name__}")
        return given


def row_variable(leading: Shape) -> tuple[LoopVariable, tuple[sympy.Expr, ...]]:
    """One loop over all leading dimensions, and the multi-index that it stands for."""
    row = LoopVariable("r", product(leading))
    position = row if row.extent != 1 else sympy.Integer(0)
    return row, unflatten(position, leading) if leading else ()


def column_variable(extent: sympy.Expr) -> tuple[LoopVariable, sympy.Expr]:
    column = LoopVariable("c", extent)
    return column, column if extent != 1 else sympy.Integer(0)


def store_of(region: Region, node: fx.Node, name: str, leading: Shape, row_index: tuple[sympy.Expr, ...]) -> Store:
    """The store that materialises ``node``, row-major, inside the loop over the rows of ``leading``."""
    tensor = region.tensor(node)
    *own_leading, extent = tensor.shape or (sympy.Integer(1),)
    if _squeezed(own_leading) != _squeezed(leading):
        raise Refused(f"results with rows {tuple(own_leading)} and {leading} in one kernel")
    kept = iter(i for i, rows in zip(row_index, leading, strict=True) if rows != 1)
    index = tuple(sympy.Integer(0) if rows == 1 else next(kept) for rows in own_leading)
    column, position = column_variable(extent)
    full = (*index, position) if tensor.shape else ()
    return Store(name, column, flatten(full, tensor.shape), tensor.at(full))


def _squeezed(shape: Sequence[sympy.Expr]) -> Shape:
    return tuple(extent for extent in shape if extent != 1)


def leading_shape(region: Region, node: fx.Node) -> Shape:
    return region.shape(node)[:-1]


def build_loop(region: Region, results: Sequence[fx.Node]) -> LoopSpec:
    """One loop over rows that stores ``results``; raises Refused where a call or a shape does not fit."""
    leading = max((leading_shape(region, node) for node in results), key=lambda shape: len(_squeezed(shape)))
    row, row_index = row_variable(leading)
    stores = []
    for i, node in enumerate(results):
        stores.append(store_of(region, node, f"out{i}", leading, row_index))
        # What follows reads the row back while it is hot, as the definition would: rounded.
        region.bind(node, stored(f"out{i}", region.shape(node), value_of(node).dtype))
    return LoopSpec(buffers_of(region, results), row, renamed(region, stores))


def buffers_of(region: Region, results: Sequence[fx.Node]) -> tuple[Buffer, ...]:
    """The sources, then the results."""
    read = [Buffer(f"b{i}", source_dtype(source)) for i, source in enumerate(region.sources)]
    written = [Buffer(f"b{len(read) + i}", value_of(node).dtype, True) for i, node in enumerate(results)]
    return (*read, *written)


def source_dtype(source: Source) -> torch.dtype:
    return torch.uint8 if isinstance(source, PackedWeight) else value_of(source).dtype


def renamed(region: Region, stores: Sequence[Store]) -> tuple[Store, ...]:
    """Stores in which ``out0``, ``out1`` … are numbered after the sources."""
    first = len(region.sources)
    names = {f"out{i}": f"b{first + i}" for i in range(len(stores))}

    def rename(name: str) -> str:
        return names.get(name, name)

    return tuple(Store(rename(s.buffer), s.column, s.index, map_buffers(s.value, rename)) for s in stores)


def signature(
    nodes: Sequence[fx.Node], results: Sequence[fx.Node], is_stored: Callable[[fx.Node], bool]
) -> tuple[Any, tuple[fx.Node, ...]]:
    """A key that is equal for regions that compute the same from buffers of the same shapes and dtypes, and
    the nodes in its order."""
    numbers: dict[fx.Node, int] = {}
    inside = set(nodes)
    entries: list[Any] = []

    def describe(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            visit(argument)
            return ("node", numbers[argument])
        if isinstance(argument, (list, tuple)):
            return tuple(describe(part) for part in argument)
        return (type(argument).__name__, argument)

    def visit(node: fx.Node) -> None:
        if node in numbers:
            return
        if node in inside or (is_inlined(node) and not is_stored(node)):
            arguments = tuple(describe(argument) for argument in node.args)
            options = tuple((name, describe(value)) for name, value in sorted(node.kwargs.items()))
            entry: Any = (node.target, arguments, options)
        else:
            entry = "buffer"
        numbers[node] = len(numbers)
        value = value_of(node)
        described = (value.dtype, tuple(map(size_expr, value.shape))) if is_tensor(node) else str(value)
        entries.append((entry, described))

    for node in nodes:
        visit(node)
    return (tuple(entries), tuple(numbers[node] for node in results)), tuple(numbers)
