"""Calls that reduce over the last dimension, and the vocabulary's ops that are loops: norms, rotary, gates.

Each follows its definition in ``ops/`` step by step: the same dtype, the same single rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy
import torch

from . import scalar
from .indexing import LoopVariable, floor_div, modulo
from .lazy_tensor import Index, LazyTensor, Refused, broadcast_index
from .ops import (
    gated_activation,
    group_embedding,
    int8_embedding,
    layer_norm,
    quantize_per_tensor,
    quantize_per_token,
    rms_norm,
    rotary_embedding,
)
from .ops.group_codes import middle_code
from .ops.quantized import SMALLEST_MAXIMUM
from .pointwise_ops import ACTIVATIONS
from .scalar import Scalar, binary, cast, constant, index_less, index_value, reduction, unary, where
from .view_ops import as_position

aten = torch.ops.aten


def over_last(
    kind: str, source: LazyTensor, index: Index, change: Callable[[Scalar], Scalar], dtype: torch.dtype
) -> Scalar:
    """The reduction of ``change(element)`` over the row that ``index`` lies in."""
    extent = source.shape[-1]
    variable = LoopVariable("k", extent) if extent != 1 else sympy.Integer(0)
    body = change(cast(source.at((*index[: source.dim - 1], variable)), dtype))
    return body if extent == 1 else reduction(kind, body, variable, extent)


def _same(x: Scalar) -> Scalar:
    return x


def _square(x: Scalar) -> Scalar:
    return binary("mul", x, x)


def _mean(total: Scalar, extent: sympy.Expr) -> Scalar:
    return binary("div", total, index_value(extent, total.dtype))


def _rms_norm(
    result: LazyTensor, source: LazyTensor, weight: LazyTensor | None, eps: float, unit_offset: bool = False
) -> LazyTensor:
    dtype = scalar.compute_dtype(result.dtype)

    def compute(index: Index) -> Scalar:
        mean = _mean(over_last("sum", source, index, _square, dtype), source.shape[-1])
        scale = unary("rsqrt", binary("add", mean, constant(eps, dtype)))
        value = binary("mul", cast(source.at(index), dtype), scale)
        if weight is not None:
            factor = cast(weight.at(index[-1:]), dtype)
            if unit_offset:
                factor = binary("add", constant(1.0, dtype), factor)
            value = binary("mul", value, factor)
        return cast(value, result.dtype)

    return LazyTensor(result.shape, result.dtype, compute)


def _layer_norm(
    result: LazyTensor, source: LazyTensor, weight: LazyTensor | None, bias: LazyTensor | None, eps: float
) -> LazyTensor:
    dtype = scalar.compute_dtype(result.dtype)

    def compute(index: Index) -> Scalar:
        mean = _mean(over_last("sum", source, index, _same, dtype), source.shape[-1])
        spread = over_last("sum", source, index, lambda x: _square(binary("sub", x, mean)), dtype)
        scale = unary("rsqrt", binary("add", _mean(spread, source.shape[-1]), constant(eps, dtype)))
        value = binary("mul", binary("sub", cast(source.at(index), dtype), mean), scale)
        if weight is not None:
            value = binary("mul", value, cast(weight.at(index[-1:]), dtype))
        if bias is not None:
            value = binary("add", value, cast(bias.at(index[-1:]), dtype))
        return cast(value, result.dtype)

    return LazyTensor(result.shape, result.dtype, compute)


def _gated_activation(result: LazyTensor, gate: LazyTensor, up: LazyTensor, activation: str) -> LazyTensor:
    dtype = scalar.compute_dtype(result.dtype)

    def compute(index: Index) -> Scalar:
        activated = ACTIVATIONS[activation](cast(gate.at(index), dtype))
        return cast(binary("mul", activated, cast(up.at(index), dtype)), result.dtype)

    return LazyTensor(result.shape, result.dtype, compute)


def _rotary_embedding(
    result: LazyTensor, source: LazyTensor, cos: LazyTensor, sin: LazyTensor, interleaved: bool = False
) -> LazyTensor:
    dtype = scalar.compute_dtype(result.dtype)
    rotary_dim = cos.shape[-1]

    def turned(index: Index) -> Scalar:
        *rows, channel = index
        if interleaved:
            following = unary("neg", cast(source.at((*rows, sympy.expand(channel + 1))), dtype))
            preceding = cast(source.at((*rows, sympy.expand(channel - 1))), dtype)
            is_first = index_less(modulo(channel, sympy.Integer(2)), sympy.Integer(1))
            return where(is_first, following, preceding)
        half = rotary_dim / 2
        first = unary("neg", cast(source.at((*rows, sympy.expand(channel + half))), dtype))
        second = cast(source.at((*rows, sympy.expand(channel - half))), dtype)
        return where(index_less(channel, half), first, second)

    def compute(index: Index) -> Scalar:
        value = cast(source.at(index), dtype)
        angles = [cast(table.at(broadcast_index(index, table.shape)), dtype) for table in (cos, sin)]
        rotated = binary("add", binary("mul", value, angles[0]), binary("mul", turned(index), angles[1]))
        rotated = cast(rotated, result.dtype)
        if rotary_dim == source.shape[-1]:
            return rotated
        return where(index_less(index[-1], rotary_dim), rotated, source.at(index))

    return LazyTensor(result.shape, result.dtype, compute)


def _softmax(result: LazyTensor, source: LazyTensor, dim: int, *_: Any) -> LazyTensor:
    if dim % source.dim != source.dim - 1:
        raise Refused("softmax over another dimension than the last")
    dtype = scalar.compute_dtype(result.dtype)

    def compute(index: Index) -> Scalar:
        largest = over_last("max", source, index, _same, dtype)

        def exponential(x: Scalar) -> Scalar:
            return unary("exp", binary("sub", x, largest))

        total = over_last("sum", source, index, exponential, dtype)
        return cast(binary("div", exponential(cast(source.at(index), dtype)), total), result.dtype)

    return LazyTensor(result.shape, result.dtype, compute)


def _reducer(kind: str, *, is_mean: bool = False) -> Callable[..., LazyTensor]:
    def rule(result: LazyTensor, source: LazyTensor, dims: Any = None, keepdim: bool = False, *_: Any) -> LazyTensor:
        dims = [dims] if isinstance(dims, int) else list(dims or [])
        if [dim % source.dim for dim in dims] != [source.dim - 1]:
            raise Refused("a reduction over another dimension than the last")
        if not result.dtype.is_floating_point:
            raise Refused("a reduction of integers")
        dtype = scalar.compute_dtype(result.dtype)

        def compute(index: Index) -> Scalar:
            row = index[: source.dim - 1]
            value = over_last(kind, source, (*row, sympy.Integer(0)), _same, dtype)
            return cast(_mean(value, source.shape[-1]) if is_mean else value, result.dtype)

        return LazyTensor(result.shape, result.dtype, compute)

    return rule


def _aten_layer_norm(
    result: LazyTensor, source: LazyTensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> LazyTensor:
    if len(shape) != 1:
        raise Refused("a norm over several dimensions")
    return _layer_norm(result, source, weight, bias, eps)


def _int8_embedding(result: LazyTensor, table: LazyTensor, scale: LazyTensor, ids: LazyTensor, *_: Any) -> LazyTensor:
    def compute(index: Index) -> Scalar:
        row = as_position(ids.at(index[:-1]), table.shape[0])
        code = cast(table.at((row, index[-1])), torch.float32)
        return cast(binary("mul", code, scale.at((row,))), result.dtype)

    return LazyTensor(result.shape, result.dtype, compute)


def _group_embedding(
    result: LazyTensor,
    table: LazyTensor,
    scale: LazyTensor,
    zero: LazyTensor | None,
    ids: LazyTensor,
    bits: int,
    *_: Any,
) -> LazyTensor:
    if bits != 8 or zero is not None:
        raise Refused(f"an embedding of codes of {bits} bits{'' if zero is None else ' with zeros'}")
    group_size = sympy.Integer(int(table.shape[1]) // int(scale.shape[1]))

    def compute(index: Index) -> Scalar:
        row = as_position(ids.at(index[:-1]), table.shape[0])
        code = cast(table.at((row, index[-1])), torch.float32)
        step = cast(scale.at((row, floor_div(index[-1], group_size))), torch.float32)
        centred = binary("sub", code, constant(float(middle_code(bits)), torch.float32))
        return cast(binary("mul", centred, step), result.dtype)

    return LazyTensor(result.shape, result.dtype, compute)


ROWS: dict[Any, Callable[..., LazyTensor]] = {
    int8_embedding.overload: _int8_embedding,
    group_embedding.overload: _group_embedding,
    rms_norm.overload: _rms_norm,
    layer_norm.overload: _layer_norm,
    aten.layer_norm.default: _aten_layer_norm,
    gated_activation.overload: _gated_activation,
    rotary_embedding.overload: _rotary_embedding,
    aten.softmax.int: _softmax,
    aten._softmax.default: _softmax,
    aten.mean.dim: _reducer("sum", is_mean=True),
    aten.sum.dim_IntList: _reducer("sum"),
    aten.amax.default: _reducer("max"),
    aten.amin.default: _reducer("min"),
}


def nearest_int8(source: LazyTensor) -> tuple[LazyTensor, LazyTensor]:
    """Codes [..., K] and scales [..., 1] of rows that are each on a symmetric grid of their own."""
    float32 = torch.float32

    def maximum(index: Index) -> Scalar:
        # As integers, the bits of NaN are above those of infinity, so the largest tells of both.
        return unary("from_bits", over_last("max", source, index, lambda x: unary("bits", unary("abs", x)), float32))

    def is_zero(largest: Scalar) -> Scalar:
        return binary("lt", largest, constant(SMALLEST_MAXIMUM, float32))

    def codes(index: Index) -> Scalar:
        largest = maximum(index)
        inverse = binary("div", constant(127.0, float32), largest)
        inverse = where(is_zero(largest), constant(0.0, float32), inverse)
        rounded = unary("round_even", binary("mul", cast(source.at(index), float32), inverse))
        return cast(where(unary("isfinite", largest), rounded, constant(0.0, float32)), torch.int8)

    def scale(index: Index) -> Scalar:
        largest = maximum((*index[:-1], sympy.Integer(0)))
        step = binary("mul", largest, constant(float(torch.tensor(1.0 / 127.0)), float32))
        step = where(is_zero(largest), constant(1.0, float32), step)
        return where(unary("isfinite", largest), step, constant(math.nan, float32))

    rows = (*source.shape[:-1], sympy.Integer(1))
    return LazyTensor(source.shape, torch.int8, codes), LazyTensor(rows, float32, scale)


def _int8_by_step(source: LazyTensor, step: LazyTensor) -> tuple[LazyTensor, LazyTensor]:
    """Codes [..., K] and scales [..., 1] of rows on one grid."""
    float32 = torch.float32

    def is_finite(index: Index) -> Scalar:
        largest = over_last("max", source, index, lambda x: unary("bits", unary("abs", x)), float32)
        return unary("isfinite", unary("from_bits", largest))

    def codes(index: Index) -> Scalar:
        inverse = binary("div", constant(1.0, float32), step.at((sympy.Integer(0),)))
        rounded = unary("round_even", binary("mul", cast(source.at(index), float32), inverse))
        clipped = binary("minimum", binary("maximum", rounded, constant(-127.0, float32)), constant(127.0, float32))
        return cast(where(is_finite(index), clipped, constant(0.0, float32)), torch.int8)

    def scale(index: Index) -> Scalar:
        row = (*index[:-1], sympy.Integer(0))
        return where(is_finite(row), step.at((sympy.Integer(0),)), constant(math.nan, float32))

    rows = (*source.shape[:-1], sympy.Integer(1))
    return LazyTensor(source.shape, torch.int8, codes), LazyTensor(rows, float32, scale)


def _quantize_per_token(region: Any, outputs: Any, source: LazyTensor, group_size: int) -> tuple[LazyTensor, ...]:
    return *nearest_int8(source), _sums_of_codes(region, outputs, source, group_size)


def _quantize_per_tensor(
    region: Any, outputs: Any, source: LazyTensor, step: LazyTensor, group_size: int
) -> tuple[LazyTensor, ...]:
    return *_int8_by_step(source, step), _sums_of_codes(region, outputs, source, group_size)


def _sums_of_codes(region: Any, outputs: Any, source: LazyTensor, group_size: int) -> LazyTensor:
    """Read back from the codes that the same row has stored."""

    def sums(index: Index) -> Scalar:
        stored_codes = region.tensor(outputs[0])
        variable = LoopVariable("k", sympy.Integer(group_size))
        element = stored_codes.at((*index[:-1], sympy.expand(index[-1] * group_size + variable)))
        return reduction("sum", element, variable, variable.extent)

    shape = (*source.shape[:-1], source.shape[-1] / group_size)
    return LazyTensor(shape, torch.int32, sums)


MULTIPLE: dict[Any, Callable[..., tuple[LazyTensor, ...]]] = {
    quantize_per_token.overload: _quantize_per_token,
    quantize_per_tensor.overload: _quantize_per_tensor,
}
