"""Weights move to the grid of their integers, layer by layer, so that the layer's output changes least.

    y = linear(x, w)    ->    y = linear(x, w')        w' = scale * (code - zero)

For each layer whose recipe has a ``rounding``: GPTQ (Frantar et al. 2022), or a search for the scales alone. Both see
the layer's inputs in the calibration samples. The codes are kept beside the graph (``stored_integers``), where
``quantize_linears`` takes them as they are; until then the weights are the floats that they stand for, so that the
passes between need not know. It needs weights that the graph owns (``frozen``), and comes before linears are merged,
where each has its parameter alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import fx

from ..codegen.model_graph import ModelGraph
from ..runtime.errors import ConfigError
from .calibration import Calibration, Tensors, observe, second_moment
from .gptq import gptq_codes
from .graph_pass import LOSSY, Pass, PassContext
from .quantizable_linears import QuantizableLinears, parameters_of
from .rounding import GPTQ, ScaleSearch
from .weight_grids import WeightGrid, fitted_grid, nearest_codes

_TENSORS = ("codes", "scale", "zero")


def run(model_graph: ModelGraph, context: PassContext) -> None:
    recipe = context.config.recipe
    if recipe is None or not recipe.has_rounding:
        return
    if not model_graph.frozen:
        what = "rounding changes weights, and those of torch.compile are the user's"
        raise ConfigError(what, remedy="use LLM, or a recipe without rounding", field="rounding")
    if context.calibration is None:
        what = "rounding needs samples of text to see what the layers' inputs are"
        raise ConfigError(what, remedy="LLM(..., calibration=texts)", field="calibration")
    linears = QuantizableLinears(model_graph, context, recipe)
    rounder = _Rounder(model_graph, linears)
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node, its_recipe in linears.chosen.items():
        if its_recipe.rounding is None:
            continue
        if rounder.is_shared(node):
            context.near_miss(node, "its weight is also that of another layer, whose inputs are others")
            continue
        site = context.claim(node)
        if site is not None:
            site.replaced[node.name] = node.name
            readers.setdefault(node.args[0], []).append(node)  # type: ignore[arg-type]
    rounder.round(readers, context.calibration, f"round_weights {json.dumps(recipe.as_dict())}")


class _Rounder:
    """Rounds the weights of one graph's linears."""

    def __init__(self, model_graph: ModelGraph, linears: QuantizableLinears) -> None:
        self._model_graph = model_graph
        self._linears = linears
        self._addresses = [tensor.data_ptr() for tensor in model_graph.weights.values() if tensor.numel()]
        self._of_the_end: list[Callable[[], None]] = []

    def is_shared(self, node: fx.Node) -> bool:
        weight = parameters_of(node)[0]
        return len(weight.users) > 1 or self._addresses.count(self._model_graph.weights[weight.name].data_ptr()) > 1

    def round(self, readers: Mapping[fx.Node, Sequence[fx.Node]], calibration: Calibration, method: str) -> None:
        """Round the weights of these linears, given by what they read."""
        layers = {source: self._linears.names[nodes[0]][0][0] for source, nodes in readers.items()}

        def measure(source: fx.Node, values: Sequence[torch.Tensor]) -> Tensors:
            hessian = second_moment(values)
            found = [self._rounded(node, hessian) for node in readers[source]]
            return {name: tensor for each in found for name, tensor in each.items()}

        def visit(source: fx.Node, rounded: Tensors) -> None:
            for node in readers[source]:
                self._replace(node, rounded)

        observe(self._model_graph, calibration, layers, method, measure, visit)
        for replace in self._of_the_end:
            replace()

    def _rounded(self, node: fx.Node, hessian: torch.Tensor) -> Tensors:
        """The codes of a linear's weight, int8 [N, K], and its grid."""
        recipe = self._linears.chosen[node]
        method, (weight, _, is_transposed) = recipe.rounding, parameters_of(node)
        assert isinstance(method, ScaleSearch), "layers without a rounding are left out"
        tensor = self._model_graph.weights[weight.name].detach()
        rows = tensor.t() if is_transposed else tensor
        grid = fitted_grid(rows, recipe, hessian, torch.linspace(1.0, method.smallest, method.num_candidates))
        if isinstance(method, GPTQ):
            codes = gptq_codes(rows, hessian, grid, method)
        else:
            codes = nearest_codes(rows.float(), *grid.of_channels(torch.arange(rows.shape[1])), recipe)
        names = (f"{weight.name}.{each}" for each in _TENSORS)
        return dict(zip(names, (codes.to(torch.int8), grid.scale, grid.zero), strict=True))

    def _replace(self, node: fx.Node, rounded: Tensors) -> None:
        recipe = self._linears.chosen[node]
        weight, _, is_transposed = parameters_of(node)
        codes, scale, zero = (rounded[f"{weight.name}.{each}"] for each in _TENSORS)
        grid = WeightGrid(recipe, scale, zero, codes.shape[1] // scale.shape[1])
        self._model_graph.stored_integers[weight.name] = partial(tuple, grid.stored(codes))

        def replace() -> None:
            weights = self._model_graph.weights
            restored = grid.values_of(codes).to(weights[weight.name].dtype)
            weights[weight.name] = (restored.t() if is_transposed else restored).contiguous()

        if isinstance(recipe.rounding, GPTQ) and recipe.rounding.true_sequential:
            replace()
        else:
            self._of_the_end.append(replace)


ROUND_WEIGHTS = Pass(
    "round_weights", run, LOSSY, after=("smooth_activations", "split_channels", "widen_activations", "allocate_bits")
)
