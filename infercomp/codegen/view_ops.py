"""Calls that only move elements: views, slices, concatenation, gathers. Each is a map of indices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch

from . import scalar
from .indexing import Element, floor_div, modulo, reshape_index
from .lazy_tensor import Index, LazyTensor, Refused, broadcast_index, filled
from .scalar import Scalar, index_less, where

aten = torch.ops.aten
ZERO = sympy.Integer(0)


def _mapped(result: LazyTensor, source: LazyTensor, move: Callable[[Index], Index]) -> LazyTensor:
    return LazyTensor(result.shape, result.dtype, lambda index: source.at(move(index)))


def _reshape(result: LazyTensor, source: LazyTensor, *_: Any) -> LazyTensor:
    return _mapped(result, source, lambda index: reshape_index(index, result.shape, source.shape))


def _permute(result: LazyTensor, source: LazyTensor, dims: list[int]) -> LazyTensor:
    order = [dim % source.dim for dim in dims]
    return _mapped(result, source, lambda index: tuple(index[order.index(dim)] for dim in range(source.dim)))


def _transpose(result: LazyTensor, source: LazyTensor, first: int, second: int) -> LazyTensor:
    order = list(range(source.dim))
    order[first], order[second] = order[second], order[first]
    return _permute(result, source, order)


def _expand(result: LazyTensor, source: LazyTensor, *_: Any) -> LazyTensor:
    return _mapped(result, source, lambda index: broadcast_index(index, source.shape))


def _unsqueeze(result: LazyTensor, source: LazyTensor, dim: int) -> LazyTensor:
    dim %= result.dim
    return _mapped(result, source, lambda index: index[:dim] + index[dim + 1 :])


def _select(result: LazyTensor, source: LazyTensor, dim: int, position: Any) -> LazyTensor:
    dim %= source.dim
    at = _from_end(position, source.shape[dim])
    return _mapped(result, source, lambda index: (*index[:dim], at, *index[dim:]))


def _from_end(position: Any, extent: sympy.Expr) -> sympy.Expr:
    position = sympy.sympify(position)
    if position.is_negative:
        return sympy.expand(extent + position)
    if position.is_nonnegative is not True:
        raise Refused(f"a position of unknown sign: {position}")
    return position


def _slice(
    result: LazyTensor, source: LazyTensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> LazyTensor:
    dim %= source.dim
    first = _from_end(start or 0, source.shape[dim])
    return _mapped(
        result, source, lambda index: (*index[:dim], sympy.expand(first + step * index[dim]), *index[dim + 1 :])
    )


def _cat(result: LazyTensor, parts: list[LazyTensor], dim: int = 0) -> LazyTensor:
    dim %= result.dim

    def compute(index: Index) -> Scalar:
        end = result.shape[dim]
        value: Scalar | None = None
        for part in reversed(parts):
            start = sympy.expand(end - part.shape[dim])
            own = (*index[:dim], sympy.expand(index[dim] - start), *index[dim + 1 :])
            element = scalar.cast(part.at(own), result.dtype)
            value = element if value is None else where(index_less(index[dim], end), element, value)
            end = start
        assert value is not None
        return value

    return LazyTensor(result.shape, result.dtype, compute)


def _stack(result: LazyTensor, parts: list[LazyTensor], dim: int = 0) -> LazyTensor:
    dim %= result.dim

    def compute(index: Index) -> Scalar:
        own = index[:dim] + index[dim + 1 :]
        value = parts[-1].at(own)
        for position in range(len(parts) - 2, -1, -1):
            value = where(index_less(index[dim], sympy.Integer(position + 1)), parts[position].at(own), value)
        return value

    return LazyTensor(result.shape, result.dtype, compute)


def as_position(value: Scalar, extent: sympy.Expr) -> sympy.Expr:
    """An integer expression as an index that is checked against ``extent`` when it is read."""
    return Element(*_linear(value), extent)


def _linear(value: Scalar) -> tuple[Any, ...]:
    if value.op in ("wrap", "cast") and not value.args[0].dtype.is_floating_point:
        return _linear(value.args[0])
    if value.op == "load":
        buffer, index, dtype = value.payload  # type: ignore[misc]
        return sympy.Symbol(buffer), index, sympy.Symbol(str(dtype).removeprefix("torch."))
    raise Refused(f"an index computed by {value.op}: store it first")


def _embedding(result: LazyTensor, table: LazyTensor, ids: LazyTensor, *_: Any) -> LazyTensor:
    return LazyTensor(
        result.shape,
        result.dtype,
        lambda index: table.at((as_position(ids.at(index[:-1]), table.shape[0]), index[-1])),
    )


def _index_select(result: LazyTensor, source: LazyTensor, dim: int, ids: LazyTensor) -> LazyTensor:
    dim %= source.dim

    def move(index: Index) -> Index:
        return (*index[:dim], as_position(ids.at((index[dim],)), source.shape[dim]), *index[dim + 1 :])

    return _mapped(result, source, move)


def _gather(result: LazyTensor, source: LazyTensor, dim: int, ids: LazyTensor, *_: Any) -> LazyTensor:
    dim %= source.dim

    def move(index: Index) -> Index:
        return (*index[:dim], as_position(ids.at(index), source.shape[dim]), *index[dim + 1 :])

    return _mapped(result, source, move)


def _repeat(result: LazyTensor, source: LazyTensor, repeats: list[Any]) -> LazyTensor:
    def own(position: sympy.Expr, extent: sympy.Expr, times: Any) -> sympy.Expr:
        return position if times == 1 else modulo(position, extent)

    def move(index: Index) -> Index:
        kept = slice(result.dim - source.dim, None)
        return tuple(map(own, index[kept], source.shape, repeats[kept]))

    return _mapped(result, source, move)


def _repeat_interleave(result: LazyTensor, source: LazyTensor, times: Any, dim: int | None, *_: Any) -> LazyTensor:
    if dim is None:
        raise Refused("repeats of a flattened tensor")
    dim %= source.dim

    def move(index: Index) -> Index:
        return (*index[:dim], floor_div(index[dim], sympy.sympify(times)), *index[dim + 1 :])

    return _mapped(result, source, move)


def _arange(result: LazyTensor, *args: Any) -> LazyTensor:
    start, step = (args[0] if len(args) > 1 else 0), (args[2] if len(args) > 2 else 1)
    return LazyTensor(
        result.shape,
        result.dtype,
        lambda index: scalar.index_value(sympy.expand(start + step * index[0]), result.dtype),
    )


def _full(result: LazyTensor, _shape: Any, value: Any) -> LazyTensor:
    return filled(result.shape, result.dtype, value)


def _identity(result: LazyTensor, source: LazyTensor, *_: Any) -> LazyTensor:
    return _mapped(result, source, lambda index: index)


# Views are free: they are never kernels of their own.
VIEWS: dict[Any, Callable[..., LazyTensor]] = {
    aten.reshape.default: _reshape,
    aten.view.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.squeeze.dim: _reshape,
    aten.squeeze.dims: _reshape,
    aten.squeeze.default: _reshape,
    aten.unflatten.int: _reshape,
    aten.flatten.using_ints: _reshape,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: lambda result, source: _transpose(result, source, 0, 1),
    aten.expand.default: _expand,
    aten.unsqueeze.default: _unsqueeze,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.alias.default: _identity,
    aten.detach.default: _identity,
}

# Made of nothing that lies in memory: cheaper to compute again than to read.
GENERATORS: dict[Any, Callable[..., LazyTensor]] = {
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    aten.full.default: _full,
    aten.zeros.default: lambda result, *_: filled(result.shape, result.dtype, 0),
    aten.ones.default: lambda result, *_: filled(result.shape, result.dtype, 1),
    aten.scalar_tensor.default: lambda result, value: filled(result.shape, result.dtype, value),
    aten.zeros_like.default: lambda result, *_: filled(result.shape, result.dtype, 0),
    aten.ones_like.default: lambda result, *_: filled(result.shape, result.dtype, 1),
    aten.full_like.default: lambda result, _, value: filled(result.shape, result.dtype, value),
}

MOVES: dict[Any, Callable[..., LazyTensor]] = {
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.embedding.default: _embedding,
    aten.index_select.default: _index_select,
    aten.gather.default: _gather,
    aten.repeat.default: _repeat,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.clone.default: _identity,
    aten.contiguous.default: _identity,
}
