"""Each layer gets the recipe of several that the loss minds least, within a budget of bits: HAWQ and Q-BERT.

    HAWQ(bits_per_weight=6, choices=(W8A16(), W4A16(64, True)))    ->    a recipe of the choices for each layer

A choice costs a layer H * |Q(w) - w|², H being the mean of the Hessian's eigenvalues in w, its trace over its size
(HAWQ-V2, Dong et al. 2020), or |mean| + deviation over the samples of its largest eigenvalue in all weights of the
block, such as layers.3, that the layer is in (HAWQ, Dong et al. 2019; Q-BERT, Shen et al. 2020). The least sum is
sought that the budget holds. Linears that read one input get one recipe, as they are computed as one product. Changes
nothing itself: what it decides is what ``quantize_linears`` does.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ..codegen.model_graph import ModelGraph
from ..runtime.errors import ConfigError
from .calibration import Calibration
from .graph_pass import Decision, Pass, PassContext
from .linear_recipes import LinearRecipe
from .quantizable_linears import QuantizableLinears, parameters_of
from .recipe_layers import check_group
from .recipes import HAWQ
from .second_order import hessian_traces, largest_eigenvalues
from .weight_grids import fitted_grid, nearest_codes

_BLOCK = re.compile(r".*?\.\d+(?=\.|$)")


def run(model_graph: ModelGraph, context: PassContext) -> None:
    recipe = context.config.recipe
    if not isinstance(recipe, HAWQ):
        return
    if context.calibration is None:
        what = "choosing bits by the loss needs samples of text"
        raise ConfigError(what, remedy="LLM(..., calibration=texts)", field="calibration")
    linears = QuantizableLinears(model_graph, context, recipe)
    for node in linears.chosen:
        for choice in recipe.choices:
            check_group(choice, linears.names[node], node)
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in linears.chosen:
        if not linears.is_head(node):
            readers.setdefault(node.args[0], []).append(node)  # type: ignore[arg-type]
    claimed = [nodes for nodes in readers.values() if context.claim(nodes[0]) is not None]
    if not claimed:
        return
    layers = {parameters_of(node)[0].name: linears.names[node][0][0] for nodes in claimed for node in nodes}
    sensitivities = _sensitivities(model_graph, context.calibration, recipe, layers)
    groups = [_costs(model_graph, nodes, recipe, sensitivities) for nodes in claimed]
    chosen = allocate(groups, recipe.bits_per_weight)
    for site, nodes, position in zip(context.sites, claimed, chosen, strict=True):
        for node in nodes:
            name = parameters_of(node)[0].name
            site.replaced[node.name] = node.name
            reason = f"the Hessian's {recipe.sensitivity} there is {sensitivities[name]:.3g}"
            decision = Decision(recipe.choices[position], reason, tuple(linears.names[node][0]))
            context.decisions[name] = decision


def _sensitivities(
    model_graph: ModelGraph, calibration: Calibration, recipe: HAWQ, layers: Mapping[str, str]
) -> dict[str, float]:
    """What a squared change of each weight costs, by its name; ``layers`` says which layer has it."""
    names = list(layers)
    few = Calibration(calibration.samples[: recipe.num_samples], calibration.progress)
    if recipe.sensitivity == "trace":
        traces = hessian_traces(model_graph, few, names, recipe.num_probes, recipe.num_tokens)
        return {name: max(trace, 0.0) / model_graph.weights[name].numel() for name, trace in traces.items()}
    blocks: dict[str, list[str]] = {}
    for name in names:
        blocks.setdefault(_block_of(layers[name]), []).append(name)
    values = largest_eigenvalues(model_graph, few, blocks, recipe.num_probes, recipe.num_tokens)
    sensitivities = {block: abs(statistics.fmean(each)) + statistics.pstdev(each) for block, each in values.items()}
    return {name: sensitivities[_block_of(layer)] for name, layer in layers.items()}


def _block_of(layer: str) -> str:
    """What a layer's name says up to its first number; all of it without one."""
    found = _BLOCK.match(layer)
    return layer if found is None else found[0]


@dataclass(frozen=True)
class Group:
    """Layers that get one recipe: how many weights they have, and for each choice its bits and what it costs."""

    num_weights: int
    bits: tuple[float, ...]
    costs: tuple[float, ...]


def _costs(
    model_graph: ModelGraph, nodes: Sequence[fx.Node], recipe: HAWQ, sensitivities: Mapping[str, float]
) -> Group:
    tensors = {}
    for node in nodes:
        weight, _, is_transposed = parameters_of(node)
        tensor = model_graph.weights[weight.name].detach()
        tensors[weight.name] = tensor.t() if is_transposed else tensor
    num_weights = sum(tensor.numel() for tensor in tensors.values())
    bits = [sum(c.bits_per_weight(t.shape[1]) * t.numel() for t in tensors.values()) for c in recipe.choices]
    costs = [sum(sensitivities[n] * _squared_change(t, c) for n, t in tensors.items()) for c in recipe.choices]
    return Group(num_weights, tuple(bits), tuple(costs))


def _squared_change(weight: torch.Tensor, choice: LinearRecipe) -> float:
    """|Q(w) - w|² for the nearest codes."""
    grid = fitted_grid(weight, choice, torch.eye(weight.shape[1]), torch.ones(1))
    scale, zero = grid.of_channels(torch.arange(weight.shape[1]))
    rounded = scale * (nearest_codes(weight.float(), scale, zero, choice) - zero)
    return float((rounded - weight.float()).square().sum())


def allocate(groups: Sequence[Group], bits_per_weight: float) -> list[int]:
    """For each group the choice, so that costs are least within ``bits_per_weight`` over all weights.

    From the choice of the fewest bits, the step that saves the most cost a bit is taken as long as it fits. Raises
    ConfigError for a budget below the fewest bits.
    """
    budget = bits_per_weight * sum(group.num_weights for group in groups)
    chosen = [min(range(len(group.bits)), key=lambda i, g=group: (g.bits[i], g.costs[i])) for group in groups]  # type: ignore[misc]
    spent = sum(group.bits[position] for group, position in zip(groups, chosen, strict=True))
    if spent > budget * (1 + 1e-9):
        fewest = spent / sum(group.num_weights for group in groups)
        what = f"bits_per_weight {bits_per_weight} is below the {fewest:.3f} of the smallest choices"
        raise ConfigError(what, remedy="raise it, or add a smaller choice", field="bits_per_weight")
    while True:
        room = budget * (1 + 1e-9) - spent
        steps = [step for number, group in enumerate(groups) for step in _steps(number, group, chosen[number], room)]
        if not steps:
            return chosen
        _, number, position = min(steps)
        spent += groups[number].bits[position] - groups[number].bits[chosen[number]]
        chosen[number] = position


def _steps(number: int, group: Group, position: int, room: float) -> list[tuple[float, int, int]]:
    """Choices of a group that cost less than the one it has and fit, as cost a bit, less being better."""
    found = []
    for other, (bits, cost) in enumerate(zip(group.bits, group.costs, strict=True)):
        more, change = bits - group.bits[position], cost - group.costs[position]
        if change < 0 and more <= room:
            found.append((change / more if more > 0 else -math.inf, number, other))
    return found


ALLOCATE_BITS = Pass("allocate_bits", run, after=("smooth_activations", "split_channels"))
