"""Scalar and index expressions as Triton text.

A value is a tile: rows along axis 0, columns along axis 1, or anything that broadcasts to that. Loads are
masked by what is known of the indices that they use, and by the index conditions around them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import count

import sympy
import torch

from ..indexing import Element, FloorDiv, LoopVariable
from ..lazy_tensor import Refused
from ..scalar import Scalar
from .specs.base import power_of_two_at_least
from .tanh_text import tanh_statements

TYPES: Mapping[torch.dtype, str] = {
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
    torch.float16: "tl.float16",
    torch.bfloat16: "tl.bfloat16",
    torch.int64: "tl.int64",
    torch.int32: "tl.int32",
    torch.int16: "tl.int16",
    torch.int8: "tl.int8",
    torch.uint8: "tl.uint8",
    torch.bool: "tl.int1",
}
POINTERS: Mapping[torch.dtype, str] = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
# The widest row that is held in registers at once; wider ones, and those of unknown width, go in steps.
LARGEST_TILE = 8192
STEP_COLUMNS = 1024
_INT32_COEFFICIENT = 2**16
# Adding and subtracting 1.5 * 2**23 rounds a float32 below 2**22 to the nearest integer, half to even.
_ROUNDING_SHIFT = 12582912.0

_OPERATORS = {"add": "+", "sub": "-", "mul": "*", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">",
              "ge": ">=", "and": "&", "or": "|"}  # fmt: skip
_FUNCTIONS = frozenset(("exp", "log", "rsqrt", "sin", "cos", "erf", "floor", "ceil", "abs"))


@dataclass(frozen=True)
class Guard:
    """``text`` is true where the ``variables`` have values that may be used."""

    variables: frozenset[LoopVariable]
    text: str


@lru_cache(maxsize=65536)
def variables_of(node: Scalar) -> frozenset[LoopVariable]:
    """The loop variables that a value depends on; those of its own reductions are not among them."""
    found: frozenset[LoopVariable] = frozenset().union(*map(variables_of, node.args)) if node.args else frozenset()
    if node.op == "load":
        return found | loop_variables(node.payload[1])  # type: ignore[index]
    if node.op == "index":
        return found | loop_variables(node.payload)  # type: ignore[arg-type]
    if node.op == "index_less":
        left, right = node.payload  # type: ignore[misc]
        return found | loop_variables(left) | loop_variables(right)
    if node.op in ("sum", "max", "min"):
        return found - {node.payload[0]}  # type: ignore[index]
    return found


def loop_variables(expression: sympy.Expr) -> frozenset[LoopVariable]:
    return frozenset(symbol for symbol in expression.free_symbols if isinstance(symbol, LoopVariable))


def substituted(node: Scalar, old: sympy.Symbol, new: sympy.Symbol) -> Scalar:
    """The value with one loop variable in the place of another; a reduction's own variable is another of that name."""
    if node.op in ("sum", "max", "min") and node.payload[0] == old:  # type: ignore[index]
        return node
    args = tuple(substituted(argument, old, new) for argument in node.args)
    payload = node.payload
    if node.op == "load":
        payload = (payload[0], payload[1].xreplace({old: new}), payload[2])  # type: ignore[index]
    elif node.op == "index":
        payload = payload.xreplace({old: new})  # type: ignore[attr-defined]
    elif node.op == "index_less":
        payload = tuple(part.xreplace({old: new}) for part in payload)  # type: ignore[attr-defined]
    return Scalar(node.op, args, node.dtype, payload)


def tile_of(extent: sympy.Expr) -> int | None:
    """The tile that holds an extent whole, or None where it is too wide or not known."""
    if not extent.is_Integer or int(extent) > LARGEST_TILE:
        return None
    return power_of_two_at_least(int(extent))


@dataclass
class Scope:
    """Statements in the order of evaluation; equal expressions are computed once.

    ``positions`` are the texts of loop variables, ``known`` the names of values, ``elements`` those of
    indices read from memory with the names of their checks. ``num_rows`` is the extent of axis 0.
    """

    indent: str
    num_rows: int
    positions: dict[sympy.Symbol, str]
    guards: tuple[Guard, ...]
    lines: list[str] = field(default_factory=list)
    known: dict[Scalar, str] = field(default_factory=dict)
    elements: dict[Element, tuple[str, str]] = field(default_factory=dict)
    accumulators: dict[int, str] = field(default_factory=dict)
    names: Iterator[int] = field(default_factory=count)
    is_cube: bool = False

    def add(self, line: str) -> None:
        self.lines.append(self.indent + line)

    def named(self, text: str, prefix: str = "t") -> str:
        name = f"{prefix}{next(self.names)}"
        self.add(f"{name} = {text}")
        return name

    def inner(self, *guards: Guard, indent: str | None = None) -> Scope:
        """A scope that knows all that this one knows; what it learns ends with it."""
        return replace(
            self,
            indent=self.indent if indent is None else indent,
            positions=dict(self.positions),
            guards=(*self.guards, *guards),
            known=dict(self.known),
            elements=dict(self.elements),
        )

    def hold(self, variable: LoopVariable) -> None:
        """Let a variable of known extent run along axis 1, all at once."""
        if variable in self.positions:
            return
        tile = tile_of(variable.extent)
        assert tile is not None, variable
        self.positions[variable] = self.named(f"tl.arange(0, {tile})[None, :]", "c")
        if tile != variable.extent:
            self.guard(variable)

    def guard(self, variable: LoopVariable) -> None:
        """Keep a variable below its extent."""
        is_inside = self.named(f"{self.positions[variable]} < {self.index(variable.extent)}", "is_inside")
        self.guards = (*self.guards, Guard(frozenset((variable,)), is_inside))

    def index(self, expression: sympy.Expr) -> str:
        """An integer expression of sizes and loop variables."""
        expression = sympy.sympify(expression)
        if expression.is_Integer:
            return str(expression)
        if expression.is_Symbol:
            return self.positions.get(expression, str(expression))
        if isinstance(expression, FloorDiv):
            numerator, divisor = map(self.index, expression.args)
            return f"({numerator} // {divisor})"
        if isinstance(expression, Element):
            return self.element(expression)[0]
        if isinstance(expression, sympy.Add):
            return "(" + " + ".join(map(self.index, expression.args)) + ")"
        if isinstance(expression, sympy.Mul):
            return "(" + " * ".join(self._factors(expression)) + ")"
        if isinstance(expression, sympy.Pow) and expression.exp.is_Integer and expression.exp > 0:
            return "(" + " * ".join([self.index(expression.base)] * int(expression.exp)) + ")"
        raise Refused(f"no text for the index {expression}")

    def _factors(self, expression: sympy.Mul) -> list[str]:
        factors = [self.index(factor) for factor in expression.args]
        coefficient, _ = expression.as_coeff_Mul()
        is_wide = coefficient.is_Integer and abs(int(coefficient)) >= _INT32_COEFFICIENT
        if is_wide and any(isinstance(factor, LoopVariable) for factor in expression.args):
            factors = [
                f"{text}.to(tl.int64)" if isinstance(factor, LoopVariable) else text
                for factor, text in zip(expression.args, factors, strict=True)
            ]
        return factors

    def element(self, element: Element) -> tuple[str, str]:
        """An index read from memory, 0 where it is out of range, and whether it is in range."""
        found = self.elements.get(element)
        if found is None:
            buffer, index, _, extent = element.args
            mask = self.mask(loop_variables(index))
            text = f"{buffer} + {self.index(index)}"
            given = self.named(f"tl.load({text}{_masked(mask, '0')}).to(tl.int64)", "index")
            is_good = self.named(f"({given} >= 0) & ({given} < {self.index(extent)})", "is_good")
            bad = f"~{is_good} & {mask}" if mask else f"~{is_good}"
            self.add(f"tl.store(errors + {given} * 0, 1, mask={bad})")
            found = (self.named(f"tl.where({is_good}, {given}, 0)", "index"), is_good)
            self.elements[element] = found
        return found

    def mask(self, variables: frozenset[LoopVariable]) -> str:
        """Where indices in these variables may be used; empty where always."""
        texts = [guard.text for guard in self.guards if guard.variables <= variables]
        return " & ".join(texts)

    def address(self, buffer: str, index: sympy.Expr) -> tuple[str, str]:
        """An element's address and its mask; guards over more variables widen the address."""
        variables = loop_variables(index)
        text = f"{buffer} + {self.index(index)}"
        missing = {v for guard in self.guards if guard.variables & variables for v in guard.variables} - variables
        for variable in sorted(missing, key=str):
            text += f" + {self.positions[variable]} * 0"
        return text, self.mask(variables | frozenset(missing))

    def value(self, node: Scalar) -> str:
        """The name of an expression, after emitting what it needs."""
        found = self.known.get(node)
        if found is None:
            found = self.known[node] = self._constant(node) if node.op == "constant" else self.named(self._text(node))
        return found

    def _constant(self, node: Scalar) -> str:
        text = str(node.payload)
        if "inf" in text or "nan" in text:
            text = f'float("{text}")'
        return f"tl.full((), {text}, {TYPES[node.dtype]})"

    def _text(self, node: Scalar) -> str:
        if node.op == "load":
            return self._load(*node.payload)  # type: ignore[misc]
        if node.op == "index":
            number = self.index(node.payload)  # type: ignore[arg-type]
            return f"tl.full((), {number}, tl.int64)" if number.isdigit() else f"({number}).to(tl.int64)"
        if node.op == "index_less":
            left, right = node.payload  # type: ignore[misc]
            return f"{self.index(left)} < {self.index(right)}"
        if node.op == "accumulator":
            return self.accumulators[int(node.payload)]  # type: ignore[call-overload]
        if node.op in ("sum", "max", "min"):
            return self._reduction(node)
        if node.op == "where":
            return self._where(node)
        return self._operation(node, [self.value(argument) for argument in node.args])

    def _load(self, buffer: str, index: sympy.Expr, dtype: torch.dtype) -> str:
        text, mask = self.address(buffer, index)
        loaded = f"tl.load({text}{_masked(mask, '0')})"
        if dtype == torch.bool:
            return f"{loaded} != 0"
        if dtype in (torch.bfloat16, torch.float16):
            return f"{loaded}.to(tl.float32)"
        return f"{loaded}.to(tl.int32)" if dtype in (torch.int16, torch.int8, torch.uint8) else loaded

    def _where(self, node: Scalar) -> str:
        condition, if_true, if_false = node.args
        told = self.value(condition)
        if condition.op != "index_less":
            return f"tl.where({told}, {self.value(if_true)}, {self.value(if_false)})"
        # What is on the other side of an index condition may lie outside of its buffer.
        variables = variables_of(condition)
        inside, outside = self.inner(Guard(variables, told)), self.inner(Guard(variables, f"(~{told})"))
        return f"tl.where({told}, {inside.value(if_true)}, {outside.value(if_false)})"

    def _reduction(self, node: Scalar) -> str:
        variable, extent = node.payload  # type: ignore[misc]
        body = node.args[0]
        if self.is_cube:
            raise Refused("a reduction inside of a reduction over columns")
        columns = {v for v in variables_of(node) if v.name == "c"}
        if columns:
            return self._cube_reduction(node)
        if tile_of(extent) is None:
            return self._stepped_reduction(node)
        held = LoopVariable("c", extent)
        body = substituted(body, variable, held)
        self.hold(held)
        scope = self.inner()
        return _reduced(node, scope.filled(body, node, held), axis=1)

    def filled(self, body: Scalar, node: Scalar, variable: LoopVariable) -> str:
        """The reduced value, neutral where the variable is beyond its extent, over the whole tile."""
        value = self.value(body)
        mask = self.mask(frozenset((variable,)))
        neutral = f"tl.full((), {_neutral(node)}, {TYPES[node.dtype]})"
        if mask:
            return self.named(f"tl.where({mask}, {value}, {neutral})")
        if variable in variables_of(body):
            return value
        return self.named(f"{value} + tl.zeros_like({self.positions[variable]}).to({TYPES[node.dtype]})")

    def _cube_reduction(self, node: Scalar) -> str:
        """A reduction for every column: the variable runs along a third axis."""
        variable, extent = node.payload  # type: ignore[misc]
        tile = tile_of(extent)
        if tile is None:
            raise Refused(f"a sum over {extent} values for every column")
        scope = replace(
            self,
            positions={symbol: f"{text}[:, :, None]" for symbol, text in self.positions.items()},
            guards=tuple(Guard(guard.variables, f"{guard.text}[:, :, None]") for guard in self.guards),
            known={},
            elements={},
            is_cube=True,
        )
        scope.positions[variable] = self.named(f"tl.arange(0, {tile})[None, None, :]", "k")
        if tile != extent:
            scope.guard(variable)
        return _reduced(node, scope.filled(node.args[0], node, variable), axis=2)

    def _stepped_reduction(self, node: Scalar) -> str:
        """One partial result per column of a step, then the reduction of those: the order follows the extent alone."""
        variable, extent = node.payload  # type: ignore[misc]
        kind = TYPES[node.dtype]
        total = self.named(f"tl.full(({self.num_rows}, {STEP_COLUMNS}), {_neutral(node)}, {kind})", "total")
        scope = self.stepped(variable, extent)
        value = scope.filled(node.args[0], node, variable)
        combined = {
            "sum": f"{total} + {value}",
            "max": f"tl.maximum({total}, {value}, propagate_nan=tl.PropagateNan.ALL)",
            "min": f"tl.minimum({total}, {value}, propagate_nan=tl.PropagateNan.ALL)",
        }
        scope.add(f"{total} = {combined[node.op]}")
        return _reduced(node, total, axis=1)

    def stepped(self, variable: LoopVariable, extent: sympy.Expr) -> Scope:
        """The scope of a loop over a variable in steps of columns."""
        first = f"first{next(self.names)}"
        self.add(f"for {first} in range(0, {self.index(extent)}, {STEP_COLUMNS}):")
        scope = self.inner(indent=self.indent + "    ")
        scope.positions[variable] = scope.named(f"{first} + tl.arange(0, {STEP_COLUMNS})[None, :]", "c")
        scope.guard(variable)
        return scope

    def _operation(self, node: Scalar, operands: list[str]) -> str:
        op, first = node.op, operands[0]
        kind = node.args[0].dtype
        if op in _OPERATORS:
            return f"{first} {_OPERATORS[op]} {operands[1]}"
        if op == "div":
            return f"{first} / {operands[1]}" if kind == torch.float64 else f"tl.div_rn({first}, {operands[1]})"
        if op in ("maximum", "minimum"):
            return f"tl.{op}({first}, {operands[1]}, propagate_nan=tl.PropagateNan.ALL)"
        if op in ("cast", "wrap", "round"):
            return _converted(first, node)
        if op in _FUNCTIONS:
            return f"tl.{op}({first})"
        if op == "tanh":
            name = f"tanh{next(self.names)}"
            for statement in tanh_statements(name, first):
                self.add(statement)
            return name
        if op == "round_even":
            nearest = f"({first} + {_ROUNDING_SHIFT}) - {_ROUNDING_SHIFT}"
            return f"tl.where(tl.abs({first}) < 4194304.0, {nearest}, {first})"
        texts = {
            "neg": f"-{first}",
            "not": f"{first} == 0",
            "sqrt": f"tl.sqrt({first})" if kind == torch.float64 else f"tl.sqrt_rn({first})",
            "reciprocal": f"1.0 / {first}" if kind == torch.float64 else f"tl.div_rn(1.0, {first})",
            "sigmoid": f"1.0 / (1.0 + tl.exp(-{first}))",
            "trunc": f"tl.where({first} < 0, tl.ceil({first}), tl.floor({first}))",
            "isfinite": f'tl.abs({first}) < float("inf")',
            "bits": f"{first}.to(tl.int32, bitcast=True)",
            "from_bits": f"{first}.to(tl.float32, bitcast=True)",
        }
        if op not in texts:
            raise Refused(f"no Triton text for {op}")
        return texts[op]


def _converted(operand: str, node: Scalar) -> str:
    if node.payload == torch.bool:
        return f"{operand} != 0"
    kind, target = TYPES[node.dtype], TYPES[node.payload]  # type: ignore[index]
    return f"{operand}.to({target})" if kind == target else f"{operand}.to({target}).to({kind})"


def _masked(mask: str, other: str) -> str:
    return f", mask={mask}, other={other}" if mask else ""


def _neutral(node: Scalar) -> str:
    if node.op == "sum":
        return "0"
    sign = "-" if node.op == "max" else ""
    if node.dtype.is_floating_point:
        return f'float("{sign}inf")'
    limits = torch.iinfo(node.dtype)
    return str(limits.min if node.op == "max" else limits.max)


def _reduced(node: Scalar, value: str, axis: int) -> str:
    text = f"tl.{node.op}({value}, axis={axis}{', keep_dims=True' if axis == 1 else ''})"
    if node.op == "sum" or not node.dtype.is_floating_point:
        return text
    # A chip's maximum drops NaN; the definition's does not.
    num_nan = f"tl.sum(({value} != {value}).to(tl.int32), axis={axis}{', keep_dims=True' if axis == 1 else ''})"
    return f'tl.where({num_nan} > 0, float("nan"), {text})'
