"""Which linears of a graph get integers, by which recipe, and why others do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..codegen.model_graph import ModelGraph, aten, source_line, value_of
from ..codegen.ops import linear, merge_weights
from ..runtime.errors import ConfigError
from .graph_pass import Decision, PassContext, is_float_tensor
from .linear_recipes import LinearRecipe, Recipe
from .recipe_layers import Names, check_group, check_patterns, layer_names, recipe_for


class QuantizableLinears:
    """The linears of one graph: ``chosen`` has a recipe for some, ``reasons`` has why the others are left in floats.

    Raises ConfigError for a recipe that does not fit the model.
    """

    def __init__(self, model_graph: ModelGraph, context: PassContext, recipe: Recipe) -> None:
        self._model_graph = model_graph
        self._quantizes_head = context.config.quantize_lm_head
        self._decisions = context.decisions
        self._heads = _lm_heads(model_graph)
        self._placeholders_at: dict[int, list[fx.Node]] = {}
        for node in model_graph.graph.nodes:
            if model_graph.is_weight(node):
                self._placeholders_at.setdefault(model_graph.weights[node.name].data_ptr(), []).append(node)
        self.names: dict[fx.Node, Names] = {
            node: [self._names(source) for source in sources_of(parameters_of(node)[0])]
            for node in model_graph.calls(linear.overload)
        }
        check_patterns(recipe, self.names, context, is_whole=model_graph.frozen)
        self.chosen: dict[fx.Node, LinearRecipe] = {}
        self.reasons: dict[fx.Node, str] = {}
        for node, names in self.names.items():
            wanted = self._recipe_of(node, recipe, names)
            reason = self._why_not(node, wanted)
            if wanted is None or reason is not None:
                self.reasons[node] = str(reason)
            else:
                check_group(wanted, names, node)
                self.chosen[node] = wanted

    def _names(self, weight: fx.Node) -> Sequence[str]:
        decision = self._decisions.get(weight.name)
        return layer_names(self._model_graph, weight) if decision is None else decision.names

    def _decision(self, node: fx.Node) -> Decision | None:
        """What is decided of a linear's weight already, or of the first of those that are merged in it."""
        decisions = (self._decisions.get(source.name) for source in sources_of(parameters_of(node)[0]))
        return next((each for each in decisions if each is not None), None)

    def input_step(self, node: fx.Node) -> float | None:
        """The step that is decided for the input of a linear, or None where each token finds its own.

        Raises ConfigError where the parts of a merged weight came with steps of their own.
        """
        decisions = [self._decisions.get(source.name) for source in sources_of(parameters_of(node)[0])]
        steps = {None if each is None else each.input_step for each in decisions}
        if len(steps) > 1:
            what = (
                f"{self.names[node][0][0]} and {self.names[node][-1][0]} have one input and steps of their own for it"
            )
            remedy = 'leave them apart: disable=["merge_linears"]'
            raise ConfigError(what, where=source_line(node), remedy=remedy, field="input_scale")
        return steps.pop()

    def _recipe_of(self, node: fx.Node, recipe: Recipe, names: Names) -> LinearRecipe | None:
        decision = self._decision(node)
        if decision is not None:
            return decision.recipe
        found = recipe_for(recipe, names, node)
        return found.for_head if found is not None and self.is_head(node) and not self._is_stored(node) else found

    def is_head(self, node: fx.Node) -> bool:
        """Whether a linear makes an output, or has the table of an embedding as its weight."""
        aliases = self._aliases(parameters_of(node)[0])
        has_table = any(user.target == aten.embedding.default for alias in aliases for user in alias.users)
        return has_table or node in self._heads

    def _is_stored(self, node: fx.Node) -> bool:
        """Whether a linear comes in integers: then it is what it is."""
        return any(source.name in self._model_graph.stored_integers for source in sources_of(parameters_of(node)[0]))

    def _why_not(self, node: fx.Node, recipe: LinearRecipe | None) -> str | None:
        if recipe is None:
            decision = self._decision(node)
            return "the recipe leaves it in floats" if decision is None else decision.reason
        if not self._quantizes_head and self.is_head(node) and not self._is_stored(node):
            return "it is the LM head, and quantize_lm_head is off"
        sources = sources_of(parameters_of(node)[0])
        if not all(self._model_graph.is_weight(source) for source in sources):
            return "its weight is computed, not a parameter"
        users = [(user, alias) for source in sources for alias in self._aliases(source) for user in alias.users]
        if not all(_is_weight_of(user, alias) for user, alias in users):
            return "its weight is also used elsewhere"
        return None

    def _aliases(self, weight: fx.Node) -> list[fx.Node]:
        """All names of a parameter's memory."""
        tensor = self._model_graph.weights.get(weight.name)
        return [] if tensor is None else self._placeholders_at[tensor.data_ptr()] if tensor.numel() else [weight]


def parameters_of(node: fx.Node) -> tuple[fx.Node, fx.Node | None, bool]:
    """A linear's weight, its bias, and whether the weight lies [K, N]."""
    weight, bias = (*node.args[1:], None)[:2]
    return weight, bias, bool(node.kwargs.get("transposed", False))  # type: ignore[return-value]


def sources_of(weight: fx.Node) -> list[fx.Node]:
    """The parameters that a weight or bias consists of, laid end to end along its first dimension."""
    is_merge = weight.target == merge_weights.overload and len(weight.args) == 1 and not weight.kwargs
    return list(weight.args[0]) if is_merge else [weight]  # type: ignore[arg-type]


def _is_weight_of(user: fx.Node, parameter: fx.Node) -> bool:
    """Whether a linear, an embedding or a merge takes the parameter as its weight, and as nothing else."""
    if user.target == merge_weights.overload:
        return True
    places = [place for place, argument in enumerate((*user.args, *user.kwargs.values())) if argument is parameter]
    return (user.target, places) in ((linear.overload, [1]), (aten.embedding.default, [0]))


def _lm_heads(model_graph: ModelGraph) -> set[fx.Node]:
    """Linears that make an output, with nothing behind them but casts, selected rows and pointwise calls."""
    return {node for node in map(_lm_head_of, model_graph.output_node().args[0]) if node is not None}


def _lm_head_of(output: Any) -> fx.Node | None:
    node = output
    while isinstance(node, fx.Node) and node.target != linear.overload:
        sources = [source for source in node.all_input_nodes if is_float_tensor(value_of(source))]
        node = sources[0] if _keeps_rows(node) and len(sources) == 1 else None
    return node if isinstance(node, fx.Node) else None


def _keeps_rows(node: fx.Node) -> bool:
    is_pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    return is_pointwise or node.target in (aten._to_copy.default, aten.index_select.default)
