"""Explicit masks that are proved to be causal, causal within a window, ALiBi or nothing become attributes.

    bias = where((k <= q) & (k > q - 128), 0, -inf)
    y = attention(q, k, v, bias)                       ->  y = attention(q, k, v, is_causal=True, sliding_window=128)

The mask is evaluated symbolically over (query index, key index) and must be equal for every length
(``mask_proof``); anything else stays an explicit tensor, with the reason kept as a near miss.
"""

from __future__ import annotations

from torch import fx

from ..codegen.model_graph import ModelGraph, aten, shape_of
from ..codegen.ops import attention
from .graph_pass import Pass, PassContext
from .mask_proof import MaskSpec, Unproved, prove_mask

POSITION_INPUTS = frozenset({"position_ids"})


def bias_of(node: fx.Node) -> fx.Node | None:
    return node.args[3] if len(node.args) > 3 else node.kwargs.get("bias")  # type: ignore[return-value]


def prove(model_graph: ModelGraph, node: fx.Node) -> MaskSpec | Unproved:
    """The proof for one attention node; positions count up from 0 where the graph is served."""
    positions = POSITION_INPUTS if model_graph.frozen else frozenset()
    return prove_mask(model_graph, bias_of(node), node.args[0], node.args[1], positions)  # type: ignore[arg-type]


def run(model_graph: ModelGraph, context: PassContext) -> None:
    proofs: dict[tuple[object, ...], MaskSpec | Unproved] = {}
    for node in model_graph.calls(attention.overload):
        if bias_of(node) is None:
            continue
        shapes = (bias_of(node), str(shape_of(node.args[0])), str(shape_of(node.args[1])))
        spec = proofs.setdefault(shapes, None) or prove(model_graph, node)  # type: ignore[arg-type]
        proofs[shapes] = spec
        reason = _why_not(node, spec)
        if isinstance(spec, Unproved) or reason is not None:
            context.near_miss(node, reason or "")
            continue
        site = context.claim(node)
        if site is not None:
            _replace(model_graph, context, site, node, spec)
    model_graph.eliminate_dead_code()


def _why_not(node: fx.Node, spec: MaskSpec | Unproved) -> str | None:
    if isinstance(spec, Unproved):
        return spec.reason
    if node.kwargs.get("is_causal") and not spec.is_causal:
        return None if spec.slopes is None else "a bias besides is_causal"
    return None


def _replace(model_graph: ModelGraph, context: PassContext, site, node: fx.Node, spec: MaskSpec) -> None:  # type: ignore[no-untyped-def]
    query, key, value, *_ = node.args
    options = dict(node.kwargs)
    options.pop("bias", None)
    options["is_causal"] = spec.is_causal or bool(options.get("is_causal"))
    if spec.sliding_window is not None:
        options["sliding_window"] = spec.sliding_window
    with model_graph.inserting_before(node) as emit:
        slopes = None
        if spec.slopes is not None:
            slopes = emit(aten.reshape.default, spec.slopes, [shape_of(query)[1]])
            if spec.slope_factor != 1.0:
                slopes = emit(aten.mul.Tensor, slopes, spec.slope_factor)
        new = emit(attention, query, key, value, None, slopes, **options)
    context.replace(site, node, new)


RECOGNIZE_MASKS = Pass("recognize_masks", run, after=("recognize_attention",))
