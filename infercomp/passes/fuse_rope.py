"""Rotary position embedding: seven calls become one op.

a, b = x[..., :R/2], x[..., R/2:R]
y = x * cos + cat((-b, a), -1) * sin                    ->  y = rotary_embedding(x, cos, sin)
y = x * cos + flatten(stack((-x[1::2], x[::2]), -1)) * sin
                                                        ->  y = rotary_embedding(x, cos, sin, interleaved=True)
z = cat((rotary_embedding(x[..., :R], cos, sin), x[..., R:]), -1)
                                                        ->  z = rotary_embedding(x, cos, sin)   (partial)
"""

from __future__ import annotations

from torch import fx

from ..codegen.model_graph import Emitter, ModelGraph, same_shape, shape_of, value_of
from ..codegen.ops import rotary_embedding
from .graph_pass import Pass, PassContext
from .rewriting import Bindings, Pattern, Rule, apply_rules, call, concatenate, reshape, slice_of, stack


def _half_split(
    x: Pattern, cos: Pattern, sin: Pattern, dim: Pattern, zero: Pattern, half: Pattern, full: Pattern, last: Pattern
) -> Pattern:
    turned = concatenate([-slice_of(x, dim, half, full), slice_of(x, dim, zero, half)], last)
    return x * cos + turned * sin


def _interleaved(
    x: Pattern, cos: Pattern, sin: Pattern, dim: Pattern, odd_end: Pattern, even_end: Pattern, shape: Pattern
) -> Pattern:
    odd, even = slice_of(x, dim, 1, odd_end, 2), slice_of(x, dim, 0, even_end, 2)
    return x * cos + reshape(stack([-odd, even], -1), shape) * sin


def _partial(
    x: Pattern,
    cos: Pattern,
    sin: Pattern,
    interleaved: Pattern,
    dim: Pattern,
    rotary_dim: Pattern,
    full: Pattern,
    last: Pattern,
) -> Pattern:
    rotated = call(rotary_embedding, slice_of(x, dim, 0, rotary_dim), cos, sin, interleaved)
    return concatenate([rotated, slice_of(x, dim, rotary_dim, full)], last)


def _angles_fit(bindings: Bindings, root: fx.Node) -> str | None:
    x, cos, sin = bindings["x"], bindings["cos"], bindings["sin"]
    if not all(isinstance(node, fx.Node) for node in (x, cos, sin)):
        return "cos or sin is a number"
    head_dim = value_of(x).shape[-1]
    if value_of(cos).shape[-1] != head_dim or value_of(sin).shape[-1] != head_dim:
        return f"cos has {value_of(cos).shape[-1]} channels, x has {head_dim}"
    if not same_shape(shape_of(root), shape_of(x)):
        return "cos and sin broadcast x to another shape"
    return None


def _halves_fit(bindings: Bindings, root: fx.Node) -> str | None:
    head_dim, last = value_of(bindings["x"]).shape[-1], value_of(bindings["x"]).dim() - 1
    if (bindings["dim"], bindings["last"]) != (last, last):
        return f"halves are taken along dimension {bindings['dim']}, expected {last}"
    halves = (bindings["zero"], bindings["half"], bindings["full"])
    if halves != (0, head_dim // 2, head_dim) or head_dim % 2:
        return f"x is split at {halves}, expected the middle of {head_dim} channels"
    return _angles_fit(bindings, root)


def _pairs_fit(bindings: Bindings, root: fx.Node) -> str | None:
    x = value_of(bindings["x"])
    if bindings["dim"] != x.dim() - 1:
        return f"pairs are taken along dimension {bindings['dim']}, expected {x.dim() - 1}"
    if (bindings["odd_end"], bindings["even_end"]) != (x.shape[-1], x.shape[-1]):
        return f"pairs end at {bindings['odd_end']} and {bindings['even_end']}, expected {x.shape[-1]}"
    return _angles_fit(bindings, root)


def _rest_passes(bindings: Bindings, root: fx.Node) -> str | None:
    head_dim, last = value_of(bindings["x"]).shape[-1], value_of(bindings["x"]).dim() - 1
    if (bindings["dim"], bindings["last"], bindings["full"]) != (last, last, head_dim):
        return "the channels that pass are not the last ones"
    return None


def _replace_half_split(emit: Emitter, x: fx.Node, cos: fx.Node, sin: fx.Node, **_: object) -> fx.Node:
    return emit(rotary_embedding, x, cos, sin, False)


def _replace_interleaved(emit: Emitter, x: fx.Node, cos: fx.Node, sin: fx.Node, **_: object) -> fx.Node:
    return emit(rotary_embedding, x, cos, sin, True)


def _replace_partial(emit: Emitter, x: fx.Node, cos: fx.Node, sin: fx.Node, interleaved: bool, **_: object) -> fx.Node:
    return emit(rotary_embedding, x, cos, sin, interleaved)


ROTATE = (
    Rule("half-split", _half_split, _replace_half_split, _halves_fit, near_miss_at=4),
    Rule("interleaved", _interleaved, _replace_interleaved, _pairs_fit, near_miss_at=4),
)
EXTEND = (Rule("partial", _partial, _replace_partial, _rest_passes),)


def run(model_graph: ModelGraph, context: PassContext) -> None:
    apply_rules(ROTATE, model_graph, context)
    apply_rules(EXTEND, model_graph, context)


FUSE_ROPE = Pass("fuse_rope", run, after=("normalize",))
