"""Costs of kernels against numbers worked out by hand, and counted elements against a walk over every index."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import sympy
import torch
from graph_testing import captured
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from infercomp.codegen.accesses import Access, num_elements
from infercomp.codegen.costs import Cost, SequenceLengths, cost_of, label_of
from infercomp.codegen.grouping import Planner
from infercomp.codegen.indexing import Element, FloorDiv, LoopVariable, floor_div, modulo
from infercomp.codegen.ops import attention, gated_activation, rms_norm, rotary_embedding
from infercomp.codegen.scalar import accumulator, load
from infercomp.codegen.specs import Buffer, KernelSpec, LoopSpec, MatmulSpec, PagedAttentionSpec, Store
from infercomp.codegen.weight_panels import grouped
from infercomp.passes.config import PassConfig
from infercomp.passes.pipeline import run_pipeline

TOKENS = 5
_FORWARDS = (
    lambda self, a: self.given(a),
    lambda self, a, b: self.given(a, b),
    lambda self, a, b, c: self.given(a, b, c),
    lambda self, a, b, c, d: self.given(a, b, c, d),
)


def specs_of(function: Callable[..., torch.Tensor], *inputs: torch.Tensor, **weights: torch.Tensor) -> list[KernelSpec]:
    """The specs of all kernels of a function of these inputs and weights, every size a number."""

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, weight in weights.items():
                self.register_parameter(name, nn.Parameter(weight, requires_grad=False))

        def given(self, *given: torch.Tensor) -> torch.Tensor:
            return function(*given, **{name: getattr(self, name) for name in weights})

    # A graph is captured from a forward whose arguments have names.
    Module.forward = _FORWARDS[len(inputs) - 1]  # type: ignore[method-assign, assignment]
    model_graph = captured(Module().eval(), *inputs)
    run_pipeline(model_graph, PassConfig())
    return [group.spec for group in Planner(model_graph).plan().groups]


def one_cost(function: Callable[..., torch.Tensor], *inputs: torch.Tensor, **weights: torch.Tensor) -> Cost:
    (spec,) = specs_of(function, *inputs, **weights)
    return cost_of(spec, ())


def test_an_addition_moves_three_tensors() -> None:
    x = torch.randn(TOKENS, 8)
    assert one_cost(lambda x, y: x + y, x, x.clone()) == Cost(3 * TOKENS * 8 * 4, {"float32": TOKENS * 8})


def test_a_bias_is_read_once_for_all_rows() -> None:
    cost = one_cost(lambda x, bias: x + bias, torch.randn(TOKENS, 8), bias=torch.randn(8))
    assert cost.num_bytes == 2 * TOKENS * 8 * 4 + 8 * 4


def test_a_norm_reads_its_row_once_though_it_loads_it_twice() -> None:
    x, weight = torch.randn(TOKENS, 16).bfloat16(), torch.randn(16).bfloat16()
    cost = one_cost(lambda x, weight: rms_norm(x, weight, 1e-6, False), x, weight=weight)
    assert cost.num_bytes == 2 * TOKENS * 16 * 2 + 16 * 2
    # For each channel a square, its addition, and two scalings; for each row the mean, epsilon and a root.
    assert cost.operations == {"float32": TOKENS * (4 * 16 + 3)}


def test_an_embedding_reads_the_rows_that_it_gathers_and_not_the_table() -> None:
    ids = torch.zeros(TOKENS, dtype=torch.int64)
    cost = one_cost(lambda ids, table: nn.functional.embedding(ids, table), ids, table=torch.randn(1000, 16))
    assert cost == Cost(TOKENS * 8 + 2 * TOKENS * 16 * 4, {"float32": 0})


def test_rotary_tables_are_read_once_for_all_heads() -> None:
    x, table = torch.randn(1, 3, TOKENS, 8), torch.randn(TOKENS, 8)
    cost = one_cost(lambda x, cos, sin: rotary_embedding(x, cos, sin, False), x, table, table.clone())
    assert cost.num_bytes == (2 * 3 * TOKENS * 8 + 2 * TOKENS * 8) * 4
    # Two products and a sum for each channel, and a sign for the first half of them.
    assert cost.operations == {"float32": 3 * TOKENS * (3 * 8 + 4)}


def test_a_cache_write_moves_its_tokens_and_not_the_cache() -> None:
    row, column = LoopVariable("r", sympy.Integer(2 * TOKENS)), LoopVariable("c", sympy.Integer(8))
    slot = Element(sympy.Symbol("b1"), floor_div(row, sympy.Integer(2)), sympy.Symbol("int64"), sympy.Integer(640))
    block, offset = floor_div(slot, sympy.Integer(16)), modulo(slot, sympy.Integer(16))
    place = 2 * 8 * 16 * block + 8 * 16 * modulo(row, sympy.Integer(2)) + 16 * column + offset
    buffers = (Buffer("b0", torch.float32), Buffer("b1", torch.int64), Buffer("b2", torch.float32, True))
    key = load("b0", 8 * row + column, torch.float32)
    cost = cost_of(LoopSpec(buffers, row, (Store("b2", column, place, key),)), ())
    # The key is read and written, and a slot read for each token.
    assert cost.num_bytes == 2 * TOKENS * 2 * 8 * 4 + TOKENS * 8


@pytest.mark.parametrize(
    ("dtype", "unit"), [(torch.float32, "float32"), (torch.bfloat16, "bfloat16")], ids=["float32", "bfloat16"]
)
def test_a_linear_reads_whole_panels(dtype: torch.dtype, unit: str) -> None:
    x, weight = torch.randn(TOKENS, 48).to(dtype), torch.randn(40, 48).to(dtype)
    cost = one_cost(lambda x, weight: nn.functional.linear(x, weight), x, weight=weight)
    panels = 2 * 32 * 48  # forty outputs fill a panel of 32 and part of another
    assert cost.num_bytes == (TOKENS * 48 + panels + TOKENS * 40) * dtype.itemsize
    assert cost.operations[unit] == 2 * TOKENS * 48 * 40


def test_a_2_of_4_linear_reads_and_multiplies_what_is_kept() -> None:
    x, weight = torch.randn(TOKENS, 48), torch.randn(64, 48)
    masked = weight * torch.tensor([0.0, 1.0, 0.0, 1.0]).repeat(12)
    dense, sparse = (one_cost(lambda x, w: nn.functional.linear(x, w), x, w=each) for each in (weight, masked))
    # Of 48 inputs 24 floats an output, and a word of places for 32 of them or what is left.
    assert dense.num_bytes - sparse.num_bytes == 64 * (48 - 24 - 2) * 4
    assert sparse.operations == {"float32": dense.operations["float32"] // 2}


def test_a_gated_linear_has_both_halves_and_its_activation() -> None:
    x, weight = torch.randn(TOKENS, 48), torch.randn(64, 48)

    def gated(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        gate, up = nn.functional.linear(x, weight).chunk(2, -1)
        return gated_activation(gate, up, "silu")

    (spec,) = specs_of(gated, x, weight=weight)
    assert label_of(spec) == "matmul f32 48 → 64"
    cost = cost_of(spec, ())
    assert cost.num_bytes == (TOKENS * 48 + 64 * 48 + TOKENS * 32) * 4
    assert 2 * TOKENS * 48 * 64 + TOKENS * 32 < cost.operations["float32"] < 2 * TOKENS * 48 * 64 + TOKENS * 32 * 8


def test_a_4_bit_linear_reads_values_scales_and_the_sums_of_its_rows() -> None:
    row, column = LoopVariable("r", sympy.Symbol("n0")), LoopVariable("c", sympy.Integer(64))
    buffers = (Buffer("b0", torch.int8), Buffer("b1", torch.uint8), Buffer("b2", torch.int32))
    stores = (Store("elsewhere", column, sympy.sympify(column), accumulator(sympy.Integer(0), torch.float32)),)
    stride = sympy.Integer(128)
    spec = MatmulSpec(
        buffers, grouped(4, 32, "middle"), "panels", torch.int8, row, 128, stride, sympy.Integer(0), 16, stores
    )
    cost = cost_of(spec, (3,))
    # Two panels of four groups: half a byte a weight and a float16 scale an output; rows of bytes; a sum a group.
    assert cost.num_bytes == 2 * 4 * (32 * 32 // 2 + 32 * 2) + 3 * 128 + 3 * 4 * 4
    assert cost.operations["int8"] == 2 * 3 * 128 * 64


def paged(window: int | None = None) -> PagedAttentionSpec:
    n0, n1, n2, n3 = (sympy.Symbol(f"n{i}", integer=True, positive=True) for i in range(4))
    kinds = [torch.bfloat16] * 3 + [torch.int64] * 3 + [torch.bfloat16]
    buffers = tuple(Buffer(f"b{i}", kind, i == 6) for i, kind in enumerate(kinds))
    strides = (sympy.Integer(48), sympy.Integer(8))
    return PagedAttentionSpec(
        buffers, n0, n1, n2, n3, 6, 2, 8, 8, sympy.Integer(0), strides, 0.3, window, None, None, None
    )


def test_decoding_reads_every_cached_key_and_value_once() -> None:
    cost = cost_of(paged(), (2, 2, 9, 16), [SequenceLengths(1, 20), SequenceLengths(1, 100)])
    queries_and_results = 2 * 6 * (8 + 8) * 2
    keys_and_values = (20 + 100) * 2 * (8 + 8) * 2
    integers = (2 + 7 + 2 + 3) * 8  # blocks of both tables, lengths, starts
    assert cost.num_bytes == queries_and_results + keys_and_values + integers
    assert cost.operations == {"bfloat16": 2 * 6 * 120 * (8 + 8)}


def test_a_cache_of_codes_is_read_with_its_scales() -> None:
    spec, lengths = paged(), [SequenceLengths(1, 20), SequenceLengths(1, 100)]
    kinds = [torch.bfloat16, torch.int8, torch.int8, *[torch.int64] * 3, *[torch.float32] * 2, torch.bfloat16]
    codes = replace(spec, buffers=tuple(Buffer(f"b{i}", kind, i == 8) for i, kind in enumerate(kinds)))
    saved = cost_of(spec, (2, 2, 9, 16), lengths).num_bytes - cost_of(codes, (2, 2, 9, 16), lengths).num_bytes
    assert saved == (20 + 100) * 2 * ((8 + 8) * (2 - 1) - 2 * 4)


def test_a_prompt_sees_half_of_the_square() -> None:
    cost = cost_of(paged(), (4, 1, 1, 16), [SequenceLengths(4, 4)])
    assert cost.operations == {"bfloat16": 2 * 6 * (1 + 2 + 3 + 4) * 16}


def test_a_window_limits_what_is_read_and_computed() -> None:
    cost = cost_of(paged(window=3), (2, 1, 1, 16), [SequenceLengths(2, 10)])
    assert cost.operations == {"bfloat16": 2 * 6 * (3 + 3) * 16}
    unlimited = cost_of(paged(), (2, 1, 1, 16), [SequenceLengths(2, 10)])
    assert unlimited.num_bytes - cost.num_bytes == (10 - 4) * 2 * 16 * 2


def test_attention_over_given_keys() -> None:
    q, k = torch.randn(2, 4, TOKENS, 8), torch.randn(2, 2, TOKENS, 8)
    cost = one_cost(lambda q, k, v: attention(q, k, v, scale=1.0, is_causal=True), q, k, k.clone())
    assert cost.num_bytes == 2 * (TOKENS * 4 + TOKENS * 2) * 16 * 4
    assert cost.operations == {"float32": 2 * 2 * 4 * (TOKENS * (TOKENS + 1) // 2) * 16}


def test_time_is_the_larger_of_moving_and_computing() -> None:
    peaks = {"float32": 10.0, "int8": 100.0}
    assert Cost(100, {"float32": 5}).seconds(10.0, peaks) == 10.0
    assert Cost(1, {"float32": 50, "int8": 100}).seconds(10.0, peaks) == 6.0
    assert Cost(0, {"bfloat16": 20}).seconds(1.0, peaks) == 2.0


ROW, COLUMN = LoopVariable("r", sympy.Integer(12)), LoopVariable("c", sympy.Integer(6))
INDICES = [
    ROW,
    COLUMN,
    6 * ROW + COLUMN,
    6 * floor_div(ROW, sympy.Integer(3)) + COLUMN,
    6 * modulo(ROW, sympy.Integer(4)) + COLUMN,
    24 * floor_div(ROW, sympy.Integer(4)) + 4 * COLUMN + modulo(ROW, sympy.Integer(4)),
    2 * COLUMN,
    FloorDiv(COLUMN, sympy.Integer(2)),
    sympy.Integer(3),
]


@settings(max_examples=150)
@given(
    st.sampled_from(INDICES),
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=3),
)
def test_counted_elements_are_those_that_a_walk_finds(index: sympy.Expr, parts: list[tuple[int, int, int]]) -> None:
    accesses = [
        Access("b", index + constant, {ROW: (0, 12), COLUMN: (min(ends), max(ends))}) for constant, *ends in parts
    ]
    walked = [elements_of(access) for access in accesses]
    counted = num_elements(accesses)
    if len(accesses) == 1:
        assert counted == len(walked[0])
    assert len(set().union(*walked)) <= counted <= sum(map(len, walked))
    if index in (6 * ROW + COLUMN, COLUMN) and all(c == parts[0][0] for c, *_ in parts):
        assert counted == len(set().union(*walked))


def elements_of(access: Access) -> set[int]:
    rows, columns = (range(*access.box[variable]) for variable in (ROW, COLUMN))
    if not access.index.has(COLUMN):
        columns = range(1)
    return {int(access.index.subs({ROW: r, COLUMN: c})) for r, c in product(rows, columns)}


def test_the_walk_notices_rows_counted_twice() -> None:
    """Heads of one token share their tables: counting a row for each head is the error that the walk must see."""
    index = 6 * floor_div(ROW, sympy.Integer(3)) + COLUMN
    access = Access("b", index, {ROW: (0, 12), COLUMN: (0, 6)})
    assert len(elements_of(access)) == 4 * 6 != 12 * 6


def test_every_kind_has_a_label() -> None:
    (loop,) = specs_of(lambda x: x + 1, torch.randn(TOKENS, 8))
    assert isinstance(loop, LoopSpec) and label_of(loop) == "loop"
    assert label_of(paged()) == "paged attention 6/2 heads of 8"
