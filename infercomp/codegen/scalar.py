"""The scalar IR: what a fused region computes for one element, as an immutable expression.

About twenty arithmetic ops over ``load``, ``constant``, ``index`` and row reductions. Floating values
are computed in float32 (float64 for float64 graphs) and ``round`` marks where the definition rounds to
a narrower dtype, so a fused kernel gives the bits that its parts give one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
import torch

_FUNCTIONS = ("neg", "abs", "exp", "log", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "tanh", "erf", "sigmoid")
UNARY = frozenset((*_FUNCTIONS, "floor", "ceil", "round_even", "trunc", "not", "isfinite", "bits", "from_bits"))
BINARY = frozenset(
    ("add", "sub", "mul", "div", "maximum", "minimum", "pow", "eq", "ne", "lt", "le", "gt", "ge", "and", "or")
)
COMPARISONS = frozenset(("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "isfinite"))
REDUCTIONS = frozenset({"sum", "max", "min"})


@dataclass(frozen=True)
class Scalar:
    """``op`` over ``args``; ``dtype`` is the dtype computed in. ``payload`` by op:

    load: (buffer name, flat element index, stored dtype); constant: the value's text; index: a sympy
    expression; index_less: two of them; bits, from_bits: float32 as the int32 of its bits; accumulator: the
    column offset of a matrix product's result; cast, wrap, round: the target dtype;
    sum, max, min: (loop variable, extent) over the only argument.
    """

    op: str
    args: tuple[Scalar, ...]
    dtype: torch.dtype
    payload: Any = None

    @cached_property
    def _hash(self) -> int:
        return hash((self.op, self.args, self.dtype, self.payload))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Scalar) or self._hash != other._hash:
            return False
        return (self.op, self.dtype, self.payload, self.args) == (other.op, other.dtype, other.payload, other.args)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that values of ``dtype`` are computed in."""
    if dtype in (torch.bfloat16, torch.float16):
        return torch.float32
    return torch.int32 if dtype in (torch.int16, torch.int8, torch.uint8) else dtype


def load(buffer: str, index: sympy.Expr, dtype: torch.dtype) -> Scalar:
    """The element of a buffer of ``dtype`` at a flat element index."""
    return Scalar("load", (), compute_dtype(dtype), (buffer, index, dtype))


def constant(value: float | int | bool, dtype: torch.dtype) -> Scalar:
    dtype = compute_dtype(dtype)
    number = float(value) if dtype.is_floating_point else (bool(value) if dtype == torch.bool else int(value))
    # Two constants that compare equal may differ in their sign of zero or be NaN: their text tells them apart.
    return Scalar("constant", (), dtype, repr(number))


def index_value(expression: sympy.Expr, dtype: torch.dtype = torch.int64) -> Scalar:
    """An index expression as a number."""
    return cast(Scalar("index", (), torch.int64, sympy.expand(expression)), dtype)


def unary(op: str, operand: Scalar) -> Scalar:
    assert op in UNARY, op
    special = {"bits": torch.int32, "from_bits": torch.float32}
    return Scalar(op, (operand,), torch.bool if op in COMPARISONS else special.get(op, operand.dtype))


def binary(op: str, left: Scalar, right: Scalar) -> Scalar:
    assert op in BINARY, op
    assert left.dtype == right.dtype, (op, left.dtype, right.dtype)
    return Scalar(op, (left, right), torch.bool if op in COMPARISONS else left.dtype)


def where(condition: Scalar, if_true: Scalar, if_false: Scalar) -> Scalar:
    assert if_true.dtype == if_false.dtype, (if_true.dtype, if_false.dtype)
    return Scalar("where", (condition, if_true, if_false), if_true.dtype)


def index_less(expression: sympy.Expr, bound: sympy.Expr) -> Scalar:
    """Whether expression < bound; loops are split there, so that inside it is known."""
    return Scalar("index_less", (), torch.bool, (sympy.expand(expression), sympy.expand(bound)))


def cast(operand: Scalar, dtype: torch.dtype) -> Scalar:
    """The value as PyTorch's conversion to ``dtype`` gives it, computed on in that dtype's compute dtype."""
    if dtype in (torch.bfloat16, torch.float16):
        return round_to(cast(operand, torch.float32), dtype)
    target = compute_dtype(dtype)
    if target != operand.dtype:
        operand = Scalar("cast", (operand,), target, target)
    return operand if dtype == target else Scalar("wrap", (operand,), target, dtype)


def round_to(operand: Scalar, dtype: torch.dtype) -> Scalar:
    """``operand`` rounded to what a tensor of ``dtype`` holds."""
    if dtype == operand.dtype or not dtype.is_floating_point:
        return operand
    if operand.op == "round" and operand.payload == dtype:
        return operand
    if operand.op == "load" and operand.payload[2] == dtype:  # type: ignore[index]
        return operand
    return Scalar("round", (operand,), operand.dtype, dtype)


def accumulator(column_offset: sympy.Expr, dtype: torch.dtype) -> Scalar:
    """The matrix product's own element, ``column_offset`` columns to the right of the one being written."""
    return Scalar("accumulator", (), dtype, column_offset)


def reduction(kind: str, body: Scalar, variable: sympy.Symbol, extent: sympy.Expr) -> Scalar:
    """Sum, max or min of ``body`` over ``variable`` in [0, extent)."""
    assert kind in REDUCTIONS, kind
    return Scalar(kind, (body,), body.dtype, (variable, extent))


def walk(root: Scalar) -> Iterator[Scalar]:
    """Every distinct node under ``root``, operands before users."""
    seen: set[Scalar] = set()
    pending: list[tuple[Scalar, bool]] = [(root, False)]
    while pending:
        node, is_done = pending.pop()
        if node in seen:
            continue
        if is_done:
            seen.add(node)
            yield node
            continue
        pending.append((node, True))
        pending.extend((argument, False) for argument in reversed(node.args))


def loads_of(root: Scalar) -> dict[str, torch.dtype]:
    """The buffers that an expression reads, with their dtypes, in order of first use."""
    return {node.payload[0]: node.payload[2] for node in walk(root) if node.op == "load"}  # type: ignore[index]


def map_buffers(root: Scalar, rename: Callable[[str], str]) -> Scalar:
    """The expression with every buffer that it loads renamed."""
    done: dict[Scalar, Scalar] = {}
    for node in walk(root):
        payload = node.payload
        if node.op == "load":
            payload = (rename(payload[0]), *payload[1:])  # type: ignore[index]
        done[node] = Scalar(node.op, tuple(done[argument] for argument in node.args), node.dtype, payload)
    return done[root]
