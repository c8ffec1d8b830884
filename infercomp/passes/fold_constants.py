"""Values that no input reaches are computed once.

    slopes = pow(2 ** -0.5, arange(1, 9))     ->   folded_0   (a constant of 8 numbers)

Only small values are folded, and values of weights only where the graph owns them (``frozen``):
elsewhere the user may still change a parameter in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..codegen.model_graph import ModelGraph, value_of
from .graph_pass import BIT_IDENTICAL, Pass, PassContext

_MAX_ELEMENTS = 1 << 16
_RANDOM = torch.Tag.nondeterministic_seeded


def _is_foldable_call(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return (
        node.op == "call_function"
        and isinstance(node.target, torch._ops.OpOverload)
        and _RANDOM not in node.target.tags
        and not node.target._schema.is_mutable
        and isinstance(value, torch.Tensor)
        and all(isinstance(extent, int) for extent in value.shape)
    )


def _constant_nodes(model_graph: ModelGraph) -> set[fx.Node]:
    constants: set[fx.Node] = set()
    for node in model_graph.graph.nodes:
        if node.op == "placeholder":
            owned = model_graph.frozen or node.name not in model_graph.weight_sources
            if node.name in model_graph.weights and owned:
                constants.add(node)
        elif _is_foldable_call(node) and all(source in constants for source in node.all_input_nodes):
            constants.add(node)
    return constants


def _evaluate(model_graph: ModelGraph, node: fx.Node, known: dict[fx.Node, torch.Tensor]) -> torch.Tensor:
    for source in node.all_input_nodes:
        if source not in known:
            known[source] = (
                model_graph.weights[source.name]
                if source.op == "placeholder"
                else _evaluate(model_graph, source, known)
            )
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: known[source])
    with torch.no_grad():
        result: Any = node.target(*args, **kwargs)  # type: ignore[operator]
    known[node] = result
    return result


def _worth_folding(model_graph: ModelGraph, constants: set[fx.Node]) -> set[fx.Node]:
    """The small constants that are still used once all small constants are folded."""
    folded: set[fx.Node] = set()
    computed: set[fx.Node] = set()
    for node in reversed(list(model_graph.graph.nodes)):
        if node not in constants:
            continue
        if any(user not in constants or user in computed for user in node.users):
            is_small = node.op == "call_function" and value_of(node).numel() <= _MAX_ELEMENTS
            (folded if is_small else computed).add(node)
    return folded


def run(model_graph: ModelGraph, context: PassContext) -> None:
    constants = _constant_nodes(model_graph)
    folded_nodes = _worth_folding(model_graph, constants)
    known: dict[fx.Node, torch.Tensor] = {}
    for node in list(model_graph.graph.nodes):
        if node not in folded_nodes:
            continue
        site = context.claim(node)
        if site is None:
            continue
        tensor = _evaluate(model_graph, node, known).clone()
        folded = model_graph.add_placeholder(f"folded_{node.name}", value_of(node), weight=tensor)
        context.replace(site, node, folded)
    model_graph.eliminate_dead_code()


FOLD_CONSTANTS = Pass("fold_constants", run, BIT_IDENTICAL, after=("recognize_norm", "recognize_masks"))
