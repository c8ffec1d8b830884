"""One scale for all tokens of an activation, found before they come: static quantisation per tensor.

    quantize_per_token(x)    ->    quantize_per_tensor(x, step)        later, in quantize_linears

For layers whose recipe has ``activation_scale="tensor"``: the step of 8 bits is the largest magnitude of x over the
calibration samples, or an ``activation_percentile`` of the magnitudes, divided by 127; larger ones are clipped. Linears
that come in integers from a checkpoint bring their steps. Changes nothing itself: the step is a part of what is decided
of the weights that read x. It comes after smoothing and split channels, which change what x is. It needs weights that
the graph owns (``frozen``), as the step becomes one of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import fx

from ..codegen.model_graph import ModelGraph
from ..runtime.errors import ConfigError
from .calibration import Tensors, largest_magnitude, observe
from .graph_pass import Decision, Pass, PassContext
from .linear_recipes import W8A8, LinearRecipe
from .quantizable_linears import QuantizableLinears, parameters_of
from .static_grids import is_static, step_of


def run(model_graph: ModelGraph, context: PassContext) -> None:
    recipe = context.config.recipe
    if recipe is None:
        return
    if model_graph.stored_steps:
        _take_stored(model_graph, context, QuantizableLinears(model_graph, context, recipe))
    if not any(is_static(each) for _, each in recipe.rules):
        return
    if not model_graph.frozen:
        what = "scales of activations become weights of the graph, and those of torch.compile are the user's"
        raise ConfigError(what, remedy="use LLM, or a scale for each token", field="activation_scale")
    if context.calibration is None:
        what = "finding one scale for an activation needs samples of text"
        raise ConfigError(what, remedy="LLM(..., calibration=texts)", field="calibration")
    linears = QuantizableLinears(model_graph, context, recipe)
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node, its_recipe in linears.chosen.items():
        site = context.claim(node) if is_static(its_recipe) else None
        if site is not None:
            site.replaced[node.name] = node.name
            readers.setdefault(node.args[0], []).append(node)  # type: ignore[arg-type]
    percentiles = {source: _percentile(linears.chosen[nodes[0]]) for source, nodes in readers.items()}

    def measure(source: fx.Node, values: Sequence[torch.Tensor]) -> Tensors:
        return {"largest": largest_magnitude(values, percentiles[source])}

    def decide(source: fx.Node, measured: Tensors) -> None:
        step = step_of(float(measured["largest"]))
        for node in readers[source]:
            name = parameters_of(node)[0].name
            known = context.decisions.get(name)
            decision = known or Decision(linears.chosen[node], "its recipe", tuple(linears.names[node][0]))
            # A weight that several inputs are multiplied by has one step for all of them.
            context.decisions[name] = dataclasses.replace(decision, input_step=max(step, decision.input_step or 0.0))

    layers = {source: linears.names[nodes[0]][0][0] for source, nodes in readers.items()}
    settings = [f"{source.name} {percentile}" for source, percentile in percentiles.items()]
    observe(model_graph, context.calibration, layers, f"fix_activation_scales {settings}", measure, decide)


def _take_stored(model_graph: ModelGraph, context: PassContext, linears: QuantizableLinears) -> None:
    """The steps of a checkpoint whose linears come in integers, and which nothing else could find."""
    for node, recipe in linears.chosen.items():
        name = parameters_of(node)[0].name
        if name in model_graph.stored_steps and context.claim(node) is not None:
            step = model_graph.stored_steps[name]
            context.decisions[name] = Decision(recipe, "the checkpoint", tuple(linears.names[node][0]), step)


def _percentile(recipe: LinearRecipe) -> float | None:
    return recipe.activation_percentile if isinstance(recipe, W8A8) else None


FIX_ACTIVATION_SCALES = Pass(
    "fix_activation_scales", run, after=("smooth_activations", "split_channels", "widen_activations")
)
