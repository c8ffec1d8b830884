"""Where the heads of an attention lie in the linears around it, however they were cut out of them.

What stands between a linear and an attention is run on numbers in place of values: each number is a token and a
channel of the linear, so that what arrives says where it comes from. Heads may lie side by side, in turn with those of
queries (fused projections of GPT-NeoX), or behind a per-head norm and a rotary embedding (Qwen3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..codegen.model_graph import Emitter, ModelGraph, aten, shape_of, value_of
from ..codegen.ops import linear, rms_norm, rotary_embedding
from .quantizable_linears import parameters_of

_HEADS_BEHIND_TOKENS = [0, 2, 1, 3]
_VIEWS = (
    aten.reshape.default,
    aten.permute.default,
    aten.slice.Tensor,
    aten.index.Tensor,
    aten.select.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
)


# What is done to every channel alike, by a number, and commutes with rotary embeddings.
_ALIKE = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten._to_copy.default)


class NoHeadsError(Exception):
    """Why the heads cannot be told, as a near miss says it."""


@dataclass(frozen=True)
class ProjectedHeads:
    """Queries, keys or values [B, H, S, D]: ``rows`` [H, D] are their channels in the output of ``source``.

    ``norm`` is the RMS norm of each head and ``rotary`` the rotary embedding between, where there are such;
    ``is_rotated_by_head`` says whether heads lie before tokens there; ``alike`` are scales and casts of all channels.
    """

    operand: fx.Node
    source: fx.Node
    rows: torch.Tensor
    norm: fx.Node | None
    rotary: fx.Node | None
    is_rotated_by_head: bool
    alike: tuple[fx.Node, ...] = ()

    def emitted(self, emit: Emitter, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
        """The same of a linear whose rows are those of the heads, one after the other."""
        batch, _, length, size = emit.sizes(self.operand)
        node = emit(linear, self.source.args[0], weight, bias)
        node = emit(aten.reshape.default, node, [batch, length, value_of(weight).shape[0] // size, size])
        if self.norm is not None:
            node = emit(rms_norm, node, *self.norm.args[1:], **self.norm.kwargs)
        if self.rotary is not None and not self.is_rotated_by_head:
            node = self._rotated(emit, node)
        node = emit(aten.permute.default, node, _HEADS_BEHIND_TOKENS)
        if self.rotary is not None and self.is_rotated_by_head:
            node = self._rotated(emit, node)
        for each in self.alike:
            node = emit(each.target, node, *each.args[1:], **each.kwargs)
        return node

    def _rotated(self, emit: Emitter, node: fx.Node) -> fx.Node:
        assert self.rotary is not None
        return emit(rotary_embedding, node, *self.rotary.args[1:], **self.rotary.kwargs)


def projected_heads(model_graph: ModelGraph, operand: fx.Node) -> ProjectedHeads:
    """The heads of an operand of attention. Raises NoHeadsError where they are not those of one linear."""
    path, node = [], operand
    while node.target != linear.overload:
        if node.target not in (*_VIEWS, rms_norm.overload, rotary_embedding.overload) and not _is_alike(node):
            raise NoHeadsError(f"{node.name} ({node.target}) stands between a linear and the attention")
        path.append(node)
        node = node.args[0]  # type: ignore[assignment]
    _require_parameters(model_graph, node)
    shape = _hints(shape_of(node))
    if len(shape) < 2:
        raise NoHeadsError(f"{node.name} has no tokens")
    values = torch.arange(_product(shape)).view(shape)
    seen = {}
    for view in reversed(path):
        if view.target in _VIEWS:
            values = _viewed(model_graph, view, values)
        seen[view] = values
    rows = _rows(values, shape[-1])
    norms, rotaries = ([each for each in path if each.target == op.overload] for op in (rms_norm, rotary_embedding))
    if len(norms) > 1 or len(rotaries) > 1:
        raise NoHeadsError("heads are normalised or rotated twice")
    for norm in norms:
        _require_whole_heads(seen[norm], values, norm)
    if norms and rotaries and path.index(norms[0]) < path.index(rotaries[0]):
        raise NoHeadsError("heads are normalised after they are rotated")
    by_head = all(_is_same(seen[each], values) for each in rotaries)
    if not by_head and not all(_is_same(seen[each], values.transpose(1, 2)) for each in rotaries):
        raise NoHeadsError("a part of the heads is rotated apart")
    alike = tuple(each for each in reversed(path) if _is_alike(each))
    if norms and any(each.target != aten._to_copy.default for each in alike):
        raise NoHeadsError("heads are scaled beside their norm")
    norm, rotary = next(iter(norms), None), next(iter(rotaries), None)
    return ProjectedHeads(operand, node, rows, norm, rotary, by_head, alike)


def _is_alike(node: fx.Node) -> bool:
    return node.target in _ALIKE and len(node.all_input_nodes) == 1 and value_of(node).is_floating_point()


@dataclass(frozen=True)
class ReadHeads:
    """The linear that reads an attention's output; ``columns`` [H, D] are the heads' channels in its input."""

    reader: fx.Node
    columns: torch.Tensor


def read_heads(model_graph: ModelGraph, attention: fx.Node) -> ReadHeads:
    """The one linear behind an attention. Raises NoHeadsError where something else reads its heads."""
    shape = _hints(shape_of(attention))
    values = torch.arange(_product(shape)).view(shape)
    node = attention
    while True:
        users = list(node.users)
        if len(users) != 1:
            raise NoHeadsError(f"{node.name} is read in {len(users)} places, expected one linear")
        (user,) = users
        if user.target == linear.overload and user.args[0] is node and user.all_input_nodes.count(node) == 1:
            break
        if user.target not in _VIEWS or user.args[0] is not node:
            raise NoHeadsError(f"{user.name} ({user.target}) stands between the attention and a linear")
        values = _viewed(model_graph, user, values)
        node = user
    _require_parameters(model_graph, user)
    _, heads, length, size = shape
    whole = values.reshape(-1, values.shape[-1])
    token, channel = (whole // size) % length, whole // (size * length) * size + whole % size
    in_order = torch.arange(length)[:, None].expand_as(token) if len(token) == length else None
    is_whole = in_order is not None and torch.equal(token, in_order) and bool((channel == channel[:1]).all())
    if not is_whole or channel.shape[-1] != heads * size:
        raise NoHeadsError(f"the heads do not lie side by side in the input of {user.name}")
    return ReadHeads(user, channel[0].argsort().view(heads, size))


def _require_parameters(model_graph: ModelGraph, node: fx.Node) -> None:
    weight, bias, _ = parameters_of(node)
    if not model_graph.is_weight(weight) or not (bias is None or model_graph.is_weight(bias)):
        raise NoHeadsError(f"the weight of {node.name} is computed, not a parameter")


def _viewed(model_graph: ModelGraph, view: fx.Node, values: torch.Tensor) -> torch.Tensor:
    def concrete(node: fx.Node) -> Any:
        if model_graph.is_weight(node):
            return model_graph.weights[node.name].cpu()
        value = value_of(node)
        if isinstance(value, torch.Tensor):
            raise NoHeadsError(f"{view.name} takes heads by an index that is not known when compiling")
        return _hints([value])[0]

    args, kwargs = fx.node.map_arg((view.args[1:], view.kwargs), concrete)
    return view.target(values, *args, **kwargs)  # type: ignore[operator]


def _rows(values: torch.Tensor, num_channels: int) -> torch.Tensor:
    """The channels [H, D] behind [1, H, S, D], which must be the same for all tokens, in the tokens' order."""
    if values.dim() != 4 or values.shape[0] != 1:
        raise NoHeadsError("the attention's operands are not [1, H, S, D]")
    token, channel = values // num_channels, values % num_channels
    in_order = torch.arange(values.shape[2])[:, None].expand_as(token)
    if not torch.equal(token, in_order) or not bool((channel == channel[:, :, :1]).all()):
        raise NoHeadsError("a head mixes tokens")
    return channel[0, :, 0]


def _require_whole_heads(at_norm: torch.Tensor, values: torch.Tensor, norm: fx.Node) -> None:
    rows, heads = (each.flatten(0, -2) for each in (at_norm, values))
    if rows.shape != heads.shape or not torch.equal(rows.unique(dim=0), heads.unique(dim=0)):
        raise NoHeadsError(f"{norm.name} normalises over more than one head")


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _hints(extents: Sequence[Any]) -> list[int]:
    return [each.node.hint if isinstance(each, torch.SymInt) else each for each in extents]


def _product(extents: Sequence[int]) -> int:
    return int(torch.tensor(extents).prod())
