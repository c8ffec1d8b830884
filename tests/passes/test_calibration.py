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
from infercomp.passes.calibration import Calibration, largest_of_channels, observe, second_moment, some_tokens, stream
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


@given(st.lists(st.integers(2, 9), min_size=1, max_size=4), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_statistics_are_those_of_all_tokens_of_all_samples(lengths: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(1, length, 6, generator=generator) for length in lengths]
    wanted = {node.args[0]: node.name for node in LINEARS}
    found: dict[fx.Node, tuple[torch.Tensor, ...]] = {}

    def visit(node: fx.Node, values: Sequence[torch.Tensor]) -> None:
        found[node] = largest_of_channels(values), second_moment(values), some_tokens(values, 5)

    observe(GRAPH, Calibration(tuple({INPUT: value} for value in values)), wanted, visit)
    tokens = torch.cat(values, 1)[0]
    with torch.no_grad():
        hidden = F.relu(CHAIN.first(tokens))
        expected = [tokens, hidden, F.gelu(CHAIN.second(hidden))]
    for node, value in zip(LINEARS, expected, strict=True):
        maxima, moment, some = found[node.args[0]]
        torch.testing.assert_close(maxima, value.abs().amax(0), rtol=1e-5, atol=1e-6)
        exact = 2 / len(value) * value.double().t() @ value.double()
        torch.testing.assert_close(moment.double(), exact, rtol=1e-5, atol=1e-6)
        assert len(value) / 2 < len(some) * -(-len(value) // 5) <= len(value) + 5 and len(some) <= 5
        assert all(bool(torch.isclose(value, row, atol=1e-6).all(-1).any()) for row in some)


def test_a_weight_that_a_visit_replaces_counts_from_there_on() -> None:
    first, second = LINEARS[0].args[1].name, LINEARS[1].args[1].name
    before = dict(GRAPH.weights)
    inputs: dict[fx.Node, torch.Tensor] = {}

    def visit(node: fx.Node, values: Sequence[torch.Tensor]) -> None:
        inputs[node] = values[0]
        GRAPH.weights[first if node is LINEARS[0].args[0] else second] *= 0

    try:
        GRAPH.weights |= {name: GRAPH.weights[name].clone() for name in (first, second)}
        wanted = {node.args[0]: node.name for node in LINEARS}
        observe(GRAPH, Calibration(({INPUT: torch.randn(1, 4, 6)},)), wanted, visit)
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
        observe(GRAPH, Calibration(tuple({INPUT: value} for value in values)), wanted, lambda node, values: None)


def test_no_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="no samples") as caught:
        Calibration(())
    assert caught.value.field == "calibration"
