"""Streaming a graph over samples: the values are the model's, and nothing is kept or computed without need."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from graph_testing import captured, run_passes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from infercomp.codegen.model_graph import ModelGraph
from infercomp.codegen.ops import linear
from infercomp.passes.calibration import (
    Calibration,
    Tensors,
    largest_of_channels,
    observe,
    second_moment,
    some_tokens,
    stream,
)
from infercomp.runtime.errors import ConfigError, NumericalError


class Chain(nn.Module):
    """Three linears, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(F.gelu(self.second(F.relu(self.first(x)))))


CHAIN = Chain()


def graph() -> tuple[ModelGraph, list[fx.Node]]:
    model_graph = captured(CHAIN, torch.zeros(1, 3, 6), dynamic={0: 1})
    run_passes(model_graph, "normalize", "recognize_linear")
    return model_graph, model_graph.calls(linear.overload)


GRAPH, LINEARS = graph()
(INPUT,) = GRAPH.input_names
SAMPLE = torch.randn(1, 4, 6)


def statistics(values: Sequence[torch.Tensor]) -> Tensors:
    return {"a": largest_of_channels(values), "b": second_moment(values), "c": some_tokens(values, 5)}


@given(st.lists(st.integers(2, 9), min_size=1, max_size=4), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_statistics_are_those_of_all_tokens_of_all_samples(lengths: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(1, length, 6, generator=generator) for length in lengths]
    wanted = {node.args[0]: node.name for node in LINEARS}
    found: dict[fx.Node, Tensors] = {}
    calibration = Calibration(tuple({INPUT: value} for value in values))
    observe(GRAPH, calibration, wanted, "statistics", lambda node, values: statistics(values), found.__setitem__)
    tokens = torch.cat(values, 1)[0]
    with torch.no_grad():
        hidden = F.relu(CHAIN.first(tokens))
        expected = [tokens, hidden, F.gelu(CHAIN.second(hidden))]
    for node, value in zip(LINEARS, expected, strict=True):
        maxima, moment, some = found[node.args[0]].values()
        torch.testing.assert_close(maxima, value.abs().amax(0), rtol=1e-5, atol=1e-6)
        exact = 2 / len(value) * value.double().t() @ value.double()
        torch.testing.assert_close(moment.double(), exact, rtol=1e-5, atol=1e-6)
        assert len(value) / 2 < len(some) * -(-len(value) // 5) <= len(value) + 5 and len(some) <= 5
        assert all(bool(torch.isclose(value, row, atol=1e-6).all(-1).any()) for row in some)


def first_value(node: fx.Node, values: Sequence[torch.Tensor]) -> Tensors:
    return {"value": values[0]}


def test_a_weight_that_a_visit_replaces_counts_from_there_on() -> None:
    first, second = LINEARS[0].args[1].name, LINEARS[1].args[1].name
    before = dict(GRAPH.weights)
    inputs: dict[fx.Node, torch.Tensor] = {}

    def visit(node: fx.Node, measured: Tensors) -> None:
        inputs[node] = measured["value"]
        GRAPH.weights[first if node is LINEARS[0].args[0] else second] *= 0

    try:
        GRAPH.weights |= {name: GRAPH.weights[name].clone() for name in (first, second)}
        wanted = {node.args[0]: node.name for node in LINEARS}
        observe(GRAPH, Calibration(({INPUT: torch.randn(1, 4, 6)},)), wanted, "value", first_value, visit)
    finally:
        GRAPH.weights |= before
    with torch.no_grad():
        hidden = F.relu(CHAIN.first.bias)
        torch.testing.assert_close(inputs[LINEARS[1].args[0]][0, 0], hidden)
        torch.testing.assert_close(inputs[LINEARS[2].args[0]][0, 0], F.gelu(CHAIN.second.bias))


def test_layers_are_shown_in_order_and_their_values_go() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    seen = []

    def visit(name: str, values: Sequence[torch.Tensor]) -> None:
        seen.append((name, len(values)))
        assert all(reference() is None for reference in alive), "values of the layer before are still held"
        alive[:] = [weakref.ref(value) for value in values]

    # The input is the caller's; what is computed has to go.
    nodes = [node.args[0] for node in LINEARS[1:]]
    samples = [{INPUT: torch.randn(1, 4, 6)} for _ in range(3)]
    stream(GRAPH, samples, {node: (lambda values, name=node.name: visit(name, values)) for node in nodes})
    assert seen == [(node.name, 3) for node in nodes]


def test_what_is_behind_the_last_value_is_not_computed() -> None:
    calls = []
    target = LINEARS[2].target
    LINEARS[2].target = lambda *_: calls.append(1)
    try:
        stream(GRAPH, [{INPUT: torch.randn(1, 4, 6)}], {LINEARS[2].args[0]: lambda values: None})
        assert not calls
        stream(GRAPH, [{INPUT: torch.randn(1, 4, 6)}], {LINEARS[2]: lambda values: None})
        assert calls == [1]
    finally:
        LINEARS[2].target = target


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_names_layer_and_sample(bad: float) -> None:
    values = [torch.randn(1, 4, 6) for _ in range(3)]
    values[1][0, 2, 3] = bad
    wanted = {LINEARS[0].args[0]: "layers.0.q_proj"}
    with pytest.raises(NumericalError, match=r"input of layers\.0\.q_proj is not finite in calibration sample 1"):
        calibration = Calibration(tuple({INPUT: value} for value in values))
        observe(GRAPH, calibration, wanted, "value", first_value, lambda node, measured: None)


def test_no_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="no samples") as caught:
        Calibration(())
    assert caught.value.field == "calibration"


class Kept(dict[str, Tensors]):
    """What is measured, in memory."""

    read = dict.get
    write = dict.__setitem__


def measured_again(kept: Kept, *, method: str = "value", sample: torch.Tensor = SAMPLE) -> tuple[list[fx.Node], list]:
    """The nodes that were measured, and those that were visited, with what was found."""
    measured: list[fx.Node] = []
    visited: list[tuple[fx.Node, torch.Tensor]] = []

    def measure(node: fx.Node, values: Sequence[torch.Tensor]) -> Tensors:
        measured.append(node)
        return {"value": values[0]}

    calibration = Calibration(({INPUT: sample},), measured=kept)
    wanted = {node.args[0]: node.name for node in LINEARS}
    observe(GRAPH, calibration, wanted, method, measure, lambda node, found: visited.append((node, found["value"])))
    return measured, visited


def test_what_was_measured_is_not_measured_again() -> None:
    kept = Kept()
    first, visited = measured_again(kept)
    assert first == [node.args[0] for node in LINEARS]
    del kept[max(kept)]
    second, again = measured_again(kept)
    assert second == [LINEARS[2].args[0]]
    assert [node for node, _ in again] == first
    assert all(torch.equal(old, new) for (_, old), (_, new) in zip(visited, again, strict=True))
    assert measured_again(kept)[0] == []


def test_what_depends_on_other_things_is_measured_anew() -> None:
    kept = Kept()
    measured_again(kept)
    assert len(measured_again(kept, method="value 2")[0]) == len(measured_again(kept, sample=SAMPLE + 1)[0]) == 3
    weight = LINEARS[0].args[1].name
    before = GRAPH.weights[weight]
    GRAPH.weights[weight] = before + 1e-3
    try:
        assert len(measured_again(kept)[0]) == 3
    finally:
        GRAPH.weights[weight] = before
    assert measured_again(kept)[0] == []
