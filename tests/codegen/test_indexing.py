"""Index arithmetic: reshapes and splits find the element that NumPy finds, with no division where none is due."""

from __future__ import annotations

import numpy as np
import sympy
from hypothesis import given
from hypothesis import strategies as st

from infercomp.codegen.indexing import (
    FloorDiv,
    LoopVariable,
    affine,
    flatten,
    floor_div,
    modulo,
    reshape_index,
    unflatten,
)

TOKENS = sympy.Symbol("n0", integer=True, positive=True)


def _integers(extents: tuple[int, ...]) -> tuple[sympy.Integer, ...]:
    return tuple(sympy.Integer(extent) for extent in extents)


def _value(expression: sympy.Expr, values: dict[sympy.Symbol, int]) -> int:
    return int(sympy.sympify(expression).subs(values))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_unflatten_and_flatten_are_inverse(extents: list[int], data: st.DataObject) -> None:
    shape = _integers(tuple(extents))
    row = LoopVariable("r", sympy.prod(shape))
    index = unflatten(row, shape)
    position = data.draw(st.integers(0, int(np.prod(extents)) - 1))
    expected = np.unravel_index(position, extents)
    assert tuple(_value(i, {row: position}) for i in index) == tuple(map(int, expected))
    assert flatten(index, shape) == (row if row.extent != 1 else 0)


@given(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4), st.data())
def test_reshape_reads_the_same_element(extents: list[int], data: st.DataObject) -> None:
    size = int(np.prod(extents))
    divisor = data.draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0]))
    new = (divisor, size // divisor)
    variables = [LoopVariable(f"i{dim}", sympy.Integer(extent)) for dim, extent in enumerate(new)]
    index = [v if v.extent != 1 else sympy.Integer(0) for v in variables]
    old_index = reshape_index(index, _integers(new), _integers(tuple(extents)))
    source = np.arange(size).reshape(extents)
    for position in np.ndindex(*new):
        values = dict(zip(variables, position, strict=True))
        assert source[tuple(_value(i, values) for i in old_index)] == source.reshape(new)[position]


def test_heads_split_and_merged_again_leave_no_division() -> None:
    token, channel = LoopVariable("t", TOKENS), LoopVariable("c", sympy.Integer(576))
    split = (sympy.Integer(1), TOKENS, sympy.Integer(9), sympy.Integer(64))
    merged = (sympy.Integer(1), TOKENS, sympy.Integer(576))
    inner = reshape_index((sympy.Integer(0), token, channel), merged, split)
    assert flatten(inner, split) == 576 * token + channel


def test_what_lies_below_the_divisor_is_dropped_and_what_may_not_is_kept() -> None:
    head, channel = LoopVariable("h", sympy.Integer(9)), LoopVariable("d", sympy.Integer(64))
    assert floor_div(64 * head + channel, sympy.Integer(64)) == head
    assert modulo(64 * head + channel, sympy.Integer(64)) == channel
    assert floor_div(64 * head + channel + 1, sympy.Integer(64)).has(FloorDiv)
    wide = LoopVariable("d", sympy.Integer(65))
    assert floor_div(64 * head + wide, sympy.Integer(64)).has(FloorDiv)


def test_loop_variables_of_other_extents_are_others() -> None:
    assert LoopVariable("r", sympy.Integer(3)) != LoopVariable("r", sympy.Integer(4))


def test_affine() -> None:
    row, column = LoopVariable("r", TOKENS), LoopVariable("c", sympy.Integer(8))
    assert affine(5 + 16 * row + column, (column, row)) == (5, (1, 16))
    assert affine(row * column, (column, row)) is None
