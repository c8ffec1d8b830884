"""Attention in the vocabulary, from ``scaled_dot_product_attention`` and from spelled-out forms.

    s = matmul(q, k.transpose(-1, -2)) * scale          (scale by mul, div, or on q and k before)
    s = tanh(s / cap) * cap                             (softcap, optional)
    s = s + mask                                        (or masked_fill, where, baddbmm, none)
    y = matmul(softmax(s), v)                       ->  y = attention(q, k, v, bias, scale=…, logit_softcap=…)

The walk starts at a softmax, goes forward to the product with v and peels scores backward to the
product with k; each op that may stand in between is one entry of ``_PEELERS``. Layouts are dealt with
by transposing what is found back to [B, H, S, D]; keys repeated for GQA are taken before the repeat.
Masks stay explicit here; ``recognize_masks`` decides what they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..codegen.model_graph import Emitter, ModelGraph, aten, same_shape, same_size, shape_of, value_of
from ..codegen.ops import attention
from .graph_pass import Pass, PassContext
from .head_layout import as_heads, permuted, unrepeated_heads
from .mask_proof import HIDDEN_BELOW
from .rewriting import cast_like, without_casts


class NoMatch(Exception):
    """A place that is no attention; ``args[0]`` says why."""


@dataclass(frozen=True)
class Bias:
    """A term of the scores: a tensor added ``factor`` times, or a mask that puts ``fill`` where it is True."""

    node: fx.Node
    rank: int
    factor: float = 1.0
    fill: float | None = None
    hides_where: bool = True


@dataclass(frozen=True)
class Scores:
    """What was peeled so far, outermost first, down to ``query @ key_transposed``, whose rank is ``rank``.

    ``with_heads`` is the outermost value of the scores in four dimensions, if they ever have four.
    """

    multiplier: float = 1.0
    softcap: float | None = None
    biases: tuple[Bias, ...] = ()
    query_factors: tuple[tuple[Any, fx.Node], ...] = ()
    query: fx.Node | None = None
    key_transposed: fx.Node | None = None
    rank: int = 4
    with_heads: fx.Node | None = None


Peeler = Callable[[ModelGraph, fx.Node, Scores], Scores]
_SOFTMAXES = (aten.softmax.int, aten._softmax.default)
_SCALES = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)


def constant_value(model_graph: ModelGraph, operand: Any) -> float | None:
    """The number behind an operand: a literal, a filled 0-d tensor, or a constant of one element."""
    if isinstance(operand, (int, float)):
        return float(operand)
    if not isinstance(operand, fx.Node) or not isinstance(value_of(operand), torch.Tensor):
        return None
    operand = without_casts(operand)
    if operand.target in (aten.full.default, aten.scalar_tensor.default):
        fill = operand.args[1] if operand.target == aten.full.default else operand.args[0]
        return float(fill) if isinstance(fill, (int, float)) else None
    tensor = model_graph.weights.get(operand.name) if operand.op == "placeholder" else None
    owned = tensor is not None and (model_graph.frozen or operand.name not in model_graph.weight_sources)
    return float(tensor.item()) if owned and tensor.numel() == 1 else None  # type: ignore[union-attr]


def _is_single_number(operand: Any) -> bool:
    if not isinstance(operand, fx.Node):
        return False
    value = value_of(operand)
    return not isinstance(value, torch.Tensor) or same_size(value.numel(), 1)


def _peel(model_graph: ModelGraph, node: Any, scores: Scores) -> Scores:
    if not isinstance(node, fx.Node):
        raise NoMatch(f"the number {node} stands in the place of the scores")
    node = without_casts(node)
    if scores.with_heads is None and value_of(node).dim() == 4:
        scores = replace(scores, with_heads=node)
    peeler = _PEELERS.get(node.target)
    if peeler is None:
        raise NoMatch(f"{node.name} ({_name(node)}) stands between the softmax and the product of q and k")
    return peeler(model_graph, node, scores)


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target)) if node.op == "call_function" else node.op


def _peel_product(model_graph: ModelGraph, node: fx.Node, scores: Scores) -> Scores:
    return replace(scores, query=node.args[0], key_transposed=node.args[1], rank=value_of(node).dim())


def _peel_baddbmm(model_graph: ModelGraph, node: fx.Node, scores: Scores) -> Scores:
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    if scores.softcap is not None or scores.query_factors:
        raise NoMatch(f"{node.name} adds a bias inside of a softcap or a scale that is a tensor")
    bias = Bias(node.args[0], value_of(node).dim(), scores.multiplier * beta)
    return replace(
        scores,
        biases=(*scores.biases, bias),
        multiplier=scores.multiplier * alpha,
        query=node.args[1],
        key_transposed=node.args[2],
        rank=value_of(node).dim(),
    )


def _peel_scale(model_graph: ModelGraph, node: fx.Node, scores: Scores) -> Scores:
    divides = node.target in (aten.div.Tensor, aten.div.Scalar)
    orders = [node.args] if divides else [node.args, node.args[::-1]]
    for inner, factor in orders:
        number = constant_value(model_graph, factor)
        if number is None or not isinstance(inner, fx.Node):
            continue
        if not divides and without_casts(inner).target == aten.tanh.default:
            return _peel_softcap(model_graph, without_casts(inner), number, scores)
        multiplier = scores.multiplier / number if divides else scores.multiplier * number
        return _peel(model_graph, inner, replace(scores, multiplier=multiplier))
    for inner, factor in orders:
        if _is_single_number(factor) and isinstance(inner, fx.Node):
            factors = (*scores.query_factors, (node.target, factor))
            return _peel(model_graph, inner, replace(scores, query_factors=factors))
    sizes = (value_of(operand).numel() for operand in node.all_input_nodes)
    raise NoMatch(f"{node.name} scales the scores by a tensor of {min(sizes, key=str)} elements")


def _peel_softcap(model_graph: ModelGraph, tanh: fx.Node, cap: float, scores: Scores) -> Scores:
    if scores.multiplier != 1.0 or scores.softcap is not None or scores.query_factors:
        raise NoMatch(f"{tanh.name} is a softcap that is scaled again")
    inner = without_casts(tanh.args[0])
    if inner.target not in _SCALES:
        raise NoMatch(f"{tanh.name} has no division by the cap inside")
    number = constant_value(model_graph, inner.args[1])
    inverse = number if inner.target in (aten.mul.Tensor, aten.mul.Scalar) else 1 / number if number else None
    if inverse is None or not math.isclose(inverse * cap, 1.0, rel_tol=1e-12):
        raise NoMatch(f"{tanh.name} divides by another number than the cap {cap}")
    return _peel(model_graph, inner.args[0], replace(scores, softcap=cap))


def _peel_sum(model_graph: ModelGraph, node: fx.Node, scores: Scores) -> Scores:
    if node.kwargs.get("alpha", 1) != 1:
        raise NoMatch(f"{node.name} adds with alpha")
    failure = NoMatch(f"{node.name} adds a number")
    for inner, bias in (node.args, node.args[::-1]):
        if not isinstance(inner, fx.Node) or not isinstance(bias, fx.Node):
            continue
        try:
            peeled = _peel(model_graph, inner, scores)
        except NoMatch as error:
            failure = error
            continue
        if scores.softcap is not None or scores.query_factors:
            raise NoMatch(f"{node.name} adds a bias inside of a softcap or a scale that is a tensor")
        term = Bias(bias, value_of(node).dim(), scores.multiplier)
        return replace(peeled, biases=(term, *peeled.biases))
    raise failure


def _with_mask(
    model_graph: ModelGraph, node: fx.Node, inner: fx.Node, mask: fx.Node, fill: Any, hides_where: bool, scores: Scores
) -> Scores:
    number = constant_value(model_graph, fill)
    if number is None:
        raise NoMatch(f"{node.name} fills hidden scores with a value that is not known when compiling")
    if number > HIDDEN_BELOW and not number <= _lowest(node):
        raise NoMatch(f"{node.name} fills hidden scores with {number:g}, which a softmax can still see")
    if scores.softcap is not None:
        raise NoMatch(f"{node.name} hides keys inside of a softcap")
    if scores.multiplier <= 0 or scores.query_factors:
        raise NoMatch(f"{node.name} hides keys before a scale that may not be positive")
    peeled = _peel(model_graph, inner, scores)
    term = Bias(mask, value_of(node).dim(), 1.0, number, hides_where)
    return replace(peeled, biases=(term, *peeled.biases))


def _lowest(node: fx.Node) -> float:
    return torch.finfo(value_of(node).dtype).min


def _peel_masked_fill(model_graph: ModelGraph, node: fx.Node, scores: Scores) -> Scores:
    inner, mask, fill = node.args
    return _with_mask(model_graph, node, inner, mask, fill, True, scores)


def _peel_where(model_graph: ModelGraph, node: fx.Node, scores: Scores) -> Scores:
    condition, if_true, if_false = node.args
    if constant_value(model_graph, if_false) is not None:
        return _with_mask(model_graph, node, if_true, condition, if_false, False, scores)
    return _with_mask(model_graph, node, if_false, condition, if_true, True, scores)


def _peel_reshape(model_graph: ModelGraph, node: fx.Node, scores: Scores) -> Scores:
    inner = node.args[0]
    if not same_shape(shape_of(node)[-2:], shape_of(inner)[-2:]):
        raise NoMatch(f"{node.name} mixes the scores' last two dimensions")
    return _peel(model_graph, inner, scores)


_PEELERS: dict[Any, Peeler] = {
    aten.matmul.default: _peel_product,
    aten.bmm.default: _peel_product,
    aten.baddbmm.default: _peel_baddbmm,
    **dict.fromkeys(_SCALES, _peel_scale),
    aten.add.Tensor: _peel_sum,
    aten.masked_fill.Scalar: _peel_masked_fill,
    aten.masked_fill.Tensor: _peel_masked_fill,
    aten.where.self: _peel_where,
    aten.where.ScalarSelf: _peel_where,
    aten.where.ScalarOther: _peel_where,
    aten.reshape.default: _peel_reshape,
}


def _product_with_value(softmax: fx.Node) -> tuple[fx.Node, fx.Node]:
    """(product, value): the one product that the probabilities go into, behind casts and reshapes."""
    node = softmax
    while True:
        users = list(node.users)
        if len(users) != 1:
            raise NoMatch(f"the probabilities {node.name} are used in {len(users)} places, expected one product")
        user = users[0]
        if user.target in (aten.matmul.default, aten.bmm.default) and user.args[0] is node:
            return user, user.args[1]
        if user.target not in (aten._to_copy.default, aten.to.dtype, aten.reshape.default) or user.args[0] is not node:
            raise NoMatch(f"the probabilities go into {user.name} ({_name(user)}), expected a product with the values")
        if not same_shape(shape_of(user)[-2:], shape_of(node)[-2:]):
            raise NoMatch(f"{user.name} mixes the probabilities' last two dimensions")
        node = user


def _prescaled(model_graph: ModelGraph, node: fx.Node) -> tuple[fx.Node, float]:
    """A query or key without the number it was multiplied by, and that number."""
    node, scale = without_casts(node), 1.0
    while node.target in _SCALES and isinstance(node.args[0], fx.Node):
        number = constant_value(model_graph, node.args[1])
        if number is None:
            break
        scale = scale / number if node.target in (aten.div.Tensor, aten.div.Scalar) else scale * number
        node = without_casts(node.args[0])
    return node, scale


def _merged_sizes(emit: Emitter, rows: fx.Node, value: fx.Node) -> list[fx.Node | int]:
    """The shape of a product [N, Sq, Dv] whose left side has ``rows``' last but one dimension."""
    return [emit.size(value, 0), emit.size(rows, -2), emit.size(value, -1)]


def _bias_tensor(emit: Emitter, bias: Bias, heads: list[fx.Node | int] | None) -> fx.Node:
    node = bias.node
    if bias.fill is not None:
        fill = bias.fill if math.isinf(bias.fill) else max(bias.fill, torch.finfo(torch.float32).min)
        if_true, if_false = (fill, 0.0) if bias.hides_where else (0.0, fill)
        node = emit(aten.where.Scalar, node, if_true, if_false)
    elif bias.factor != 1.0:
        node = emit(aten.mul.Tensor, node, bias.factor)
    return _bias_as_heads(emit, node, bias.rank, heads)


def _bias_as_heads(emit: Emitter, node: fx.Node, rank: int, heads: list[fx.Node | int] | None) -> fx.Node:
    """A bias that broadcast to scores of ``rank`` dimensions, so that it broadcasts to [B, H, Sq, Skv]."""
    if rank == 4 or value_of(node).dim() < 3:
        return node
    if heads is None:
        return emit(aten.unsqueeze.default, node, 0)
    sizes = emit.sizes(node)
    return node if same_size(sizes[0], 1) else emit(aten.reshape.default, node, [*heads, *sizes[1:]])


def _sum_of_biases(emit: Emitter, scores: Scores, heads: list[fx.Node | int] | None) -> fx.Node | None:
    total = None
    for bias in scores.biases:
        term = _bias_tensor(emit, bias, heads)
        total = term if total is None else emit(aten.add.Tensor, total, term)
    return total


def _source_of_heads(product: fx.Node, value: fx.Node, scores: Scores) -> fx.Node | None:
    """The node whose first two extents are [B, H]; None where batch and heads are one dimension everywhere."""
    source = scores.with_heads or (value if value_of(value).dim() == 4 else None)
    if value_of(value).dim() != value_of(product).dim():
        raise NoMatch(f"the values {value.name} are broadcast over the probabilities' dimensions")
    if source is None:
        return None
    rows, heads = shape_of(source)[:2]
    expected = [rows, heads] if value_of(product).dim() == 4 else [rows * heads]
    if not same_shape(shape_of(product)[:-2], tuple(expected)):
        raise NoMatch(f"{product.name} has {shape_of(product)[:-2]} heads, the scores have {rows, heads}")
    return source


def _check_operands(source: fx.Node | None, rank: int, *operands: fx.Node) -> None:
    """Queries and keys must have the rank of their product, and one merged dimension as many entries as [B, H]."""
    for operand in operands:
        shape = shape_of(operand)
        if len(shape) != rank:
            raise NoMatch(f"{operand.name} has {len(shape)} dimensions, its product has {rank}")
        if rank == 3 and source is not None and not same_size(shape[0], shape_of(source)[0] * shape_of(source)[1]):
            raise NoMatch(f"{operand.name} has {shape[0]} heads, the scores have {shape_of(source)[:2]}")


def _recognize_softmax(model_graph: ModelGraph, context: PassContext, softmax: fx.Node) -> None:
    rank = value_of(softmax).dim()
    if rank not in (3, 4) or softmax.args[1] % rank != rank - 1:
        raise NoMatch(f"the softmax runs over dimension {softmax.args[1]} of {rank}, expected the last of 3 or 4")
    product, value = _product_with_value(softmax)
    scores = _peel(model_graph, softmax.args[0], Scores())
    source = _source_of_heads(product, value, scores)
    query, query_scale = _prescaled(model_graph, scores.query)
    key, key_scale = _prescaled(model_graph, scores.key_transposed)
    _check_operands(source, scores.rank, query, key)
    site = context.claim(product)
    if site is None:
        return
    with model_graph.inserting_before(product) as emit:
        if torch.promote_types(value_of(query).dtype, value_of(product).dtype) != value_of(query).dtype:
            query = cast_like(emit, query, product)
        for target, factor in scores.query_factors:
            query = emit(target, query, factor)
        order = [*range(scores.rank - 2), scores.rank - 1, scores.rank - 2]
        heads = None if source is None else emit.sizes(source)[:2]
        new = _emit_attention(
            emit,
            _expanded(emit, as_heads(emit, query, heads), heads),
            as_heads(emit, permuted(emit, key, order), heads),
            as_heads(emit, without_casts(value), heads),
            bias=_sum_of_biases(emit, scores, heads),
            scale=scores.multiplier * query_scale * key_scale,
            logit_softcap=scores.softcap,
        )
        if value_of(product).dim() == 3:
            new = emit(aten.reshape.default, new, _merged_sizes(emit, softmax, value))
        new = cast_like(emit, new, product)
    context.replace(site, product, new)


def _emit_attention(emit: Emitter, query: fx.Node, key: fx.Node, value: fx.Node, **options: Any) -> fx.Node:
    batch, num_heads = emit.sizes(query)[:2]
    bias = options.pop("bias")
    key, value = (_expanded(emit, node, [batch, shape_of(node)[1]]) for node in (key, value))
    fewer_key, fewer_value = unrepeated_heads(emit, key), unrepeated_heads(emit, value)
    num_kv_heads = shape_of(fewer_key)[1]
    if same_size(num_kv_heads, shape_of(fewer_value)[1]) and shape_of(query)[1] % num_kv_heads == 0:
        key, value = fewer_key, fewer_value
    elif not same_size(shape_of(key)[1], shape_of(value)[1]):
        key, value = (_expanded(emit, node, [batch, num_heads]) for node in (key, value))
    return emit(attention, query, key, value, bias, **options)


def _expanded(emit: Emitter, node: fx.Node, heads: list[fx.Node | int] | None) -> fx.Node:
    """A [B, H, S, D] tensor broadcast to ``heads`` = [B, H]."""
    if heads is None or same_shape(shape_of(node)[:2], tuple(map(value_of, heads))):
        return node
    return emit(aten.expand.default, node, [*heads, *emit.sizes(node)[2:]])


def _recognize_sdpa(model_graph: ModelGraph, context: PassContext, node: fx.Node) -> None:
    operands: tuple[Any, ...] = (*node.args, *(None, None, None, None, 0.0, False)[len(node.args) :])
    query, key, value, mask, dropout, causal = operands
    mask, dropout = node.kwargs.get("attn_mask", mask), node.kwargs.get("dropout_p", dropout)
    causal, scale = node.kwargs.get("is_causal", causal), node.kwargs.get("scale")
    rank = value_of(query).dim()
    if dropout:
        raise NoMatch(f"it drops probabilities (dropout_p={dropout}), which inference does not")
    if rank not in (3, 4):
        raise NoMatch(f"the query has {rank} dimensions, expected 3 or 4")
    if not isinstance(shape_of(query)[-3], int) or not isinstance(shape_of(key)[-3], int):
        raise NoMatch("the number of heads is symbolic")
    site = context.claim(node)
    if site is None:
        return
    with model_graph.inserting_before(node) as emit:
        merged = _merged_sizes(emit, query, value) if rank == 3 else []
        query, key, value = (as_heads(emit, operand, None) for operand in (query, key, value))
        if mask is not None and value_of(mask).dim() == 3 and rank == 3:
            mask = emit(aten.unsqueeze.default, mask, 0)
        square = same_size(shape_of(query)[2], shape_of(key)[2])
        if causal and not square:
            mask = _top_left_causal(emit, query, key)
        scale = 1 / math.sqrt(shape_of(query)[-1]) if scale is None else scale
        new = _emit_attention(emit, query, key, value, bias=mask, scale=scale, is_causal=bool(causal and square))
        if rank == 3:
            new = emit(aten.reshape.default, new, merged)
        context.replace(site, node, new)


def _top_left_causal(emit: Emitter, query: fx.Node, key: fx.Node) -> fx.Node:
    """SDPA aligns ``is_causal`` with the first key, our op with the last: with other lengths it stays explicit."""
    device = value_of(query).device
    rows = emit(aten.unsqueeze.default, emit(aten.arange.default, emit.size(query, 2), device=device), 1)
    return emit(aten.le.Tensor, emit(aten.arange.default, emit.size(key, 2), device=device), rows)


def run(model_graph: ModelGraph, context: PassContext) -> None:
    for node in model_graph.calls(aten.scaled_dot_product_attention.default, *_SOFTMAXES):
        recognize = _recognize_softmax if node.target in _SOFTMAXES else _recognize_sdpa
        try:
            recognize(model_graph, context, node)
        except NoMatch as reason:
            context.near_miss(node, str(reason))
    model_graph.eliminate_dead_code()


RECOGNIZE_ATTENTION = Pass("recognize_attention", run, after=("normalize", "fuse_rope"))
