"""What rounding costs each linear: the relative error of its output on real activations.

Every layer is given what it gets in the model in floats, so that errors do not add up from layer to layer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ..codegen.model_graph import ModelGraph
from ..codegen.ops import linear
from ..codegen.ops.op import compute_dtype
from .calibration import stream
from .graph_pass import Decision, NumericClass, PassContext
from .quantizable_linears import parameters_of, sources_of
from .recipe_layers import layer_names
from .record import LayerError

Sample = Mapping[str, Any]


class LayerErrors:
    """Follows a graph through its passes: linears as they were before any was rounded, next to what takes their places.

    ``samples`` are inputs of the graph as it was captured.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = tuple(samples)
        self._weights: Mapping[str, torch.Tensor] | None = None
        self._calls: dict[str, _FloatCall] = {}

    def before(self, model_graph: ModelGraph, context: PassContext, numeric_class: NumericClass) -> None:
        """To be called before each pass."""
        if numeric_class.is_local:
            if self._weights is None:
                self._weights = dict(model_graph.weights)
            self._calls = _float_calls(model_graph, context.decisions)

    def after(self, model_graph: ModelGraph, context: PassContext) -> tuple[LayerError, ...]:
        """To be called after each pass; the errors of the layers that it has replaced."""
        if context.input_adapter is not None:
            self._samples = tuple(map(context.input_adapter, self._samples))
        calls, self._calls = self._calls, {}
        replaced = {old: new for site in context.sites for old, new in site.replaced.items() if old != new}
        if self._weights is None or not calls.keys() & replaced.keys():
            return ()
        nodes = {node.name: node for node in model_graph.graph.nodes}
        weights = {**model_graph.weights, **self._weights}
        self._weights = None
        # A layer may have been split into a sum of which some parts stay floats: their outputs count too.
        rounded = {layer for old, call in calls.items() if old in replaced for layer in call.layers}
        places = {
            nodes[replaced.get(old, old)]: call.bound(nodes[replaced.get(call.source, call.source)], weights)
            for old, call in calls.items()
            if not rounded.isdisjoint(call.layers)
        }
        sums = _Sums(places)
        for sample in self._samples:
            visits = {node: partial(sums.visit, node) for node in {*places, *sums.sources}}
            stream(model_graph, [sample], visits)
        return sums.errors()


@dataclass(frozen=True)
class _BoundCall:
    """A linear in floats: the node that it reads, and the layers whose outputs lie end to end in its own."""

    source: fx.Node
    weights: tuple[torch.Tensor, ...]
    biases: tuple[torch.Tensor, ...]
    layers: tuple[str, ...]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        dtype = compute_dtype(x)
        bias = torch.cat(self.biases).to(dtype) if self.biases else None
        return F.linear(x.to(dtype), torch.cat(self.weights).to(dtype), bias)


@dataclass(frozen=True)
class _FloatCall:
    """The same by names."""

    source: str
    weights: tuple[str, ...]
    biases: tuple[str, ...]
    layers: tuple[str, ...]
    is_transposed: bool

    def bound(self, source: fx.Node, weights: Mapping[str, torch.Tensor]) -> _BoundCall:
        held = [weights[name].detach() for name in self.weights]
        turned = tuple(weight.t() if self.is_transposed else weight for weight in held)
        return _BoundCall(source, turned, tuple(weights[name].detach() for name in self.biases), self.layers)


def _float_calls(model_graph: ModelGraph, decisions: Mapping[str, Decision]) -> dict[str, _FloatCall]:
    def layer_of(weight: fx.Node) -> str:
        decision = decisions.get(weight.name)
        return layer_names(model_graph, weight)[0] if decision is None else decision.names[0]

    found = {}
    for node in model_graph.calls(linear.overload):
        weight, bias, is_transposed = parameters_of(node)
        weights, biases = sources_of(weight), [] if bias is None else sources_of(bias)
        if all(map(model_graph.is_weight, [*weights, *biases])):
            layers = tuple(map(layer_of, weights))
            names = (tuple(each.name for each in weights), tuple(each.name for each in biases))
            found[node.name] = _FloatCall(node.args[0].name, *names, layers, is_transposed)  # type: ignore[union-attr]
    return found


class _Sums:
    """Squares of errors and of outputs by layer, as samples come; what a call reads is kept until the last has, and
    what a part of a layer gives until the layer is whole."""

    def __init__(self, places: Mapping[fx.Node, _BoundCall]) -> None:
        self._places = places
        self.sources = Counter(call.source for call in places.values())
        # A weight that is used twice is no part of a layer: each use is whole.
        parts = {
            (layer, weight.data_ptr())
            for call in places.values()
            for layer, weight in zip(call.layers, call.weights, strict=True)
        }
        self._num_parts = Counter(layer for layer, _ in parts)
        self._parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._squares: dict[str, tuple[float, float]] = {}
        self._inputs: dict[fx.Node, tuple[torch.Tensor, int]] = {}

    def visit(self, node: fx.Node, values: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """What calls after it are given in place of the values: outputs in floats."""
        (value,) = values
        if node in self._places:
            value = self._measured(self._places[node], value)
        if node in self.sources:
            self._inputs[node] = value, self.sources[node]
        return [value]

    def _measured(self, call: _BoundCall, ours: torch.Tensor) -> torch.Tensor:
        x, num_readers = self._inputs.pop(call.source)
        if num_readers > 1:
            self._inputs[call.source] = x, num_readers - 1
        exact = call(x)
        sizes = [len(weight) for weight in call.weights]
        for layer, part, our_part in zip(call.layers, exact.split(sizes, -1), ours.split(sizes, -1), strict=True):
            parts = self._parts.setdefault(layer, [])
            parts.append((our_part - part, part))
            if len(parts) == self._num_parts[layer]:
                self._add(layer, *map(sum, zip(*self._parts.pop(layer), strict=True)))
        return exact.to(ours.dtype)

    def _add(self, layer: str, error: torch.Tensor, output: torch.Tensor) -> None:
        of_errors, of_outputs = self._squares.get(layer, (0.0, 0.0))
        self._squares[layer] = of_errors + _square(error), of_outputs + _square(output)

    def errors(self) -> tuple[LayerError, ...]:
        return tuple(LayerError(layer, _root(error, size)) for layer, (error, size) in self._squares.items())


def _square(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def _root(error: float, size: float) -> float:
    return math.sqrt(error / size) if size else math.inf if error else 0.0
