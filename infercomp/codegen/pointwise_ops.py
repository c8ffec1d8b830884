"""What pointwise ATen calls compute, as a table from target to scalar expression.

Every call computes in its result's compute dtype and rounds once to its result's dtype, as eager does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy
import torch

from . import scalar
from .lazy_tensor import Index, LazyTensor, Refused, broadcast_index
from .scalar import Scalar, binary, constant, unary, where

aten = torch.ops.aten
Formula = Callable[..., Scalar]


def _add(x: Scalar, y: Scalar, alpha: Scalar) -> Scalar:
    return binary("add", x, y if _is(alpha, 1) else binary("mul", y, alpha))


def _sub(x: Scalar, y: Scalar, alpha: Scalar) -> Scalar:
    return binary("sub", x, y if _is(alpha, 1) else binary("mul", y, alpha))


def _is(value: Scalar, number: float) -> bool:
    return value.op == "constant" and value.dtype != torch.bool and float(str(value.payload)) == number


def silu(x: Scalar) -> Scalar:
    return binary("mul", x, unary("sigmoid", x))


def gelu(x: Scalar) -> Scalar:
    half, one = constant(0.5, x.dtype), constant(1.0, x.dtype)
    return binary(
        "mul",
        binary("mul", x, half),
        binary("add", one, unary("erf", binary("mul", x, constant(math.sqrt(0.5), x.dtype)))),
    )


def gelu_tanh(x: Scalar) -> Scalar:
    cube = binary("mul", binary("mul", x, x), x)
    inner = binary("add", x, binary("mul", cube, constant(0.044715, x.dtype)))
    tanh = unary("tanh", binary("mul", inner, constant(math.sqrt(2.0 / math.pi), x.dtype)))
    return binary("mul", binary("mul", x, constant(0.5, x.dtype)), binary("add", constant(1.0, x.dtype), tanh))


def relu(x: Scalar) -> Scalar:
    return binary("maximum", x, constant(0.0, x.dtype))


def sigmoid(x: Scalar) -> Scalar:
    return unary("sigmoid", x)


ACTIVATIONS: dict[str, Callable[[Scalar], Scalar]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": relu,
    "sigmoid": sigmoid,
}


def _gelu(x: Scalar, approximate: str) -> Scalar:
    return gelu_tanh(x) if approximate == "tanh" else gelu(x)


def _pow(x: Scalar, exponent: Scalar) -> Scalar:
    if _is(exponent, 2):
        return binary("mul", x, x)
    if _is(exponent, 3):
        return binary("mul", binary("mul", x, x), x)
    if _is(exponent, 0.5):
        return unary("sqrt", x)
    if _is(exponent, -0.5):
        return unary("rsqrt", x)
    if _is(exponent, 1):
        return x
    return binary("pow", x, exponent)


def _clamp(x: Scalar, low: Scalar | None, high: Scalar | None) -> Scalar:
    x = x if low is None else binary("maximum", x, low)
    return x if high is None else binary("minimum", x, high)


# target -> (formula over operands in the compute dtype, number of operands); further arguments come last.
_ARITHMETIC: dict[Any, tuple[Formula, int]] = {
    aten.add.Tensor: (_add, 3),
    aten.add.Scalar: (_add, 3),
    aten.sub.Tensor: (_sub, 3),
    aten.sub.Scalar: (_sub, 3),
    aten.rsub.Scalar: (lambda x, y, alpha: _sub(y, x, alpha), 3),
    aten.mul.Tensor: (lambda x, y: binary("mul", x, y), 2),
    aten.mul.Scalar: (lambda x, y: binary("mul", x, y), 2),
    aten.div.Tensor: (lambda x, y: binary("div", x, y), 2),
    aten.div.Scalar: (lambda x, y: binary("div", x, y), 2),
    aten.maximum.default: (lambda x, y: binary("maximum", x, y), 2),
    aten.minimum.default: (lambda x, y: binary("minimum", x, y), 2),
    aten.max.other: (lambda x, y: binary("maximum", x, y), 2),
    aten.min.other: (lambda x, y: binary("minimum", x, y), 2),
    aten.pow.Tensor_Scalar: (_pow, 2),
    aten.pow.Tensor_Tensor: (_pow, 2),
    aten.silu.default: (silu, 1),
    aten.gelu.default: (_gelu, 1),
    aten.relu.default: (relu, 1),
    aten.sigmoid.default: (sigmoid, 1),
    aten.clamp.default: (_clamp, 3),
    aten.clamp_min.default: (lambda x, low: _clamp(x, low, None), 2),
    aten.clamp_max.default: (lambda x, high: _clamp(x, None, high), 2),
    aten.square.default: (lambda x: binary("mul", x, x), 1),
    **{
        getattr(aten, name).default: ((lambda x, op=op: unary(op, x)), 1)
        for name, op in {
            "neg": "neg", "abs": "abs", "exp": "exp", "log": "log", "sqrt": "sqrt", "rsqrt": "rsqrt", "sin": "sin",
            "cos": "cos", "tanh": "tanh", "erf": "erf", "floor": "floor", "ceil": "ceil", "round": "round_even",
            "trunc": "trunc", "reciprocal": "reciprocal",
        }.items()
    },
}  # fmt: skip

_COMPARISONS: dict[Any, str] = {
    getattr(getattr(aten, name), overload): op
    for name, op in {"eq": "eq", "ne": "ne", "lt": "lt", "le": "le", "gt": "gt", "ge": "ge"}.items()
    for overload in ("Tensor", "Scalar")
}

_LOGIC: dict[Any, str] = {
    aten.logical_and.default: "and",
    aten.logical_or.default: "or",
    aten.bitwise_and.Tensor: "and",
    aten.bitwise_or.Tensor: "or",
    aten.logical_not.default: "not",
    aten.bitwise_not.default: "not",
    aten.__and__.Tensor: "and",
    aten.__or__.Tensor: "or",
}


def element(operand: Any, index: Index, dtype: torch.dtype) -> Scalar:
    """One operand's element, in ``dtype``: tensors broadcast, numbers and sizes are constants."""
    if isinstance(operand, LazyTensor):
        return scalar.cast(operand.at(broadcast_index(index, operand.shape)), dtype)
    if isinstance(operand, sympy.Expr):
        return scalar.index_value(operand, dtype)
    return constant(operand, dtype)


def promoted_dtype(operands: list[Any]) -> torch.dtype:
    """PyTorch's type promotion of tensors (those with dimensions first) and numbers."""
    samples = [
        torch.empty([1] * min(x.dim, 1), dtype=x.dtype)
        if isinstance(x, LazyTensor)
        else (0 if isinstance(x, sympy.Expr) else x)
        for x in operands
    ]
    if len(samples) == 1:
        samples.append(samples[0])
    return torch.result_type(samples[0], samples[1])


def _sample(operand: Any) -> Any:
    if isinstance(operand, LazyTensor):
        return torch.empty([1] * min(operand.dim, 1), dtype=operand.dtype)
    return 0 if isinstance(operand, sympy.Expr) else operand


def pointwise(target: Any, result: LazyTensor, args: list[Any]) -> LazyTensor | None:
    """The result of a pointwise call as a lazy tensor; None for a target that is not in the tables.

    ``args`` are all of the schema's arguments in order; ``result`` gives shape and dtype.
    """
    if target in _ARITHMETIC:
        formula, count = _ARITHMETIC[target]
        return _arithmetic(formula, result, args[:count], args[count:])
    if target in _COMPARISONS:
        return _comparison(_COMPARISONS[target], result, args[:2])
    if target in _LOGIC:
        return _logic(_LOGIC[target], result, args)
    if target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar):
        return _select(result, args[0], args[1], args[2])
    if target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return _select(result, args[1], args[2], args[0])
    if target in (aten._to_copy.default, aten.to.dtype):
        return LazyTensor(result.shape, result.dtype, lambda index: scalar.cast(args[0].at(index), result.dtype))
    return None


def _arithmetic(formula: Formula, result: LazyTensor, operands: list[Any], extras: list[Any]) -> LazyTensor:
    dtype = scalar.compute_dtype(result.dtype)
    if dtype == torch.bool:
        raise Refused("arithmetic on booleans")
    extras = [extra for extra in extras if isinstance(extra, str)]

    def compute(index: Index) -> Scalar:
        values = [None if operand is None else element(operand, index, dtype) for operand in operands]
        return scalar.cast(formula(*values, *extras), result.dtype)

    return LazyTensor(result.shape, result.dtype, compute)


def _comparison(op: str, result: LazyTensor, operands: list[Any]) -> LazyTensor:
    dtype = scalar.compute_dtype(promoted_dtype(operands))
    return LazyTensor(
        result.shape, torch.bool, lambda index: binary(op, *(element(operand, index, dtype) for operand in operands))
    )


def _logic(op: str, result: LazyTensor, operands: list[Any]) -> LazyTensor:
    if result.dtype != torch.bool or any(isinstance(x, LazyTensor) and x.dtype != torch.bool for x in operands):
        raise Refused("bitwise logic on integers")

    def compute(index: Index) -> Scalar:
        values = [element(operand, index, torch.bool) for operand in operands]
        return unary(op, *values) if op == "not" else binary(op, *values)

    return LazyTensor(result.shape, torch.bool, compute)


def _select(result: LazyTensor, condition: Any, if_true: Any, if_false: Any) -> LazyTensor:
    if condition.dtype != torch.bool:
        raise Refused("a condition that is not bool")

    def compute(index: Index) -> Scalar:
        branches = [element(branch, index, result.dtype) for branch in (if_true, if_false)]
        return where(element(condition, index, torch.bool), *branches)

    return LazyTensor(result.shape, result.dtype, compute)
