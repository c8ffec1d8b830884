"""Index arithmetic: sympy expressions over loop variables and sizes, kept free of divisions where ranges allow.

``Mod(x, k)`` is always written ``x - k * floor_div(x, k)``, so that splitting a dimension and merging it
again cancels by expansion alone. ``floor_div`` drops what provably lies below its divisor.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, reduce
from operator import mul
from typing import Any

import sympy
import torch


class FloorDiv(sympy.Function):  # type: ignore[misc]
    """floor(x / k) of integers, k > 0, that could not be simplified."""

    nargs = 2
    is_integer = True

    @classmethod
    def eval(cls, numerator: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr | None:
        return numerator // divisor if numerator.is_Integer and divisor.is_Integer else None


def size_expr(extent: Any) -> sympy.Expr:
    """A tensor extent (int or SymInt) as a sympy expression."""
    return extent.node.expr if isinstance(extent, torch.SymInt) else sympy.Integer(extent)


class LoopVariable(sympy.Symbol):  # type: ignore[misc]
    """An index that counts from 0 to ``extent`` - 1."""

    __slots__ = ("extent",)

    def __new__(cls, name: str, extent: sympy.Expr) -> LoopVariable:
        variable = sympy.Symbol.__xnew__(cls, name, integer=True, nonnegative=True)
        variable.extent = sympy.sympify(extent)
        return variable  # type: ignore[no-any-return]

    def _hashable_content(self) -> tuple[Any, ...]:
        return (*super()._hashable_content(), self.extent)

    def __getnewargs_ex__(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (self.name, self.extent), {}


class Element(sympy.Function):  # type: ignore[misc]
    """Element(buffer, index, dtype, extent): an integer read from a buffer, checked to lie in [0, extent)."""

    nargs = 4
    is_integer = True
    is_nonnegative = True


def product(extents: Sequence[sympy.Expr]) -> sympy.Expr:
    return reduce(mul, extents, sympy.Integer(1))


def row_major_strides(extents: Sequence[sympy.Expr]) -> tuple[sympy.Expr, ...]:
    return tuple(product(extents[dim + 1 :]) for dim in range(len(extents)))


@lru_cache(maxsize=65536)
def floor_div(numerator: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr:
    """numerator // divisor for numerator >= 0."""
    numerator = sympy.expand(numerator)
    if divisor == 1:
        return numerator
    whole, rest = sympy.Integer(0), sympy.Integer(0)
    for term in sympy.Add.make_args(numerator):
        quotient = sympy.cancel(term / divisor)
        if _is_whole(quotient):
            whole += quotient
        else:
            rest += term
    if rest == 0 or is_below(rest, divisor):
        return whole
    return whole + FloorDiv(rest, divisor)


def _is_whole(quotient: sympy.Expr) -> bool:
    coefficient, rest = quotient.as_coeff_Mul()
    return bool(coefficient.is_integer and rest.is_polynomial())


def modulo(numerator: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr:
    return sympy.expand(numerator - divisor * floor_div(numerator, divisor))


def is_below(expression: sympy.Expr, bound: sympy.Expr) -> bool:
    """Whether 0 <= expression < bound for all values of the loop variables; False where it cannot be shown."""
    largest = largest_value(expression)
    if largest is None:
        return False
    return bool((bound - 1 - largest).is_nonnegative)


def largest_value(expression: sympy.Expr) -> sympy.Expr | None:
    """The largest value of a sum of terms with nonnegative coefficients in the loop variables, else None."""
    expression = sympy.expand(expression)
    for term in sympy.Add.make_args(expression):
        if term.has(FloorDiv, Element) or term.is_nonnegative is not True:
            return None
    ends = {v: v.extent - 1 for v in expression.free_symbols if isinstance(v, LoopVariable)}
    return sympy.expand(expression.subs(ends))


def unflatten(position: sympy.Expr, extents: Sequence[sympy.Expr]) -> tuple[sympy.Expr, ...]:
    """The multi-index of a flat row-major position; 0 in dimensions of one element."""
    index = [sympy.Integer(0)] * len(extents)
    kept = [dim for dim, extent in enumerate(extents) if extent != 1]
    for dim in reversed(kept[1:]):
        index[dim] = modulo(position, extents[dim])
        position = floor_div(position, extents[dim])
    if kept:
        index[kept[0]] = position
    return tuple(index)


def flatten(index: Sequence[sympy.Expr], extents: Sequence[sympy.Expr]) -> sympy.Expr:
    strides = row_major_strides(extents)
    return sympy.expand(sum((i * s for i, s in zip(index, strides, strict=True)), sympy.Integer(0)))


def reshape_index(
    index: Sequence[sympy.Expr], new: Sequence[sympy.Expr], old: Sequence[sympy.Expr]
) -> tuple[sympy.Expr, ...]:
    """Where element ``index`` of shape ``new`` lies in shape ``old``; dimensions are matched group by group."""
    result: list[sympy.Expr] = []
    for new_dims, old_dims in _matching_groups(new, old):
        flat = flatten([index[dim] for dim in new_dims], [new[dim] for dim in new_dims])
        result.extend(unflatten(flat, [old[dim] for dim in old_dims]) if old_dims else ())
    return tuple(result)


def _matching_groups(new: Sequence[sympy.Expr], old: Sequence[sympy.Expr]) -> list[tuple[list[int], list[int]]]:
    """Consecutive dimensions of both shapes with equal products, as short as possible."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(new) or j < len(old):
        left, right = [i] if i < len(new) else [], [j] if j < len(old) else []
        i, j = i + len(left), j + len(right)
        while (difference := _difference(new, left, old, right)) != 0:
            if i < len(new) and (difference == "right" or j >= len(old)):
                left.append(i)
                i += 1
            elif j < len(old):
                right.append(j)
                j += 1
            else:
                raise ValueError(f"shapes {new} and {old} do not match")
        groups.append((left, right))
    return groups


def _difference(new: Sequence[sympy.Expr], left: list[int], old: Sequence[sympy.Expr], right: list[int]) -> int | str:
    """0 if the products are equal, else which side is larger (or both names' order where unknown)."""
    a, b = product([new[dim] for dim in left]), product([old[dim] for dim in right])
    gap = sympy.expand(a - b)
    if gap == 0:
        return 0
    quotient = sympy.cancel(a / b)
    is_larger = gap.is_positive or (quotient.is_integer and gap.is_negative is not True)
    return "left" if is_larger else "right"


def affine(
    expression: sympy.Expr, variables: Sequence[sympy.Symbol]
) -> tuple[sympy.Expr, tuple[sympy.Expr, ...]] | None:
    """(offset, coefficients) if the expression is affine in the variables, else None."""
    expression = sympy.expand(expression)
    coefficients = []
    for variable in variables:
        coefficient = expression.coeff(variable, 1)
        coefficients.append(coefficient)
        expression = sympy.expand(expression - coefficient * variable)
    pieces = (expression, *coefficients)
    if any(piece.has(*variables) for piece in pieces if variables):
        return None
    return expression, tuple(coefficients)
