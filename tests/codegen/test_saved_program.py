"""Programs as data: what is read back is what was written, and what leads nowhere is refused."""

from __future__ import annotations

import dataclasses
import json
import operator

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from infercomp.codegen.indexing import Element, FloorDiv, LoopVariable
from infercomp.codegen.ops import rms_norm
from infercomp.codegen.saved.driver_nodes import DriverNode, driver_graph, driver_nodes
from infercomp.codegen.saved.expressions import check_expression
from infercomp.codegen.saved.spec_table import spec_of, spec_table
from infercomp.codegen.scalar import Scalar, binary, cast, constant, load, reduction, unary, where
from infercomp.codegen.specs import Buffer, LoopSpec, Store, spec_name
from infercomp.runtime.errors import ModelLoadError, UnsupportedError

N0 = sympy.Symbol("n0", integer=True, positive=True)
ROW, COLUMN = LoopVariable("r", N0), LoopVariable("c", sympy.Integer(64))


@st.composite
def expressions(draw: st.DrawFn) -> sympy.Expr:
    terms = [ROW, COLUMN, N0, sympy.Integer(draw(st.integers(-5, 5))), FloorDiv(ROW, N0 + 1)]
    terms.append(Element(sympy.Symbol("b1"), ROW, sympy.Symbol("int64"), sympy.Integer(7)))
    chosen = draw(st.lists(st.sampled_from(terms), min_size=1, max_size=3))
    return sympy.expand(sum(draw(st.integers(1, 9)) * term * draw(st.sampled_from([1, N0])) for term in chosen))


def scalars() -> st.SearchStrategy[Scalar]:
    values = st.floats(allow_nan=False).map(lambda value: constant(value, torch.float32))
    loads = expressions().map(lambda index: load("b0", index, torch.bfloat16))
    return st.recursive(
        values | loads,
        lambda inner: st.one_of(
            st.builds(unary, st.sampled_from(["exp", "rsqrt", "neg"]), inner),
            st.builds(binary, st.sampled_from(["add", "mul", "maximum"]), inner, inner),
            st.builds(lambda a, b: where(binary("lt", a, b), a, b), inner, inner),
            st.builds(lambda a: cast(a, torch.bfloat16), inner),
            st.builds(lambda a: reduction("sum", a, COLUMN, sympy.Integer(64)), inner),
        ),
        max_leaves=6,
    )


@st.composite
def specs(draw: st.DrawFn) -> LoopSpec:
    stores = st.builds(Store, st.just("b1"), st.just(COLUMN), expressions(), scalars())
    buffers = (Buffer("b0", torch.bfloat16), Buffer("b1", torch.float32, is_written=True))
    return LoopSpec(buffers, ROW, tuple(draw(st.lists(stores, min_size=1, max_size=3))))


@settings(max_examples=60, deadline=None)
@given(specs())
def test_a_spec_is_read_back_from_its_table(spec: LoopSpec) -> None:
    table = json.loads(json.dumps(spec_table(spec)))
    found = spec_of(table, spec_name(spec))
    assert found == spec and spec_name(found) == spec_name(spec)
    assert found.row.extent == N0 and found.row.extent.is_positive


def small_spec() -> LoopSpec:
    store = Store("b1", COLUMN, 64 * ROW + COLUMN, unary("exp", load("b0", 64 * ROW + COLUMN, torch.float32)))
    return LoopSpec((Buffer("b0", torch.float32), Buffer("b1", torch.float32, True)), ROW, (store,))


def test_every_change_of_a_table_is_noticed() -> None:
    """Each number and word of a spec in turn says something else; the name, its hash, tells."""
    spec, num_changed = small_spec(), 0
    table = spec_table(spec)
    for i, entry in enumerate(table):
        for j, value in enumerate(entry[1:], start=1):
            if isinstance(value, (int, str)) and not isinstance(value, bool):
                changed = json.loads(json.dumps(table))
                changed[i][j] = value + 1 if isinstance(value, int) else value + "x"
                with pytest.raises(ModelLoadError):
                    spec_of(changed, spec_name(spec))
                num_changed += 1
    assert num_changed > 30


@pytest.mark.parametrize("table", [[], [["plain", 5]], [["data", "Path", 0]], [["tuple", 0]], [["sympy", "exec"]], [3]])
def test_what_is_no_spec_is_refused(table: list) -> None:
    with pytest.raises(ModelLoadError):
        spec_of(table, "loop_0123")


@pytest.mark.parametrize("text", ["4*s0", "64*(s0 + 1)//16", "Max(s0, s1 - 1)", "-s3 % 5", "1152*s0*s12", "max(s0, 0)"])
def test_arithmetic_over_sizes_is_accepted(text: str) -> None:
    check_expression(text)


OTHER_TEXTS = """
s;x0;s0 ** 99;s0.real;print(s0);__import__('os');[s0];s0 if s1 else 2;True;1.5;Max(s0, key=s1);(lambda: s0)();Max(*s0)
s0 and s1;'s0';s0 s1
"""


@pytest.mark.parametrize("text", ["", "s0; s1", "(" * 500 + "s0", *OTHER_TEXTS.strip().replace("\n", ";").split(";")])
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        check_expression(text)


def make_driver() -> fx.Graph:
    graph = fx.Graph()
    x, n = graph.placeholder("x"), graph.placeholder("n")
    call = graph.call_module("native_step_0", (x, n))
    first = graph.call_function(operator.getitem, (call, 0))
    doubled = graph.call_function(operator.mul, (n, 2))
    view = graph.call_function(torch.ops.aten.view.default, (first, [doubled, -1]))
    part = graph.call_function(torch.ops.aten.slice.Tensor, (view, 0, None, 3))
    cast_ = graph.call_function(torch.ops.aten.to.dtype, (part, torch.float64), {"copy": True})
    normed = graph.call_function(rms_norm.definition, (cast_, None, 1e-5))
    graph.output((normed, [view, None]))
    return graph


def test_a_driver_is_read_back() -> None:
    graph = make_driver()
    nodes = driver_nodes(graph)
    found = driver_graph(nodes, 1)
    assert str(found) == str(graph)
    assert driver_nodes(found) == nodes
    assert [n.target for n in found.nodes if n.op == "call_function"] == [
        n.target for n in graph.nodes if n.op == "call_function"
    ]


@pytest.mark.parametrize(
    "node",
    [
        DriverNode("y", "call", "step 1"),
        DriverNode("y", "call", "os.system", ("true",)),
        DriverNode("y", "call", "aten.from_file.default", ("a file",)),
        DriverNode("y", "call", "aten.no_such_op.default"),
        DriverNode("y", "call", "infercomp.no_such_op"),
        DriverNode("y", "call", "operator.attrgetter"),
        DriverNode("import os; y", "placeholder"),
        DriverNode("class", "placeholder"),
        DriverNode("x", "placeholder"),
        DriverNode("y", "call", "operator.neg", ({"node": "z"},)),
        DriverNode("y", "call", "operator.neg", ({"dtype": "Tensor"},)),
        DriverNode("y", "call", "operator.neg", ({"layout": "load"},)),
    ],
)
def test_a_driver_that_leads_elsewhere_is_refused(node: DriverNode) -> None:
    nodes = (DriverNode("x", "placeholder"), node, DriverNode("output", "output", "", ({"node": "x"},)))
    with pytest.raises((ValueError, LookupError)):
        driver_graph(nodes, 1)


def test_a_driver_without_output_is_refused() -> None:
    with pytest.raises(ValueError):
        driver_graph((DriverNode("x", "placeholder"),), 0)


def test_a_call_that_has_no_name_cannot_be_saved() -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(len, (graph.placeholder("x"),)))
    with pytest.raises(UnsupportedError, match="len"):
        driver_nodes(graph)


def test_nodes_have_no_more_fields_than_these() -> None:
    """What is added to a node must be written and read too."""
    assert [each.name for each in dataclasses.fields(DriverNode)] == ["name", "op", "target", "args", "kwargs"]
