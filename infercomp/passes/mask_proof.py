"""What a mask is, decided over all queries and keys: causal, causal within a window, ALiBi, or not proved.

The mask's value at (query, key) is a sympy expression (``index_algebra``). It is one of ours exactly
if every comparison in it depends on the distance ``query position - key position`` alone (or is
constant over the index ranges), the visible distances form one interval that starts at 0, and the
visible value is ``slope(head) * key + constant of the row`` (softmax does not see a row's constant).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import sympy
from sympy.core.relational import Relational
from torch import fx

from ..codegen.model_graph import ModelGraph, same_size, shape_of, value_of
from .index_algebra import BATCH, HEAD, KEY, QUERY, IndexEvaluator, is_false, is_true, size_expression

HIDDEN_BELOW = -1e30


@dataclass(frozen=True)
class MaskSpec:
    """A proved mask: ``slopes`` is the node of ALiBi slopes and the factor it is multiplied by."""

    is_causal: bool
    sliding_window: int | None = None
    slopes: fx.Node | None = None
    slope_factor: float = 1.0


@dataclass(frozen=True)
class Unproved:
    """A mask that is none of ours, with the reason and a picture of its first rows and columns."""

    reason: str
    expression: Any

    def picture(self, extent: int = 8) -> str:
        """Rows are queries, columns keys: '#' seen, '.' hidden, '?' depends on values unknown here."""
        rows = ("".join(_cell(self.expression, q, k) for k in range(extent)) for q in range(extent))
        return "\n".join(rows)


class _NotOurs(Exception):
    pass


def prove_mask(
    model_graph: ModelGraph, bias: fx.Node, query: fx.Node, key: fx.Node, positions: frozenset[str] = frozenset()
) -> MaskSpec | Unproved:
    """Decide what ``bias`` (broadcast over [B, H, Sq, Skv]) is for queries and keys of these shapes."""
    index = (BATCH, HEAD, QUERY, KEY)[4 - value_of(bias).dim() :]
    index = tuple(
        sympy.Integer(0) if same_size(extent, 1) else position
        for extent, position in zip(shape_of(bias), index, strict=True)
    )
    expression = IndexEvaluator(model_graph, positions).evaluate(bias, index)
    query_length, key_length = size_expression(shape_of(query)[2]), size_expression(shape_of(key)[2])
    try:
        return _classify(model_graph, expression, query_length, key_length, shape_of(query)[1])
    except _NotOurs as reason:
        return Unproved(str(reason), expression)


def _classify(
    model_graph: ModelGraph, expression: Any, query_length: sympy.Expr, key_length: sympy.Expr, num_heads: int
) -> MaskSpec:
    offset = key_length - query_length
    truths = {atom: _constant_truth(atom, query_length, key_length) for atom in _comparisons(expression)}
    expression = _substituted(expression, {atom: truth for atom, truth in truths.items() if truth is not None})
    forms = {atom: _distance_form(atom, offset) for atom in _comparisons(expression)}
    distances = _test_distances(forms)
    branches = {distance: _branch(expression, forms, distance) for distance in distances}
    visible = [distance for distance in distances if not _is_hidden(branches[distance])]
    if not visible:
        raise _NotOurs("every key is hidden")
    first, last = distances.index(visible[0]), distances.index(visible[-1])
    if visible != distances[first : last + 1]:
        raise _NotOurs("the visible distances are not one interval")
    slopes, factor = _slope(model_graph, {branches[distance] for distance in visible}, num_heads)
    lowest, highest = visible[0], visible[-1]
    unbounded_below, unbounded_above = first == 0, last == len(distances) - 1
    if unbounded_below and unbounded_above:
        return MaskSpec(False, None, slopes, factor)
    if lowest != 0 or unbounded_below:
        raise _NotOurs(f"keys are visible from distance {lowest}, a causal mask shows them from 0")
    if not _at_least(offset, 0):
        raise _NotOurs("there may be more queries than keys, and then the first queries see no key")
    return MaskSpec(True, None if unbounded_above else highest + 1, slopes, factor)


def _comparisons(expression: Any) -> set[Relational]:
    return set(expression.atoms(Relational)) if isinstance(expression, sympy.Basic) else set()


def _substituted(expression: Any, truths: dict[Any, Any]) -> Any:
    return expression.xreplace(truths) if isinstance(expression, sympy.Basic) and truths else expression


def _linear(atom: Relational) -> tuple[sympy.Expr, sympy.Expr, sympy.Expr]:
    """(coefficient of query, coefficient of key, rest) of the comparison's left side minus its right."""
    difference = sympy.expand(atom.lhs - atom.rhs)
    if difference.atoms(sympy.Function):
        unknown = sorted(str(function) for function in difference.atoms(sympy.Function))
        raise _NotOurs(f"it depends on {', '.join(unknown)}, whose value is not known when compiling")
    query, key = difference.coeff(QUERY, 1), difference.coeff(KEY, 1)
    rest = sympy.expand(difference - query * QUERY - key * KEY)
    if not (query.is_number and key.is_number) or rest.free_symbols & {QUERY, KEY, HEAD, BATCH}:
        raise _NotOurs(f"the comparison {atom} is not linear in query and key")
    return query, key, rest


def _constant_truth(atom: Relational, query_length: sympy.Expr, key_length: sympy.Expr) -> Any:
    """true or false if the comparison is decided by the index ranges alone, for every length, else None."""
    query, key, rest = _linear(atom)
    low = rest + _extreme(query, query_length, minimum=True) + _extreme(key, key_length, minimum=True)
    high = rest + _extreme(query, query_length, minimum=False) + _extreme(key, key_length, minimum=False)
    relation = atom.func
    if relation in (sympy.Ge, sympy.Gt):
        bound = 0 if relation is sympy.Ge else 1
        return _decide(_at_least(low, bound), _at_most(high, bound - 1))
    if relation in (sympy.Le, sympy.Lt):
        bound = 0 if relation is sympy.Le else -1
        return _decide(_at_most(high, bound), _at_least(low, bound + 1))
    never = _at_least(low, 1) or _at_most(high, -1)
    always = low == 0 and high == 0
    return _decide(always, never) if relation is sympy.Eq else _decide(never, always)


def _extreme(coefficient: sympy.Expr, length: sympy.Expr, *, minimum: bool) -> sympy.Expr:
    return sympy.Integer(0) if (coefficient >= 0) == minimum else coefficient * (length - 1)


def _decide(true: bool, false: bool) -> Any:
    return sympy.true if true else sympy.false if false else None


def _at_least(expression: sympy.Expr, bound: int) -> bool:
    """Whether expression >= bound for all sizes >= 1: linear, no negative coefficient, holds at sizes of 1."""
    expression = sympy.expand(expression)
    sizes = sorted(expression.free_symbols, key=str)
    if any(not expression.coeff(size, 1).is_number or expression.coeff(size, 1) < 0 for size in sizes):
        return False
    at_one = expression.subs(dict.fromkeys(sizes, 1))
    return bool(at_one.is_number and at_one >= bound)


def _at_most(expression: sympy.Expr, bound: int) -> bool:
    return _at_least(-expression, -bound)


def _distance_form(atom: Relational, offset: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """(a, c) with the comparison's difference equal to a * distance + c."""
    query, key, rest = _linear(atom)
    constant = sympy.expand(rest - query * offset)
    if query + key != 0 or not constant.is_number:
        raise _NotOurs(f"the comparison {atom} is not about the distance between query and key")
    return query, constant


def _test_distances(forms: dict[Relational, tuple[sympy.Expr, sympy.Expr]]) -> list[int]:
    """Distances on both sides of every point where a comparison may change, one beyond each end."""
    distances: set[int] = set()
    for slope, constant in forms.values():
        if slope != 0:
            root = math.floor(-constant / slope)
            distances.update(range(root - 2, root + 4))
    return sorted(distances) or [0]


def _branch(expression: Any, forms: dict[Relational, tuple[sympy.Expr, sympy.Expr]], distance: int) -> Any:
    return _substituted(
        expression, {atom: atom.func(slope * distance + constant, 0) for atom, (slope, constant) in forms.items()}
    )


def _is_hidden(value: Any) -> bool:
    if is_false(value):
        return True
    if is_true(value):
        return False
    if value == -sympy.oo:
        return True
    constant = sympy.expand(value).as_coeff_Add()[0]
    return bool(constant.is_number and constant < HIDDEN_BELOW)


def _slope(model_graph: ModelGraph, values: set[Any], num_heads: int) -> tuple[fx.Node | None, float]:
    if len(values) != 1:
        raise _NotOurs(f"visible keys get different biases: {', '.join(sorted(map(str, values)))}")
    value = values.pop()
    if is_true(value):
        return None, 1.0
    value = sympy.expand(value)
    slope = value.coeff(KEY, 1)
    if sympy.expand(value - slope * KEY).has(KEY) or slope.free_symbols & {QUERY, KEY}:
        raise _NotOurs(f"the bias {value} is not linear in the key's position")
    if slope == 0:
        return None, 1.0
    factor, functions = slope.as_coeff_Mul()
    node = _node_of(model_graph, functions)
    if node is None or not factor.is_number or not same_size(value_of(node).numel(), num_heads):
        raise _NotOurs(f"the slope {slope} is no vector over the heads")
    return node, float(factor)


def _node_of(model_graph: ModelGraph, function: Any) -> fx.Node | None:
    if not isinstance(function, sympy.Function) or HEAD not in function.args:
        return None
    name = function.func.__name__
    return next((node for node in model_graph.graph.nodes if node.name == name), None)


def _cell(expression: Any, query: int, key: int) -> str:
    value = (
        expression.subs({QUERY: query, KEY: key, HEAD: 0, BATCH: 0})
        if isinstance(expression, sympy.Basic)
        else expression
    )
    if is_true(value):
        return "#"
    if is_false(value) or value == -sympy.oo:
        return "."
    if getattr(value, "is_number", False):
        return "." if value < HIDDEN_BELOW else "#"
    return "?"
