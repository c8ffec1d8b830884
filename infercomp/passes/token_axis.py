"""The proof that a graph treats its tokens one by one: dimension propagation.

Every tensor either does not depend on the tokens (no axis) or has exactly one token axis. Each op
has a rule that says where the axis goes, and refuses if the op could let one token see another. Ops
without a rule refuse too. Attention is the one op that may mix tokens; its mask is proved elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from ..codegen.model_graph import ModelGraph, aten, same_size, shape_of, value_of
from ..codegen.ops import attention, gated_activation, layer_norm, linear, merge_weights, rms_norm, rotary_embedding
from .index_algebra import size_expression

Axes = dict[fx.Node, Any]  # an int, or None for a tensor without tokens


class MixesTokens(Exception):
    """A node for which the proof fails; ``node`` and ``args[0]`` say where and why."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node = node


def token_axes(model_graph: ModelGraph, token_inputs: dict[str, int], length: Any, roots: frozenset[fx.Node]) -> Axes:
    """The token axis of every tensor, given the inputs' and of ``roots`` (index tensors that count tokens).

    ``length`` is the symbolic number of tokens. Raises MixesTokens at the first node that may mix them.
    """
    axes: Axes = {}
    for node in model_graph.graph.nodes:
        if node.op == "placeholder":
            axes[node] = token_inputs.get(node.name)
        elif node.op == "call_function":
            axes[node] = _axis_of_call(node, axes, length, roots)
    return axes


def _axis_of_call(node: fx.Node, axes: Axes, length: Any, roots: frozenset[fx.Node]) -> int | None:
    if node in roots:
        return _extent_axis(node, length)
    value = value_of(node)
    if isinstance(value, (torch.SymInt, int)):
        return None
    sources = [source for source in node.all_input_nodes if isinstance(value_of(source), torch.Tensor)]
    if all(axes[source] is None for source in sources):
        return _axis_without_tokens(node, length)
    _refuse_length_as_number(node)
    rule = _RULES.get(node.target)
    if rule is None and _is_pointwise(node):
        rule = _pointwise
    if rule is None:
        raise MixesTokens(node, f"no rule says what {node.target} does along the tokens")
    axis = rule(node, axes, length)
    if isinstance(value, torch.Tensor):
        _refuse_other_symbolic_extents(node, axis)
    if axis is not None and isinstance(value, torch.Tensor) and not same_size(value.shape[axis], length):
        raise MixesTokens(node, f"dimension {axis} has {value.shape[axis]} entries, one a token were expected")
    return axis


def _extent_axis(node: fx.Node, length: Any) -> int:
    found = [dim for dim, extent in enumerate(shape_of(node)) if same_size(extent, length)]
    if len(found) != 1:
        raise MixesTokens(node, f"shape {shape_of(node)} has {len(found)} dimensions of the tokens' length")
    return found[0]


def _axis_without_tokens(node: fx.Node, length: Any) -> int | None:
    """A tensor made from no token: it has no axis, unless it was made as long as the sequence."""
    if not isinstance(value_of(node), torch.Tensor):
        return None
    _refuse_length_as_number(node)
    if any(not isinstance(extent, int) for extent in shape_of(node)) and node.target not in _CONSTANT_FILLS:
        raise MixesTokens(
            node, f"its shape {shape_of(node)} follows the sequence's length, but it is made from no token"
        )
    return _extent_axis(node, length) if any(same_size(extent, length) for extent in shape_of(node)) else None


def _refuse_length_as_number(node: fx.Node) -> None:
    """Sizes may follow the length where they are nothing but the sizes of the result."""
    taken_as_sizes = node.args[_TAKES_SIZES[node.target]] if node.target in _TAKES_SIZES else ()
    for argument in (*node.args, *node.kwargs.values()):
        parts = argument if isinstance(argument, (list, tuple)) else [argument]
        if argument is taken_as_sizes:
            continue
        if any(isinstance(value_of(part), (torch.SymInt, torch.SymFloat)) for part in parts):
            raise MixesTokens(node, "the sequence's length enters a computation as a number")


def _refuse_other_symbolic_extents(node: fx.Node, axis: int | None) -> None:
    """A sum along a second dimension as long as the sequence would count its tokens."""
    if any(not isinstance(extent, int) for dim, extent in enumerate(shape_of(node)) if dim != axis):
        raise MixesTokens(node, f"shape {shape_of(node)} follows the sequence's length in more than its tokens")


def _is_pointwise(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if isinstance(value_of(source), torch.Tensor)]


def _pointwise(node: fx.Node, axes: Axes, length: Any) -> int | None:
    """Operands broadcast against each other: counted from the right, their axes must agree."""
    rank = value_of(node).dim()
    found = {axes[source] - value_of(source).dim() for source in _tensors(node) if axes[source] is not None}
    if len(found) != 1:
        raise MixesTokens(node, "its operands have their tokens along different dimensions")
    from_right = found.pop()
    for source in _tensors(node):
        shape = shape_of(source)
        if axes[source] is None and len(shape) >= -from_right and not same_size(shape[from_right], 1):
            raise MixesTokens(node, f"{source.name} has another value for every token but does not come from them")
    return rank + from_right


def _same_axis(node: fx.Node, axes: Axes, length: Any) -> int | None:
    return axes[node.args[0]]


def _row_wise(node: fx.Node, axes: Axes, length: Any) -> int | None:
    """Works along the last dimension of its first operand; all others are parameters."""
    axis = _only_first(node, axes)
    if axis == value_of(node.args[0]).dim() - 1:
        raise MixesTokens(node, "it works along the tokens")
    return axis


def _only_first(node: fx.Node, axes: Axes) -> int | None:
    if any(axes[source] is not None for source in _tensors(node) if source is not node.args[0]):
        raise MixesTokens(node, "a parameter of it depends on the tokens")
    return axes[node.args[0]]


def _embedding(node: fx.Node, axes: Axes, length: Any) -> int | None:
    if axes[node.args[0]] is not None:
        raise MixesTokens(node, "the table depends on the tokens")
    return axes[node.args[1]]


def _rotary(node: fx.Node, axes: Axes, length: Any) -> int | None:
    x, cos, sin = node.args[:3]
    rank = value_of(x).dim()
    expected = axes[x]
    for angle in (cos, sin):
        if axes[angle] is not None and axes[angle] + rank - value_of(angle).dim() != expected:
            raise MixesTokens(node, f"{angle.name} has its tokens along another dimension than {x.name}")
    return expected


def _reduction(node: fx.Node, axes: Axes, length: Any) -> int | None:
    source = node.args[0]
    rank, axis = value_of(source).dim(), axes[source]
    dims = node.args[1] if len(node.args) > 1 else None
    dims = list(range(rank)) if dims in (None, []) else [dims] if isinstance(dims, int) else list(dims)
    dims = [dim % rank for dim in dims]
    if axis in dims:
        raise MixesTokens(node, "it reduces over the tokens")
    keepdim = value_of(node).dim() == rank
    return axis if keepdim else axis - sum(dim < axis for dim in dims)


def _along(position: int) -> Callable[[fx.Node, Axes, Any], int | None]:
    """Rule of an op that works along one dimension (its argument ``position``) and keeps the others."""

    def rule(node: fx.Node, axes: Axes, length: Any) -> int | None:
        source = node.args[0]
        dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", -1)
        if dim % value_of(source).dim() == axes[source]:
            raise MixesTokens(node, "it works along the tokens")
        return axes[source]

    return rule


def _matmul(node: fx.Node, axes: Axes, length: Any) -> int | None:
    left, right = node.args[-2:]
    rank = value_of(node).dim()
    if any(value_of(operand).dim() < 2 for operand in (left, right)):
        raise MixesTokens(node, "a product with a vector")
    if axes[right] is None and axes[left] is not None:
        from_right = axes[left] - value_of(left).dim()
        inner = -1
    elif axes[left] is None and axes[right] is not None:
        from_right = axes[right] - value_of(right).dim()
        inner = -2
    else:
        raise MixesTokens(node, "a product of two tensors that both depend on the tokens")
    if from_right == inner:
        raise MixesTokens(node, "it sums over the tokens")
    other = right if axes[right] is None else left
    if from_right < -2 and value_of(other).dim() >= -from_right and not same_size(shape_of(other)[from_right], 1):
        raise MixesTokens(node, f"{other.name} has another value for every token")
    return rank + from_right


def _addmm(node: fx.Node, axes: Axes, length: Any) -> int | None:
    if axes[node.args[0]] is not None:
        raise MixesTokens(node, "the bias depends on the tokens")
    return _matmul(node, axes, length)


def _permute(node: fx.Node, axes: Axes, length: Any) -> int | None:
    source, order = node.args
    return [dim % len(order) for dim in order].index(axes[source])


def _unsqueeze(node: fx.Node, axes: Axes, length: Any) -> int | None:
    axis, dim = axes[node.args[0]], node.args[1] % value_of(node).dim()
    return axis + (dim <= axis)


def _reshape(node: fx.Node, axes: Axes, length: Any) -> int | None:
    """The axis must stay a dimension of its own, with as many elements before it as it had."""
    source = node.args[0]
    before = _product(shape_of(source)[: axes[source]])
    for dim, extent in enumerate(shape_of(node)):
        if same_size(extent, length) and sympy.expand(_product(shape_of(node)[:dim]) - before) == 0:
            return dim
    raise MixesTokens(
        node, f"the reshape from {shape_of(source)} to {shape_of(node)} mixes the tokens with another dimension"
    )


def _product(extents: Any) -> sympy.Expr:
    return sympy.Mul(*(size_expression(extent) for extent in extents))


def _expand(node: fx.Node, axes: Axes, length: Any) -> int | None:
    return axes[node.args[0]] + value_of(node).dim() - value_of(node.args[0]).dim()


def _repeat(node: fx.Node, axes: Axes, length: Any) -> int | None:
    source, repeats = node.args
    axis = axes[source] + len(repeats) - value_of(source).dim()
    if not same_size(value_of(repeats[axis]), 1):
        raise MixesTokens(node, "it repeats the sequence")
    return axis


def _slice(node: fx.Node, axes: Axes, length: Any) -> int | None:
    if node.args[1] % value_of(node).dim() == axes[node.args[0]]:
        raise MixesTokens(node, "it takes some of the tokens only")
    return axes[node.args[0]]


def _select(node: fx.Node, axes: Axes, length: Any) -> int | None:
    source = node.args[0]
    axis, dim = axes[source], node.args[1] % value_of(source).dim()
    if axis == dim:
        raise MixesTokens(node, "it takes one of the tokens only")
    return axis - (dim < axis)


def _concatenate(node: fx.Node, axes: Axes, length: Any) -> int | None:
    """cat joins along one dimension, stack along a new one: every operand must have the same axis."""
    parts = node.args[0]
    dim = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % value_of(node).dim()
    found = {axes[part] for part in parts}
    if len(found) != 1 or None in found:
        raise MixesTokens(node, "it joins tensors with tokens and tensors without")
    axis = found.pop()
    if node.target == aten.stack.default:
        return axis + (dim <= axis)
    if dim == axis:
        raise MixesTokens(node, "it joins sequences of tokens")
    return axis


def _gather(node: fx.Node, axes: Axes, length: Any) -> int | None:
    """Rows of a table that has no tokens, looked up by the tokens' indices."""
    table, dim, indices = node.args[:3]
    if axes[table] is not None or axes[indices] != dim % value_of(table).dim():
        raise MixesTokens(node, "it gathers from a table that depends on the tokens")
    return axes[indices]


def _index(node: fx.Node, axes: Axes, length: Any) -> int | None:
    table, indices = node.args
    positions = [dim for dim, index in enumerate(indices) if index is not None]
    if len(positions) != 1:
        raise MixesTokens(node, "it indexes by more than one tensor")
    dim, index = positions[0], indices[positions[0]]
    axis, index_axis = axes[table], axes[index]
    if axis is not None and (index_axis is not None or axis == dim):
        raise MixesTokens(node, "it looks tokens up by an index")
    if axis is None:
        return dim + index_axis
    return axis + value_of(index).dim() - 1 if dim < axis else axis


def _index_select(node: fx.Node, axes: Axes, length: Any) -> int | None:
    """Channels of every token, the same for all."""
    source, dim, index = node.args
    if axes[source] is None or axes[index] is not None:
        raise MixesTokens(node, "it looks up by an index that depends on the tokens")
    if dim % value_of(source).dim() == axes[source]:
        raise MixesTokens(node, "it takes some of the tokens only")
    return axes[source]


def _attention(node: fx.Node, axes: Axes, length: Any) -> int | None:
    query, key, value = node.args[:3]
    if any(axes[operand] != 2 for operand in (query, key, value)):
        raise MixesTokens(node, "queries, keys and values are not [1, heads, tokens, channels]")
    if any(axes[operand] is not None for operand in node.args[3:] if isinstance(operand, fx.Node)):
        raise MixesTokens(node, "a bias of the attention depends on the tokens")
    return 2


_CONSTANT_FILLS = frozenset(
    (aten.full.default, aten.zeros.default, aten.ones.default, aten.new_ones.default, aten.new_zeros.default,
     aten.new_full.default, aten.expand.default)
)  # fmt: skip

# The position of the argument that holds the result's sizes.
_TAKES_SIZES = {
    **dict.fromkeys((aten.reshape.default, aten.expand.default), 1),
    **dict.fromkeys((aten.new_ones.default, aten.new_zeros.default, aten.new_full.default), 1),
    **dict.fromkeys((aten.full.default, aten.zeros.default, aten.ones.default), 0),
}

_RULES: dict[Any, Callable[[fx.Node, Axes, Any], int | None]] = {
    linear.overload: _row_wise,
    rms_norm.overload: _row_wise,
    layer_norm.overload: _row_wise,
    merge_weights.overload: _same_axis,
    gated_activation.overload: _pointwise,
    rotary_embedding.overload: _rotary,
    attention.overload: _attention,
    **dict.fromkeys((aten.mean.dim, aten.sum.dim_IntList, aten.any.dim), _reduction),
    **dict.fromkeys((aten.amax.default, aten.amin.default), _reduction),
    **dict.fromkeys((aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten.cumsum.default), _along(1)),
    **dict.fromkeys((aten.matmul.default, aten.mm.default, aten.bmm.default), _matmul),
    aten.addmm.default: _addmm,
    aten.linear.default: _row_wise,
    aten.layer_norm.default: _row_wise,
    aten.embedding.default: _embedding,
    aten.permute.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.reshape.default: _reshape,
    aten.squeeze.dim: _reshape,
    aten.expand.default: _expand,
    aten.repeat.default: _repeat,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.cat.default: _concatenate,
    aten.stack.default: _concatenate,
    aten.gather.default: _gather,
    aten.index.Tensor: _index,
    aten.index_select.default: _index_select,
    aten.repeat_interleave.self_int: _along(2),
    **dict.fromkeys(
        (aten._to_copy.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default), _same_axis
    ),
    **dict.fromkeys(
        (aten.gelu.default, aten.silu.default, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf,
         aten.masked_fill.Scalar, aten.tanh.default), _pointwise),
}  # fmt: skip
