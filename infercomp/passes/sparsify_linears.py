"""Weights of linears become sparse in place: N of every M consecutive input channels are kept, the others are zeros.

    y = linear(x, w)    ->    y = linear(x, w')        w' = mask * w, or what SparseGPT makes of the kept ones

Does nothing unless the option ``sparsity`` says which are kept: ``NM(2, 4, score="wanda")``. The LM head stays dense.
It comes before weights are smoothed and rounded: a grid with a code for zero keeps zeros as they are. It needs weights
that the graph owns (``frozen``). Layers are taken in the graph's order, and each sees what those before it have become.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from ..codegen.model_graph import ModelGraph
from ..runtime.errors import ConfigError
from .calibration import Tensors, observe, second_moment
from .graph_pass import LOSSY, Pass, PassContext
from .linear_recipes import GOBO, W8A16, Recipe
from .n_m_sparsity import NM
from .quantizable_linears import QuantizableLinears, parameters_of
from .rounding import GPTQ
from .sparse_masks import masked, sparsegpt


def run(model_graph: ModelGraph, context: PassContext) -> None:
    sparsity = context.config.nm
    if sparsity is None:
        return
    _check(model_graph, context, sparsity)
    # Weights that could be rounded are those that may change: parameters that nothing else reads.
    linears = QuantizableLinears(model_graph, context, W8A16())
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in linears.names:
        if node not in linears.chosen or linears.is_head(node):
            context.near_miss(node, linears.reasons.get(node, "it is the LM head, which stays dense"))
            continue
        _check_channels(model_graph, node, linears.names[node][0][0], sparsity)
        site = context.claim(node)
        if site is not None:
            site.replaced[node.name] = node.name
            readers.setdefault(node.args[0], []).append(node)  # type: ignore[arg-type]

    def sparse(node: fx.Node, moment: torch.Tensor | None) -> torch.Tensor:
        weight, _, is_transposed = parameters_of(node)
        tensor = model_graph.weights[weight.name].detach()
        rows = tensor.t() if is_transposed else tensor
        if sparsity.score == "sparsegpt":
            assert moment is not None
            found = sparsegpt(rows, moment, sparsity)
        else:
            found = masked(rows, moment, sparsity)
        return (found.t() if is_transposed else found).contiguous()

    if context.calibration is None or not sparsity.needs_calibration:
        for node in (node for nodes in readers.values() for node in nodes):
            model_graph.weights[parameters_of(node)[0].name] = sparse(node, None)
        return

    def measure(source: fx.Node, values: Sequence[torch.Tensor]) -> Tensors:
        moment = second_moment(values)
        return {parameters_of(node)[0].name: sparse(node, moment) for node in readers[source]}

    def visit(_: fx.Node, found: Tensors) -> None:
        model_graph.weights |= found

    layers = {source: linears.names[nodes[0]][0][0] for source, nodes in readers.items()}
    observe(model_graph, context.calibration, layers, f"sparsify_linears {sparsity.to_json()}", measure, visit)


def _check(model_graph: ModelGraph, context: PassContext, sparsity: NM) -> None:
    if not model_graph.frozen:
        what = "sparsity changes weights, and those of torch.compile are the user's"
        raise ConfigError(what, remedy="use LLM", field="sparsity")
    if sparsity.needs_calibration and context.calibration is None:
        what = f"sparsity with the score {sparsity.score} needs samples of text to see what the layers' inputs are"
        raise ConfigError(what, remedy="LLM(..., calibration=texts)", field="calibration")
    if context.config.recipe is not None and not _keeps_zeros(context.config.recipe):
        what = (
            "GPTQ changes the weights that it has not rounded yet, and GOBO has no code for zero: zeros would be lost"
        )
        raise ConfigError(what, remedy="round to nearest, such as w8a8 or w4a16-g64", field="quantization")


def _keeps_zeros(recipe: Recipe) -> bool:
    recipes = [*(each for _, each in recipe.rules if each is not None), *getattr(recipe, "choices", ())]
    return not any(isinstance(each, GOBO) or isinstance(each.rounding, GPTQ) for each in recipes)


def _check_channels(model_graph: ModelGraph, node: fx.Node, layer: str, sparsity: NM) -> None:
    weight, _, is_transposed = parameters_of(node)
    num_channels = model_graph.weights[weight.name].shape[0 if is_transposed else 1]
    if num_channels % sparsity.m and sparsity.tail == "refuse":
        what = f"m {sparsity.m} does not divide the {num_channels} input channels of {layer}"
        raise ConfigError(what, remedy='choose another pattern, or NM(..., tail="pad")', field="m")


SPARSIFY_LINEARS = Pass("sparsify_linears", run, LOSSY, after=("recognize_linear", "convert_attention"))
