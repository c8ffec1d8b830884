"""Symbolic evaluation of index-built tensors: the value of a node at a symbolic index.

``evaluate(mask, (b, h, q, k))`` walks a mask's subgraph (arange, comparisons, where, views, …) and
returns a sympy number or boolean in the index symbols. What it cannot see through becomes an opaque
function named after the node, so that nothing is assumed: an opaque value that depends on the
query or key index can never be proved to be a causal mask.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx

from ..codegen.model_graph import ModelGraph, aten, same_size, shape_of, value_of

Index = tuple[sympy.Expr, ...]
Value = Any

QUERY = sympy.Symbol("query", integer=True, nonnegative=True)
KEY = sympy.Symbol("key", integer=True, nonnegative=True)
HEAD = sympy.Symbol("head", integer=True, nonnegative=True)
BATCH = sympy.Symbol("batch", integer=True, nonnegative=True)
_TOKEN_SYMBOLS = frozenset({QUERY, KEY})

_COMPARISONS: dict[Any, Callable[[Any, Any], Any]] = {}
for _name, _relation in {
    "eq": sympy.Eq, "ne": sympy.Ne, "lt": sympy.Lt, "le": sympy.Le, "gt": sympy.Gt, "ge": sympy.Ge,
}.items():  # fmt: skip
    for _overload in ("Tensor", "Scalar"):
        _COMPARISONS[getattr(getattr(aten, _name), _overload)] = _relation

_ARITHMETIC: dict[Any, Callable[[Any, Any], Any]] = {
    aten.add.Tensor: operator.add, aten.add.Scalar: operator.add,
    aten.sub.Tensor: operator.sub, aten.sub.Scalar: operator.sub,
    aten.mul.Tensor: operator.mul, aten.mul.Scalar: operator.mul,
    aten.rsub.Scalar: lambda a, b: b - a, aten.rsub.Tensor: lambda a, b: b - a,
}  # fmt: skip

_JUNCTIONS: dict[Any, Callable[[Any, Any], Any]] = {
    **dict.fromkeys((aten.logical_and.default, aten.bitwise_and.Tensor, aten.__and__.Tensor), sympy.And),
    **dict.fromkeys((aten.logical_or.default, aten.bitwise_or.Tensor, aten.__or__.Tensor), sympy.Or),
}

_CONSTANT_FILL: dict[Any, float] = {
    aten.zeros.default: 0, aten.zeros_like.default: 0, aten.new_zeros.default: 0,
    aten.ones.default: 1, aten.ones_like.default: 1, aten.new_ones.default: 1,
}  # fmt: skip


def size_expression(extent: Any) -> sympy.Expr:
    """An extent (int, SymInt or a node of one) as a sympy expression."""
    extent = value_of(extent)
    return extent.node.expr if isinstance(extent, torch.SymInt) else sympy.Integer(int(extent))


def is_true(value: Any) -> bool:
    return value is True or value is sympy.true


def is_false(value: Any) -> bool:
    return value is False or value is sympy.false


def choose(condition: Any, if_true: Any, if_false: Any) -> Any:
    if is_true(condition):
        return if_true
    if is_false(condition):
        return if_false
    if if_true == if_false:
        return if_true
    if _is_boolean(if_true) and _is_boolean(if_false):
        return sympy.Or(sympy.And(condition, if_true), sympy.And(sympy.Not(condition), if_false))
    return sympy.Piecewise((_as_number(if_true), condition), (_as_number(if_false), True))


def _is_boolean(value: Any) -> bool:
    return isinstance(value, (bool, Boolean)) and not isinstance(value, sympy.Symbol)


def _as_number(value: Any) -> Any:
    return choose(value, sympy.Integer(1), sympy.Integer(0)) if _is_boolean(value) else sympy.sympify(value)


def _as_boolean(value: Any) -> Any:
    return sympy.sympify(value) if _is_boolean(value) else _compare(sympy.Ne, value, sympy.Integer(0))


def _compare(relation: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    """A comparison whose sides may be Piecewise: distributed over their branches."""
    left, right = _as_number(left), _as_number(right)
    for side, rebuild in (
        (left, lambda e: _compare(relation, e, right)),
        (right, lambda e: _compare(relation, left, e)),
    ):
        if isinstance(side, sympy.Piecewise):
            result: Any = sympy.false
            for expression, condition in reversed(side.args):
                result = choose(condition, rebuild(expression), result)
            return result
    if left.is_infinite or right.is_infinite:
        return relation(left, right)
    return relation(sympy.expand(left - right), 0)


class IndexEvaluator:
    """Evaluates nodes of one graph. ``positions`` names inputs whose value at [..., i] is i by contract."""

    def __init__(self, model_graph: ModelGraph, positions: frozenset[str] = frozenset()) -> None:
        self._model_graph = model_graph
        self._positions = positions
        self._memo: dict[tuple[fx.Node, Index], Value] = {}

    def evaluate(self, node: Any, index: Index) -> Value:
        """The value of ``node`` at ``index``, one expression a dimension."""
        if not isinstance(node, fx.Node):
            return _number(node)
        if isinstance(value_of(node), torch.SymInt):
            return size_expression(node)
        key = (node, index)
        if key not in self._memo:
            self._memo[key] = self._evaluate(node, index)
        return self._memo[key]

    def _evaluate(self, node: fx.Node, index: Index) -> Value:
        if node.op == "placeholder":
            return index[-1] if node.name in self._positions else self._placeholder(node, index)
        handler = self._handlers().get(node.target)
        if handler is not None and (_depends_on_tokens(index) or node.target in _ALWAYS_STRUCTURAL):
            result = handler(self, node, index)
            if result is not None:
                return result
        return opaque(node, index)

    def _placeholder(self, node: fx.Node, index: Index) -> Value:
        tensor = self._model_graph.weights.get(node.name)
        if tensor is None:
            return opaque(node, index)
        if node.name not in self._model_graph.weight_sources or self._model_graph.frozen:
            if tensor.numel() == 1:
                return _number(tensor.item())
            table = _distance_table(tensor, index)
            return opaque(node, index) if table is None else table
        return opaque(node, index)

    def operand(self, operand: Any, node: fx.Node, index: Index) -> Value:
        """An operand of ``node`` that broadcasts against it, at node's index."""
        if not isinstance(operand, fx.Node) or not isinstance(value_of(operand), torch.Tensor):
            return self.evaluate(operand, ())
        return self.evaluate(operand, broadcast_index(operand, index))

    def _handlers(self) -> dict[Any, Callable[[IndexEvaluator, fx.Node, Index], Value | None]]:
        return _HANDLERS


def broadcast_index(operand: fx.Node, index: Index) -> Index:
    shape = shape_of(operand)
    tail = index[len(index) - len(shape) :]
    return tuple(
        sympy.Integer(0) if same_size(extent, 1) else position for extent, position in zip(shape, tail, strict=True)
    )


def opaque(node: fx.Node, index: Index) -> Value:
    """An unknown value: a function of its index named after the node, boolean where the node is."""
    value = sympy.Function(node.name, real=True)(*index)
    return sympy.Ne(value, 0) if value_of(node).dtype == torch.bool else value


def _depends_on_tokens(index: Index) -> bool:
    return any(position.free_symbols & _TOKEN_SYMBOLS for position in index)


def _number(value: Any) -> Value:
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return sympy.oo if value > 0 else -sympy.oo
    return sympy.sympify(value)


def _distance_table(tensor: torch.Tensor, index: Index) -> Value | None:
    """A constant square boolean table that equals ``column <= row`` (GPT-2's old causal buffer)."""
    if tensor.dim() < 2 or tensor.shape[-1] != tensor.shape[-2] or tensor.numel() != tensor.shape[-1] ** 2:
        return None
    square = tensor.reshape(tensor.shape[-2:])
    if square.dtype != torch.bool or not torch.equal(square, torch.ones_like(square).tril()):
        return None
    return sympy.Le(index[-1] - index[-2], 0)


def _arange(evaluator: IndexEvaluator, node: fx.Node, index: Index) -> Value:
    if node.target == aten.arange.default:
        return index[0]
    start = evaluator.evaluate(node.args[0], ())
    step = evaluator.evaluate(node.args[2], ()) if len(node.args) > 2 else sympy.Integer(1)
    return start + step * index[0]


def _arithmetic(evaluator: IndexEvaluator, node: fx.Node, index: Index) -> Value | None:
    if node.kwargs.get("alpha", 1) != 1 or len(node.args) > 2:
        return None
    left, right = (_as_number(evaluator.operand(argument, node, index)) for argument in node.args)
    value = _piecewise_arithmetic(_ARITHMETIC[node.target], left, right)
    return _as_boolean(value) if value is not None and value_of(node).dtype == torch.bool else value


def _piecewise_arithmetic(function: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    # Infinity times a branch that may be zero has no value to reason about; sums keep it.
    if function is operator.mul and not {sympy.oo, -sympy.oo}.isdisjoint((left, right)):
        return None
    for side, rebuild in (
        (left, lambda e: _piecewise_arithmetic(function, e, right)),
        (right, lambda e: _piecewise_arithmetic(function, left, e)),
    ):
        if isinstance(side, sympy.Piecewise):
            branches = [(rebuild(expression), condition) for expression, condition in side.args]
            if any(expression is None for expression, _ in branches):
                return None
            return sympy.Piecewise(*branches)
    value = sympy.expand(function(left, right))
    return None if value is sympy.nan else value


def _comparison(evaluator: IndexEvaluator, node: fx.Node, index: Index) -> Value:
    left, right = (evaluator.operand(argument, node, index) for argument in node.args[:2])
    return _compare(_COMPARISONS[node.target], left, right)


def _junction(evaluator: IndexEvaluator, node: fx.Node, index: Index) -> Value | None:
    if value_of(node).dtype != torch.bool:
        return None
    left, right = (_as_boolean(evaluator.operand(argument, node, index)) for argument in node.args[:2])
    return _JUNCTIONS[node.target](left, right)


def _negation(evaluator: IndexEvaluator, node: fx.Node, index: Index) -> Value | None:
    if value_of(node).dtype != torch.bool:
        return None
    return sympy.Not(_as_boolean(evaluator.evaluate(node.args[0], index)))


def _where(evaluator: IndexEvaluator, node: fx.Node, index: Index) -> Value:
    condition, if_true, if_false = (evaluator.operand(argument, node, index) for argument in node.args)
    return choose(_as_boolean(condition), if_true, if_false)


def _masked_fill(evaluator: IndexEvaluator, node: fx.Node, index: Index) -> Value:
    source, mask, fill = (evaluator.operand(argument, node, index) for argument in node.args)
    return choose(_as_boolean(mask), fill, source)


def _cast(evaluator: IndexEvaluator, node: fx.Node, index: Index) -> Value:
    value = evaluator.evaluate(node.args[0], index)
    if value_of(node).dtype == torch.bool:
        return _as_boolean(value)
    if value_of(node.args[0]).dtype.is_floating_point and not value_of(node).dtype.is_floating_point:
        return None
    return _as_number(value)


def _same_value(evaluator: IndexEvaluator, node: fx.Node, index: Index) -> Value:
    return evaluator.evaluate(node.args[0], index)


def _unsqueeze(evaluator: IndexEvaluator, node: fx.Node, index: Index) -> Value:
    dim = node.args[1] % len(index)
    return evaluator.evaluate(node.args[0], index[:dim] + index[dim + 1 :])


def _reshape(evaluator: IndexEvaluator, node: fx.Node, index: Index) -> Value | None:
    source = node.args[0]
    mapped = reshape_index(shape_of(source), shape_of(node), index)
    return None if mapped is None else evaluator.evaluate(source, mapped)


def reshape_index(source: tuple[Any, ...], target: tuple[Any, ...], index: Index) -> Index | None:
    """The index into ``source`` that a reshape to ``target`` reads at ``index``; None if it would need a division."""
    outer = [(extent, position) for extent, position in zip(target, index, strict=True) if not same_size(extent, 1)]
    result: list[sympy.Expr] = []
    cursor = 0
    for extent in source:
        if same_size(extent, 1):
            result.append(sympy.Integer(0))
            continue
        flat, covered = sympy.Integer(0), sympy.Integer(1)
        while cursor < len(outer) and sympy.expand(covered - size_expression(extent)) != 0:
            flat = flat * size_expression(outer[cursor][0]) + outer[cursor][1]
            covered = covered * size_expression(outer[cursor][0])
            cursor += 1
        if sympy.expand(covered - size_expression(extent)) != 0:
            return None
        result.append(sympy.expand(flat))
    return tuple(result) if cursor == len(outer) else None


def _permute(evaluator: IndexEvaluator, node: fx.Node, index: Index) -> Value:
    inner: list[sympy.Expr] = [sympy.Integer(0)] * len(index)
    for position, dim in zip(index, node.args[1], strict=True):
        inner[dim] = position
    return evaluator.evaluate(node.args[0], tuple(inner))


def _expand(evaluator: IndexEvaluator, node: fx.Node, index: Index) -> Value:
    return evaluator.evaluate(node.args[0], broadcast_index(node.args[0], index))


def _slice(evaluator: IndexEvaluator, node: fx.Node, index: Index) -> Value | None:
    operands: tuple[Any, ...] = (*node.args, *(None, 0, 0, None, 1)[len(node.args) :])
    source, dim, start, _end, step = operands
    begin = size_expression(0 if start is None else start)
    if begin.is_number and begin < 0 and isinstance(shape_of(source)[dim], int):
        begin = sympy.Max(begin + shape_of(source)[dim], 0)
    if not begin.is_nonnegative:
        return None
    dim = dim % len(index)
    return evaluator.evaluate(source, (*index[:dim], begin + step * index[dim], *index[dim + 1 :]))


def _select(evaluator: IndexEvaluator, node: fx.Node, index: Index) -> Value:
    source, dim, position = node.args
    dim = dim % value_of(source).dim()
    place = size_expression(position)
    if place.is_number and place < 0:
        place = place + size_expression(shape_of(source)[dim])
    return evaluator.evaluate(source, (*index[:dim], place, *index[dim:]))


def _index(evaluator: IndexEvaluator, node: fx.Node, index: Index) -> Value | None:
    source, indices = node.args
    if len(indices) != value_of(source).dim() or any(inner is None for inner in indices):
        return None
    if any(value_of(inner).dtype == torch.bool for inner in indices):
        return None
    position = tuple(_as_number(evaluator.operand(inner, node, index)) for inner in indices)
    # A negative index counts from the end.
    return evaluator.evaluate(source, position) if all(place.is_nonnegative for place in position) else None


def _cumsum(evaluator: IndexEvaluator, node: fx.Node, index: Index) -> Value | None:
    dim = node.args[1] % len(index)
    running = sympy.Dummy("running", integer=True, nonnegative=True)
    term = _as_number(evaluator.evaluate(node.args[0], (*index[:dim], QUERY + running, *index[dim + 1 :])))
    if term.free_symbols & {QUERY, running}:
        return None
    return sympy.expand(term * (index[dim] + 1))


def _difference(evaluator: IndexEvaluator, node: fx.Node, index: Index) -> Value | None:
    source, order, dim, prepend = (*node.args, *(None, 1, -1, None)[len(node.args) :])[:4]
    if order != 1 or not isinstance(prepend, fx.Node) or len(node.args) > 4 or value_of(node).dtype == torch.bool:
        return None
    dim = dim % len(index)
    if not same_size(shape_of(prepend)[dim], 1):
        return None

    def at(position: sympy.Expr) -> Any:
        return evaluator.evaluate(source, (*index[:dim], position, *index[dim + 1 :]))

    first = evaluator.evaluate(prepend, (*index[:dim], sympy.Integer(0), *index[dim + 1 :]))
    inner = sympy.expand(at(index[dim]) - at(index[dim] - 1))
    edge = sympy.expand(at(sympy.Integer(0)) - first)
    return choose(sympy.Gt(index[dim], 0), inner, edge)


def _triangle(evaluator: IndexEvaluator, node: fx.Node, index: Index) -> Value:
    diagonal = size_expression(node.args[1]) if len(node.args) > 1 else sympy.Integer(0)
    offset = index[-1] - index[-2] - diagonal
    inside = sympy.Le(offset, 0) if node.target == aten.tril.default else sympy.Ge(offset, 0)
    source = evaluator.evaluate(node.args[0], index)
    return choose(inside, source, sympy.false if _is_boolean(source) else sympy.Integer(0))


def _fill(_evaluator: IndexEvaluator, node: fx.Node, _index: Index) -> Value:
    value: Any = _CONSTANT_FILL[node.target]
    return _number(bool(value)) if value_of(node).dtype == torch.bool else sympy.Integer(value)


def _full(evaluator: IndexEvaluator, node: fx.Node, _index: Index) -> Value:
    fill = node.args[0] if node.target == aten.scalar_tensor.default else node.args[-1]
    value = evaluator.evaluate(fill, ())
    return _as_boolean(value) if value_of(node).dtype == torch.bool else value


def _negative(evaluator: IndexEvaluator, node: fx.Node, index: Index) -> Value | None:
    return _piecewise_arithmetic(operator.mul, _as_number(evaluator.evaluate(node.args[0], index)), sympy.Integer(-1))


def _absolute(evaluator: IndexEvaluator, node: fx.Node, index: Index) -> Value:
    value = _as_number(evaluator.evaluate(node.args[0], index))
    return choose(_compare(sympy.Ge, value, sympy.Integer(0)), value, sympy.expand(-value))


_HANDLERS: dict[Any, Callable[[IndexEvaluator, fx.Node, Index], Value | None]] = {
    **dict.fromkeys((aten.arange.default, aten.arange.start, aten.arange.start_step), _arange),
    **dict.fromkeys(_ARITHMETIC, _arithmetic),
    **dict.fromkeys(_COMPARISONS, _comparison),
    **dict.fromkeys(_JUNCTIONS, _junction),
    **dict.fromkeys((aten.logical_not.default, aten.bitwise_not.default), _negation),
    **dict.fromkeys((aten.where.self, aten.where.Scalar, aten.where.ScalarSelf, aten.where.ScalarOther), _where),
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), _masked_fill),
    **dict.fromkeys((aten._to_copy.default, aten.to.dtype), _cast),
    **dict.fromkeys((aten.alias.default, aten.clone.default, aten.detach.default), _same_value),
    **dict.fromkeys(_CONSTANT_FILL, _fill),
    **dict.fromkeys((aten.full.default, aten.full_like.default, aten.new_full.default), _full),
    aten.scalar_tensor.default: _full,
    **dict.fromkeys((aten.tril.default, aten.triu.default), _triangle),
    **dict.fromkeys((aten.reshape.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default), _reshape),
    aten.unsqueeze.default: _unsqueeze,
    aten.permute.default: _permute,
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.index.Tensor: _index,
    aten.cumsum.default: _cumsum,
    aten.diff.default: _difference,
    aten.neg.default: _negative,
    aten.abs.default: _absolute,
}  # fmt: skip

# Even at an index without tokens these have a value worth knowing; all else there is opaque, as it
# cannot depend on query or key (a head's slope, say).
_ALWAYS_STRUCTURAL = frozenset(
    (*_CONSTANT_FILL, aten.full.default, aten.scalar_tensor.default, aten.arange.default, aten.arange.start,
     aten.alias.default, aten._to_copy.default, aten.reshape.default, aten.unsqueeze.default, aten.expand.default,
     aten.slice.Tensor, aten.select.int, aten.index.Tensor, aten.sub.Tensor, aten.add.Tensor, aten.where.self,
     aten.new_full.default, aten.full_like.default)
)  # fmt: skip
