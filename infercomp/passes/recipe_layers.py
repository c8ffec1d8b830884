"""Which recipe each linear of a graph gets, and refusals of what does not fit the model before any work is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from ..codegen.model_graph import ModelGraph, source_line, value_of
from ..runtime.errors import ConfigError
from .config import nearest_name
from .graph_pass import PassContext
from .linear_recipes import LinearRecipe, Recipe, fits

Names = Sequence[Sequence[str]]
"""For each weight that is merged into a linear's, the layer's name in the model, and others for the same memory."""


def layer_names(model_graph: ModelGraph, weight: fx.Node) -> list[str]:
    """The names in the model, without the ending, of the layers whose weight this is: tied ones share their memory."""
    weights, sources = model_graph.weights, model_graph.weight_sources
    address = weights[weight.name].data_ptr() if model_graph.is_weight(weight) else 0
    tied = [name for name in weights if address and weights[name].data_ptr() == address and name != weight.name]
    return [sources.get(name, name).removesuffix(".weight") for name in (weight.name, *tied)]


def check_patterns(recipe: Recipe, layers: Mapping[fx.Node, Names], context: PassContext, *, is_whole: bool) -> None:
    """Say of a pattern that no linear fits it: ConfigError where the graph is the whole model, else a near miss."""
    known = [names for sources in layers.values() for names in sources]
    for pattern, _ in recipe.rules:
        if not known or any(fits(pattern, names) for names in known):
            continue
        if is_whole:
            nearest = nearest_name(pattern, (name for names in known for name in names))
            raise ConfigError(
                f"layers names no linear: {pattern!r}", remedy=f"the nearest is {nearest}", field="layers"
            )
        context.near_miss(next(iter(layers)), f"no linear of this graph fits the recipe's {pattern!r}")


def recipe_for(recipe: Recipe, names: Names, node: fx.Node) -> LinearRecipe | None:
    """What the first fitting pattern says. Raises ConfigError where it says different things of one product's parts."""
    found = [next((each for pattern, each in recipe.rules if fits(pattern, own)), None) for own in names]
    for own, each in zip(names, found, strict=True):
        if each != found[0]:
            raise ConfigError(
                f"{names[0][0]} and {own[0]} are computed as one product and need one recipe",
                where=source_line(node),
                remedy='give both the same, or leave them apart: disable=["merge_linears"]',
                field="layers",
            )
    return found[0]


def check_group(recipe: LinearRecipe, names: Names, node: fx.Node) -> None:
    """Raise ConfigError if the groups do not divide the input channels of a linear."""
    num_channels = value_of(node.args[0]).shape[-1]
    if recipe.group_size is not None and num_channels % recipe.group_size:
        raise ConfigError(
            f"group_size {recipe.group_size} does not divide the {num_channels} input channels of {names[0][0]}",
            where=source_line(node),
            remedy=f"choose another group_size, or leave the layer out: LayerRecipes((({names[0][0]!r}, None), …))",
            field="group_size",
        )
