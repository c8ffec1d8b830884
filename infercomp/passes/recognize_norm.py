"""RMSNorm and LayerNorm in the vocabulary.

v = mean(x ** 2, -1, keepdim)                       (casts to float32 and back in between)
y = weight * (x * rsqrt(v + eps))                ->  y = rms_norm(x, weight, eps)
y = (x * rsqrt(v + eps)) * (1 + weight)          ->  y = rms_norm(x, weight, eps, unit_offset=True)   Gemma
y = aten.rms_norm(x, [D], weight, eps)           ->  y = rms_norm(x, weight, eps)
y = aten.layer_norm(x, [D], weight, bias, eps)   ->  y = layer_norm(x, weight, bias, eps)
"""

from __future__ import annotations

from torch import fx

from ..codegen.model_graph import Emitter, ModelGraph, aten, value_of
from ..codegen.ops import layer_norm, rms_norm
from .graph_pass import Pass, PassContext
from .rewriting import Bindings, Pattern, Rule, apply_rules, mean_of_last, power, rsqrt, sqrt, square


def _normalized(x: Pattern, eps: Pattern) -> Pattern:
    return x * rsqrt(mean_of_last(square(x)) + eps)


def _scaled(x: Pattern, weight: Pattern, eps: Pattern) -> Pattern:
    return weight * _normalized(x, eps)


def _scaled_with_offset(x: Pattern, weight: Pattern, one: Pattern, eps: Pattern) -> Pattern:
    return (weight + one) * _normalized(x, eps)


def _scaled_by_power(x: Pattern, weight: Pattern, eps: Pattern) -> Pattern:
    return weight * (x * power(mean_of_last(square(x)) + eps, -0.5))


def _offset_by_power(x: Pattern, weight: Pattern, one: Pattern, eps: Pattern) -> Pattern:
    return (weight + one) * (x * power(mean_of_last(square(x)) + eps, -0.5))


def _scaled_by_division(x: Pattern, weight: Pattern, eps: Pattern) -> Pattern:
    return weight * (x / sqrt(mean_of_last(square(x)) + eps))


def _is_weight_of(bindings: Bindings, root: fx.Node) -> str | None:
    x, weight, eps = bindings["x"], bindings["weight"], bindings["eps"]
    if isinstance(eps, fx.Node):
        return "eps is a tensor, expected a number"
    if not isinstance(weight, fx.Node) or value_of(weight).dim() != 1:
        return "the scale is no vector"
    if value_of(weight).shape[0] != value_of(x).shape[-1]:
        return f"the scale has {value_of(weight).shape[0]} entries, the row {value_of(x).shape[-1]}"
    if bindings.get("one", 1) != 1:
        return f"the scale's offset is {bindings['one']}, expected 1"
    return None


def _bare_is_number(bindings: Bindings, root: fx.Node) -> str | None:
    return "eps is a tensor, expected a number" if isinstance(bindings["eps"], fx.Node) else None


def _replace(emit: Emitter, x: fx.Node, weight: fx.Node, eps: float) -> fx.Node:
    return emit(rms_norm, x, weight, float(eps))


def _replace_with_offset(emit: Emitter, x: fx.Node, weight: fx.Node, one: float, eps: float) -> fx.Node:
    return emit(rms_norm, x, weight, float(eps), True)


def _replace_bare(emit: Emitter, x: fx.Node, eps: float) -> fx.Node:
    return emit(rms_norm, x, None, float(eps))


RULES = (
    Rule("1 + weight", _scaled_with_offset, _replace_with_offset, _is_weight_of, near_miss_at=5),
    Rule("1 + weight, ** -0.5", _offset_by_power, _replace_with_offset, _is_weight_of, near_miss_at=5),
    Rule("weight", _scaled, _replace, _is_weight_of),
    Rule("weight, ** -0.5", _scaled_by_power, _replace, _is_weight_of),
    Rule("weight, / sqrt", _scaled_by_division, _replace, _is_weight_of),
    Rule("no weight", _normalized, _replace_bare, _bare_is_number),
)


def _run_layer_norm(model_graph: ModelGraph, context: PassContext) -> None:
    for node in model_graph.calls(aten.layer_norm.default):
        source, shape, *rest = node.args
        if len(shape) != 1:
            context.near_miss(node, f"normalises {len(shape)} dimensions, expected the last one")
            continue
        weight, bias, eps = (*rest, *(None, None, 1e-5)[len(rest) :])[:3]
        site = context.claim(node)
        if site is not None:
            with model_graph.inserting_before(node) as emit:
                context.replace(site, node, emit(layer_norm, source, weight, bias, float(eps)))


def _run_rms_norm(model_graph: ModelGraph, context: PassContext) -> None:
    for node in model_graph.calls(aten.rms_norm.default):
        source, shape, weight, eps = (*node.args, None, None)[:4]
        if len(shape) != 1:
            context.near_miss(node, f"normalises {len(shape)} dimensions, expected the last one")
        elif eps is None:
            context.near_miss(node, "eps is left to torch, which takes it from the dtype")
        elif (site := context.claim(node)) is not None:
            with model_graph.inserting_before(node) as emit:
                context.replace(site, node, emit(rms_norm, source, weight, float(eps)))


def run(model_graph: ModelGraph, context: PassContext) -> None:
    apply_rules(RULES, model_graph, context)
    _run_rms_norm(model_graph, context)
    _run_layer_norm(model_graph, context)
    model_graph.eliminate_dead_code()


RECOGNIZE_NORM = Pass("recognize_norm", run, after=("normalize",))
