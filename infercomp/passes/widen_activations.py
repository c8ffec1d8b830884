"""Activations that 8 bits harm stay floats: mixed precision by tensor (Bondarenko et al. 2021).

    int8_linear(quantize_per_token(x), w)    ->    int8_weight_linear(x, w)        later, in quantize_linears

For layers whose recipe has a ``harmful_error``: each input x is rounded as it would be, for the calibration samples,
and where that changes the output of one of the linears that read it by more, relative to its size, all of these keep
8-bit weights only. Changes nothing itself: what it decides of a layer is what ``quantize_linears`` does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import fx

from ..codegen.model_graph import ModelGraph
from ..runtime.errors import ConfigError
from .calibration import Calibration, Tensors, observe, some_tokens
from .graph_pass import Decision, Pass, PassContext
from .linear_recipes import W8A8, W8A16, LinearRecipe
from .quantizable_linears import QuantizableLinears, parameters_of
from .static_grids import rounded_activations

_NUM_TOKENS = 512


def run(model_graph: ModelGraph, context: PassContext) -> None:
    recipe = context.config.recipe
    if recipe is None or all(_bound(each) is None for _, each in recipe.rules):
        return
    if context.calibration is None:
        what = "finding activations that 8 bits harm needs samples of text"
        raise ConfigError(what, remedy="LLM(..., calibration=texts)", field="calibration")
    linears = QuantizableLinears(model_graph, context, recipe)
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node, its_recipe in linears.chosen.items():
        if _bound(its_recipe) is not None:
            readers.setdefault(node.args[0], []).append(node)  # type: ignore[arg-type]
    _Widener(model_graph, context, linears).widen(readers, context.calibration)


def _bound(recipe: LinearRecipe | None) -> float | None:
    return recipe.harmful_error if isinstance(recipe, W8A8) else None


def _grid(recipe: LinearRecipe) -> str:
    """What of a recipe the rounding of activations depends on."""
    return f"{recipe.activation_scale} {recipe.activation_percentile}" if isinstance(recipe, W8A8) else ""


class _Widener:
    """Decides of the inputs of one graph's linears."""

    def __init__(self, model_graph: ModelGraph, context: PassContext, linears: QuantizableLinears) -> None:
        self._model_graph = model_graph
        self._context = context
        self._linears = linears

    def widen(self, readers: dict[fx.Node, list[fx.Node]], calibration: Calibration) -> None:
        layers = {source: self._linears.names[nodes[0]][0][0] for source, nodes in readers.items()}
        errors: dict[fx.Node, float] = {}

        def measure(source: fx.Node, values: Sequence[torch.Tensor]) -> Tensors:
            tokens = some_tokens(values, _NUM_TOKENS).float()
            difference = rounded_activations(tokens, values, self._linears.chosen[readers[source][0]]) - tokens
            return {"error": torch.tensor(max(self._change(node, tokens, difference) for node in readers[source]))}

        def visit(source: fx.Node, measured: Tensors) -> None:
            errors[source] = float(measured["error"])

        all_readers = [node for nodes in readers.values() for node in nodes]
        names = " ".join(f"{node.name} {_grid(self._linears.chosen[node])}" for node in all_readers)
        observe(self._model_graph, calibration, layers, f"widen_activations {names}", measure, visit)
        for source, nodes in readers.items():
            bounds = [_bound(self._linears.chosen[node]) for node in nodes]
            if errors[source] > min(bound for bound in bounds if bound is not None):
                self._decide(nodes, errors[source])

    def _change(self, node: fx.Node, tokens: torch.Tensor, difference: torch.Tensor) -> float:
        """How far a difference of its inputs moves the output of a linear, as a part of the output."""
        weight, _, is_transposed = parameters_of(node)
        tensor = self._model_graph.weights[weight.name].detach().float()
        matrix = tensor.t() if is_transposed else tensor
        return float(F.linear(difference, matrix).norm() / F.linear(tokens, matrix).norm())

    def _decide(self, nodes: Sequence[fx.Node], error: float) -> None:
        site = self._context.claim(nodes[0])
        if site is None:
            return
        for node in nodes:
            site.replaced[node.name] = node.name
            wide = W8A16(rounding=self._linears.chosen[node].rounding)
            reason = f"8-bit activations change its output by {error:.2%}"
            decision = Decision(wide, reason, tuple(self._linears.names[node][0]))
            self._context.decisions[parameters_of(node)[0].name] = decision


WIDEN_ACTIVATIONS = Pass("widen_activations", run, after=("smooth_activations", "split_channels"))
