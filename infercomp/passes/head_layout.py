"""Layouts of queries, keys and values brought to [B, H, S, D], and heads taken before they are repeated."""

from __future__ import annotations

from torch import fx

from ..codegen.model_graph import Emitter, aten, same_shape, same_size, shape_of, value_of


def permuted(emit: Emitter, node: fx.Node, order: list[int]) -> fx.Node:
    """``node.permute(order)``, composed with a permutation that the node already is."""
    while node.target == aten.permute.default:
        order = [node.args[1][dim] for dim in order]
        node = node.args[0]  # type: ignore[assignment]
    return node if order == list(range(len(order))) else emit(aten.permute.default, node, order)


def as_heads(emit: Emitter, node: fx.Node, heads: list[fx.Node | int] | None) -> fx.Node:
    """A [N, S, D] tensor as [B, H, S, D]: N split into ``heads`` = [B, H], or taken as the heads of one batch."""
    if value_of(node).dim() == 4:
        return node
    if heads is None:
        return emit(aten.unsqueeze.default, node, 0)
    if node.target == aten.reshape.default and value_of(node.args[0]).dim() == 4:
        source = node.args[0]
        if same_shape(shape_of(source), (*heads, *shape_of(node)[1:])):
            return source  # type: ignore[return-value]
    return emit(aten.reshape.default, node, [*heads, *emit.sizes(node)[1:]])


def unrepeated_heads(emit: Emitter, node: fx.Node) -> fx.Node:
    """[B, H, S, D] keys or values as [B, Hkv, S, D] before each head was repeated H / Hkv times in a row."""
    if node.target == aten.permute.default:
        order = node.args[1]
        source = _unrepeated(node.args[0], order[1])  # type: ignore[arg-type]
        return node if source is None else emit(aten.permute.default, source, order)
    source = _unrepeated(node, 1)
    return node if source is None else source


def _unrepeated(node: fx.Node, head_dim: int) -> fx.Node | None:
    """The tensor whose slices along ``head_dim`` were repeated to make ``node``, or None."""
    if node.target == aten.repeat_interleave.self_int:
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
        return node.args[0] if dim is not None and dim % value_of(node).dim() == head_dim else None  # type: ignore[return-value]
    if node.target == aten.expand.default:
        source = node.args[0]
        return source if _expands_only(source, node, head_dim) else None  # type: ignore[arg-type, return-value]
    if node.target != aten.reshape.default or node.args[0].target != aten.expand.default:
        return None
    expand = node.args[0]
    unsqueeze = expand.args[0]
    if unsqueeze.target != aten.unsqueeze.default:
        return None
    source, copies_dim = unsqueeze.args[0], unsqueeze.args[1] % value_of(unsqueeze).dim()
    if copies_dim != head_dim + 1 or not _expands_only(unsqueeze, expand, copies_dim):
        return None
    copies, heads = shape_of(expand)[copies_dim], shape_of(source)[head_dim]
    expected = [*shape_of(source)[:head_dim], heads * copies, *shape_of(source)[head_dim + 1 :]]
    fits = all(same_size(a, b) for a, b in zip(shape_of(node), expected, strict=True))
    return source if fits else None  # type: ignore[return-value]


def _expands_only(source: fx.Node, expanded: fx.Node, dim: int) -> bool:
    before, after = shape_of(source), shape_of(expanded)
    if len(before) != len(after) or not same_size(before[dim], 1):
        return False
    return all(same_size(a, b) for i, (a, b) in enumerate(zip(before, after, strict=True)) if i != dim)
