"""The symbolic value of an index-built tensor is its real value at every index, or openly unknown."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infercomp.codegen.model_graph import ModelGraph
from infercomp.passes.index_algebra import KEY, QUERY, IndexEvaluator, reshape_index
from tests.graph_testing import captured, outputs, run_passes

Program = Callable[[torch.Tensor], torch.Tensor]


LENGTHS = (2, 3, 5)


def value_and_graph(program: Program) -> tuple[Any, ModelGraph]:
    """The program's value at [query, key] with a symbolic length, and its graph."""
    model_graph = captured(program, torch.zeros(5, 1), dynamic={0: 0})
    run_passes(model_graph, "normalize")
    node = model_graph.output_node().args[0][0]
    return IndexEvaluator(model_graph).evaluate(node, (QUERY, KEY)), model_graph


def is_known(value: Any) -> bool:
    return not any(not isinstance(each, sympy.Piecewise) for each in sympy.sympify(value).atoms(sympy.Function))


def at(value: Any, query: int, key: int, length: int) -> Any:
    """The value at one place; every other symbol left is the length."""
    value = sympy.sympify(value).subs({QUERY: query, KEY: key})
    return value.subs(dict.fromkeys(value.free_symbols, length))


def assert_agrees(program: Program, *, known: bool | None = None) -> None:
    value, model_graph = value_and_graph(program)
    if known is not None:
        assert is_known(value) == known, value
    for length in LENGTHS if is_known(value) else ():
        (tensor,) = outputs(model_graph, [torch.zeros(length, 1)])
        for query, key in itertools.product(range(tensor.shape[0]), range(tensor.shape[1])):
            symbolic = at(value, query, key, length)
            number = {sympy.true: 1.0, sympy.false: 0.0}.get(symbolic, symbolic)
            assert float(number) == pytest.approx(float(tensor[query, key])), (value, query, key, length)


def rows(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.shape[0])[:, None]


def columns(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.shape[0])[None]


def causal(x: torch.Tensor) -> torch.Tensor:
    return columns(x) <= rows(x)


KNOWN: dict[str, Program] = {
    "comparison": causal,
    "tril": lambda x: torch.ones(x.shape[0], x.shape[0]).tril(),
    "triu_of_bool": lambda x: torch.ones(x.shape[0], x.shape[0], dtype=torch.bool).triu(1),
    "tril_below": lambda x: torch.tril(torch.full((x.shape[0], x.shape[0]), 2.0), -1),
    "junctions": lambda x: (causal(x) & (rows(x) - columns(x) < 3)) | (columns(x) == 0),
    "product_of_bools": lambda x: causal(x) * (columns(x) > 1),
    "sum_of_bools": lambda x: causal(x) + (columns(x) > 1),
    "negation": lambda x: ~causal(x),
    "where_of_numbers": lambda x: torch.where(causal(x), 0.0, float("-inf")),
    "masked_fill": lambda x: torch.zeros(x.shape[0], x.shape[0]).masked_fill(~causal(x), -1e9),
    "compared_to_infinity": lambda x: torch.where(causal(x), 0.0, float("-inf")) == float("-inf"),
    "above_infinity": lambda x: torch.where(causal(x), 0.0, float("-inf")) > float("-inf"),
    "one_minus": lambda x: (1.0 - torch.ones(x.shape[0], x.shape[0]).tril()) * -1e4,
    "cast_to_bool": lambda x: torch.ones(x.shape[0], x.shape[0]).tril().to(torch.bool),
    "cast_to_int": lambda x: causal(x).to(torch.int64) + columns(x),
    "cumsum_of_ones": lambda x: torch.ones_like(columns(x)).cumsum(1) - 1 <= rows(x),
    "difference": lambda x: torch.diff(columns(x), prepend=columns(x)[:, :1] - 1) + rows(x),
    "slice": lambda x: torch.arange(2 * x.shape[0])[None, x.shape[0] :] - rows(x),
    "strided_slice": lambda x: torch.arange(2 * x.shape[0])[None, 1::2] - rows(x),
    "transposed": lambda x: causal(x).mT,
    "expanded": lambda x: columns(x).expand(x.shape[0], -1) + 0,
    "flattened": lambda x: causal(x).reshape(1, 1, x.shape[0], x.shape[0])[0, 0],
    "selected": lambda x: torch.arange(6).reshape(2, 3)[1].select(0, -1) + causal(x),
    "gathered": lambda x: torch.arange(x.shape[0])[rows(x)] >= columns(x),
    "absolute": lambda x: (rows(x) - columns(x)).abs(),
    "negative": lambda x: -(rows(x) - columns(x)),
    "start_and_step": lambda x: torch.arange(1, 1 + 2 * x.shape[0], 2)[None] - rows(x),
    "length_in_value": lambda x: columns(x) - (x.shape[0] - 1) + 0 * rows(x),
    "reversed_subtraction": lambda x: 1 - causal(x).to(torch.int64),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_value_is_the_tensor(name: str) -> None:
    assert_agrees(KNOWN[name], known=True)


OPAQUE: dict[str, Program] = {
    "bits_of_integers": lambda x: rows(x) & columns(x),
    "complement_of_integers": lambda x: ~rows(x) + columns(x),
    "subtraction_with_alpha": lambda x: torch.sub(rows(x), columns(x), alpha=2),
    "reversed_subtraction_with_alpha": lambda x: torch.rsub(rows(x), 7, alpha=2) + 0 * columns(x),
    "negative_index": lambda x: torch.arange(x.shape[0])[rows(x) - 1] + columns(x),
    "difference_of_bools": lambda x: torch.diff(causal(x), prepend=causal(x)[:, :1], dim=1),
    "cumsum_that_is_no_count": lambda x: columns(x).cumsum(1) + rows(x),
    "modulo": lambda x: rows(x) % 2 + columns(x),
    "flipped": lambda x: columns(x).flip(1) + rows(x),
    "input": lambda x: x + columns(x),
}


@pytest.mark.parametrize("name", OPAQUE)
def test_what_is_not_understood_is_openly_unknown(name: str) -> None:
    assert_agrees(OPAQUE[name], known=False)


def test_a_square_table_of_a_causal_buffer_is_known() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.ones(64, 64, dtype=torch.bool).tril()[None, None])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.table[0, 0, : x.shape[0], : x.shape[0]] & (columns(x) >= 0)

    model_graph = captured(Model(), torch.zeros(5, 1), dynamic={0: 0}, largest=63)
    run_passes(model_graph, "normalize")
    value = IndexEvaluator(model_graph).evaluate(model_graph.output_node().args[0][0], (QUERY, KEY))
    seen = [[bool(at(value, query, key, 4)) for key in range(4)] for query in range(4)]
    assert torch.equal(torch.tensor(seen), torch.ones(4, 4, dtype=torch.bool).tril())


@st.composite
def integer_terms(draw: st.DrawFn, depth: int = 0) -> Program:
    leaf = depth > 2 or draw(st.booleans())
    if leaf:
        return draw(st.sampled_from((rows, columns, lambda x: torch.ones(x.shape[0], 1, dtype=torch.int64))))
    left, right = draw(integer_terms(depth=depth + 1)), draw(integer_terms(depth=depth + 1))
    number = draw(st.integers(-3, 3))
    return draw(
        st.sampled_from(
            (
                lambda x: left(x) + right(x),
                lambda x: left(x) - right(x),
                lambda x: left(x) * number,
                lambda x: number - left(x),
                lambda x: torch.where(left(x) > right(x) + number, left(x), right(x)),
                lambda x: (left(x) >= number).to(torch.int64) * number,
                lambda x: right(x).mT + left(x),
                lambda x: (left(x) - number).abs(),
                lambda x: left(x).masked_fill(right(x) == number, 7),
            )
        )
    )


@settings(max_examples=20, derandomize=True, database=None)
@given(integer_terms())
def test_drawn_integer_programs_agree_with_their_value(term: Program) -> None:
    assert_agrees(lambda x: term(x) + 0 * rows(x) + 0 * columns(x))


@settings(max_examples=60, derandomize=True, database=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=3), st.data())
def test_a_reshape_reads_the_same_element(sizes: list[int], data: st.DataObject) -> None:
    total = torch.Size(sizes).numel()
    divisors = [each for each in range(1, total + 1) if total % each == 0]
    first = data.draw(st.sampled_from(divisors))
    target = (first, total // first)
    tensor = torch.arange(total)
    for index in itertools.product(*map(range, target)):
        mapped = reshape_index(tuple(sizes), target, tuple(sympy.Integer(place) for place in index))
        if mapped is not None:
            read = tensor.reshape(sizes)[tuple(int(place) for place in mapped)]
            assert read == tensor.reshape(target)[index]
