"""``LazyTensor``: a tensor as a function from index to scalar expression, before anyone decides to store it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from . import scalar
from .indexing import LoopVariable, flatten, size_expr
from .scalar import Scalar

Index = tuple[sympy.Expr, ...]
Shape = tuple[sympy.Expr, ...]

DTYPES = frozenset(
    (
        torch.float32,
        torch.float64,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
)


class Refused(Exception):
    """An implementation does not take a node; the message says why."""


@dataclass(eq=False)
class LazyTensor:
    """``at(index)`` gives the element at a multi-index of ``shape``, in the dtype's compute dtype."""

    shape: Shape
    dtype: torch.dtype
    compute: Callable[[Index], Scalar]
    _memo: dict[Index, Scalar] = field(default_factory=dict, repr=False)

    def at(self, index: Sequence[sympy.Expr]) -> Scalar:
        key = tuple(index)
        found = self._memo.get(key)
        if found is None:
            found = self._memo[key] = self.compute(key)
        return found

    @property
    def dim(self) -> int:
        return len(self.shape)


def stored(name: str, shape: Shape, dtype: torch.dtype, strides: Shape | None = None, offset: Any = 0) -> LazyTensor:
    """A tensor that lies in the buffer ``name``, row-major unless ``strides`` (in elements) are given."""

    def compute(index: Index) -> Scalar:
        if strides is None:
            position = flatten(index, shape)
        else:
            position = sympy.expand(offset + sum(i * s for i, s in zip(index, strides, strict=True)))
        return scalar.load(name, position, dtype)

    return LazyTensor(shape, dtype, compute)


def filled(shape: Shape, dtype: torch.dtype, value: float | int | bool) -> LazyTensor:
    return LazyTensor(
        shape, dtype, lambda index: scalar.cast(scalar.constant(value, scalar.compute_dtype(dtype)), dtype)
    )


def loop_index(shape: Shape, names: Sequence[str]) -> Index:
    """A loop variable per dimension; dimensions of one element have index 0."""
    pairs = zip(names, shape, strict=True)
    return tuple(sympy.Integer(0) if extent == 1 else LoopVariable(name, extent) for name, extent in pairs)


def broadcast_index(index: Index, shape: Shape) -> Index:
    """The index into an operand of ``shape`` that broadcasts to the shape that ``index`` belongs to."""
    own = index[len(index) - len(shape) :]
    return tuple(sympy.Integer(0) if extent == 1 else i for i, extent in zip(own, shape, strict=True))


def shape_exprs(value: torch.Tensor) -> Shape:
    return tuple(size_expr(extent) for extent in value.shape)


def check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise Refused(f"no kernel computes {dtype}")
