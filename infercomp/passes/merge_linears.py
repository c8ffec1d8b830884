"""Linears that share an input become one.

    q = linear(x, wq); k = linear(x, wk); v = linear(x, wv)    ->    w = merge_weights([wq, wk, wv])
                                                                     y = linear(x, w)
                                                                     q = slice(y, …); k = …; v = …

Hand-walked, since the number of linears varies. The parameters become views of the merged weight
when weights are bound, so no second copy is kept. Those with a bias and those without are merged
apart; weights that are stored [K, N], tied, or used elsewhere are left alone.
"""

from __future__ import annotations

from torch import fx

from ..codegen.model_graph import ModelGraph, aten, value_of
from ..codegen.ops import linear, merge_weights
from .graph_pass import Pass, PassContext


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None, bool]:
    source, weight, bias = (*node.args, None)[:3]
    return source, weight, bias, bool(node.kwargs.get("transposed", False))


def _why_not(model_graph: ModelGraph, group: list[fx.Node]) -> str | None:
    operands = [_operands(node) for node in group]
    if any(transposed for *_, transposed in operands):
        return "a weight is stored [K, N]"
    weights = [weight for _, weight, _, _ in operands]
    if not all(model_graph.is_weight(weight) for weight in weights):
        return "a weight is computed, not a parameter"
    if len({id(weight) for weight in weights}) != len(weights):
        return "two of them share one weight"
    if len({value_of(weight).dtype for weight in weights}) != 1:
        return "the weights have different dtypes"
    biases = [bias for _, _, bias, _ in operands]
    if not all(bias is None or model_graph.is_weight(bias) for bias in biases):
        return "a bias is computed, not a parameter"
    parameters = [*weights, *(bias for bias in biases if bias is not None)]
    if any(len(parameter.users) > 1 for parameter in parameters) or len(set(parameters)) != len(parameters):
        return "a weight or bias is also used elsewhere"
    if any(_is_tied(model_graph, parameter) for parameter in parameters):
        return "a weight or bias shares its memory with another parameter"
    return None


def _is_tied(model_graph: ModelGraph, parameter: fx.Node) -> bool:
    tensor = model_graph.weights[parameter.name]
    others = (other for name, other in model_graph.weights.items() if name != parameter.name)
    return tensor.numel() > 0 and any(other.data_ptr() == tensor.data_ptr() for other in others)


def _merge(model_graph: ModelGraph, context: PassContext, group: list[fx.Node]) -> None:
    site = context.claim(group[0])
    if site is None:
        return
    weights = [_operands(node)[1] for node in group]
    biases = [_operands(node)[2] for node in group]
    with model_graph.inserting_before(group[0]) as emit:
        merged = emit(merge_weights, weights)
        bias = emit(merge_weights, biases) if biases[0] is not None else None
        output = emit(linear, group[0].args[0], merged, bias)
        start = 0
        for node, weight in zip(group, weights, strict=True):
            end = start + value_of(weight).shape[0]
            context.replace(site, node, emit(aten.slice.Tensor, output, value_of(output).dim() - 1, start, end))
            start = end


def _alike(group: list[fx.Node]) -> list[list[fx.Node]]:
    """The linears of one input, those with a bias and those without apart."""
    with_bias = [node for node in group if _operands(node)[2] is not None]
    without = [node for node in group if _operands(node)[2] is None]
    return [part for part in (with_bias, without) if part]


def _merge_alike(model_graph: ModelGraph, context: PassContext, group: list[fx.Node]) -> None:
    parts = _alike(group)
    for part in (part for part in parts if len(part) > 1):
        reason = _why_not(model_graph, part)
        if reason is None:
            _merge(model_graph, context, part)
        else:
            context.near_miss(part[0], reason)
    alone = [part[0] for part in parts if len(part) == 1]
    if alone:
        context.near_miss(alone[0], "some have a bias and some do not")


def run(model_graph: ModelGraph, context: PassContext) -> None:
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in model_graph.calls(linear.overload):
        groups.setdefault(node.args[0], []).append(node)
    for group in groups.values():
        if len(group) > 1:
            _merge_alike(model_graph, context, group)
    model_graph.eliminate_dead_code()


MERGE_LINEARS = Pass("merge_linears", run, after=("recognize_linear", "recognize_gated_mlp"))
