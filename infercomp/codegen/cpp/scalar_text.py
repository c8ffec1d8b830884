"""Scalar and index expressions as C++ text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import sympy
import torch

from ..indexing import Element, FloorDiv, LoopVariable
from ..scalar import Scalar

BUFFER_TYPES: Mapping[torch.dtype, str] = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bfloat16: "bf16",
    torch.int64: "int64_t",
    torch.int32: "int32_t",
    torch.int8: "int8_t",
    torch.uint8: "uint8_t",
    torch.bool: "bool",
}

_OPERATORS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "eq": "==", "ne": "!=", "lt": "<", "le": "<=",
              "gt": ">", "ge": ">=", "and": "&&", "or": "||"}  # fmt: skip
_OWN_CALLS = {"abs": "std::abs", "bits": "bits_of", "from_bits": "from_bits", "isfinite": "is_finite"}
_PREFIXES = {"neg": "-", "not": "!"}
_CALLS = {"floor": "std::floor", "ceil": "std::ceil", "trunc": "std::trunc", "round_even": "std::nearbyint",
          "sqrt": "std::sqrt", "maximum": "larger", "minimum": "smaller", "pow": "std::pow"}  # fmt: skip


def index_text(expression: sympy.Expr, elements: Mapping[sympy.Expr, str] | None = None) -> str:
    """An integer expression; sizes and loop variables are C++ variables of their own names.

    ``elements`` names variables that hold indices already read from memory.
    """
    expression = sympy.sympify(expression)

    def text(part: sympy.Expr) -> str:
        return index_text(part, elements)

    if expression.is_Integer or expression.is_Symbol:
        return str(expression)
    if isinstance(expression, FloorDiv):
        numerator, divisor = expression.args
        return f"({text(numerator)} / ({text(divisor)}))"
    if isinstance(expression, Element):
        if elements and expression in elements:
            return elements[expression]
        buffer, index, _, extent = expression.args
        return f"checked({buffer}[{text(index)}], {text(extent)}, errors)"
    if isinstance(expression, sympy.Add):
        return "(" + " + ".join(text(term) for term in expression.args).replace("+ -", "- ") + ")"
    if isinstance(expression, sympy.Mul):
        return " * ".join(text(factor) for factor in expression.args)
    if isinstance(expression, sympy.Pow) and expression.exp.is_Integer and expression.exp > 0:
        return " * ".join([text(expression.base)] * int(expression.exp))
    raise ValueError(f"no text for the index {expression} of type {type(expression).__name__}")


def elements_in(expression: sympy.Expr) -> Iterable[Element]:
    return (part for part in sympy.preorder_traversal(expression) if isinstance(part, Element))


def constant_text(value: Scalar) -> str:
    text, kind = str(value.payload), BUFFER_TYPES[value.dtype]
    if text in ("True", "False"):
        return text.lower()
    if not value.dtype.is_floating_point:
        return f"{kind}({text})"
    if "inf" in text or "nan" in text:
        name = "infinity" if "inf" in text else "quiet_NaN"
        return f"{'-' if text.startswith('-') else ''}std::numeric_limits<{kind}>::{name}()"
    return f"{float(text)!r}{'f' if value.dtype == torch.float32 else ''}"


@dataclass
class Body:
    """Statements in the order of evaluation; equal expressions are computed once.

    ``known`` maps expressions to the names of C++ variables that hold them.
    """

    indent: str
    known: dict[Scalar, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    prefix: str = "t"
    accumulator: dict[int, str] = field(default_factory=dict)
    conditions: dict[Scalar, bool] = field(default_factory=dict)
    elements: Mapping[sympy.Expr, str] = field(default_factory=dict)

    def index(self, expression: sympy.Expr) -> str:
        return index_text(expression, self.elements)

    def inner(self) -> Body:
        """A body one level deeper that knows all that this one knows; what it learns ends with it."""
        deeper = self.indent + "    "
        return Body(deeper, dict(self.known), [], self.prefix, self.accumulator, self.conditions, self.elements)

    def value(self, node: Scalar) -> str:
        """The name (or literal) of an expression, after emitting what it needs."""
        found = self.known.get(node)
        if found is not None:
            return found
        if node.op == "constant":
            return constant_text(node)
        if node.op == "where" and node.args[0] in self.conditions:
            return self.value(node.args[1 if self.conditions[node.args[0]] else 2])
        text = self._where(node) if node.op == "where" else self._text(node)
        name = f"{self.prefix}{len(self.known)}"
        self.known[node] = name
        self.lines.append(f"{self.indent}const {BUFFER_TYPES[node.dtype]} {name} = {text};")
        return name

    def _where(self, node: Scalar) -> str:
        condition, if_true, if_false = node.args
        if condition.op != "index_less":
            return f"{self.value(condition)} ? {self.value(if_true)} : {self.value(if_false)}"
        # What is on the other side of an index condition may lie outside of its buffer.
        branches = []
        for branch in (if_true, if_false):
            inner = self.inner()
            value = inner.value(branch)
            branches.append("\n".join(["[&] {", *inner.lines, f"{inner.indent}return {value};", f"{self.indent}}}()"]))
        return f"{self.value(condition)} ? {branches[0]} : {branches[1]}"

    def _text(self, node: Scalar) -> str:
        if node.op == "load":
            buffer, index, dtype = node.payload  # type: ignore[misc]
            return load_text(f"{buffer}[{self.index(index)}]", dtype)
        if node.op == "index":
            return self.index(node.payload)  # type: ignore[arg-type]
        if node.op == "index_less":
            left, right = node.payload  # type: ignore[misc]
            return f"{self.index(left)} < {self.index(right)}"
        if node.op == "accumulator":
            return self.accumulator[int(node.payload)]  # type: ignore[call-overload]
        if node.op in ("sum", "max", "min"):
            return self._reduction(node)
        operands = [self.value(argument) for argument in node.args]
        return operation_text(node, operands)

    def _reduction(self, node: Scalar) -> str:
        """A loop of its own, inside an expression."""
        lines = reduction_lines(node, "total", self.indent + "    ", self)
        return "\n".join(["[&] {", *lines, f"{self.indent}    return total;", f"{self.indent}}}()"])


def load_text(element: str, dtype: torch.dtype) -> str:
    if dtype == torch.bfloat16:
        return f"to_float({element})"
    return f"int32_t({element})" if dtype in (torch.int8, torch.uint8, torch.int16) else element


def store_text(target: str, value: str, dtype: torch.dtype) -> str:
    if dtype == torch.bfloat16:
        return f"{target} = from_float<bf16>({value});"
    return f"{target} = {BUFFER_TYPES[dtype]}({value});"


def operation_text(node: Scalar, operands: list[str]) -> str:
    """One arithmetic op over the texts of its operands."""
    kind = BUFFER_TYPES[node.dtype]
    if node.op in _OPERATORS:
        return f"{operands[0]} {_OPERATORS[node.op]} {operands[1]}"
    if node.op in _PREFIXES:
        return f"{_PREFIXES[node.op]}{operands[0]}"
    if node.op in ("cast", "wrap"):
        if node.payload == torch.bool:
            return f"{operands[0]} != 0"
        return f"{kind}({BUFFER_TYPES[node.payload]}({operands[0]}))"  # type: ignore[index]
    if node.op == "round":
        return f"to_float(from_float<{BUFFER_TYPES[node.payload]}>({operands[0]}))"  # type: ignore[index]
    if node.op == "reciprocal":
        return f"{kind}(1) / {operands[0]}"
    if node.op in _OWN_CALLS:
        return f"{_OWN_CALLS[node.op]}({operands[0]})"
    return f"{_CALLS.get(node.op, f'math::{node.op}')}({', '.join(operands)})"


def reduction_lines(node: Scalar, name: str, indent: str, outer: Body) -> list[str]:
    """Statements that leave the reduction in a variable ``name``. The order of additions follows the extent alone."""
    variable, extent = node.payload  # type: ignore[misc]
    kind, limits = BUFFER_TYPES[node.dtype], f"std::numeric_limits<{BUFFER_TYPES[node.dtype]}>"
    is_float = node.dtype.is_floating_point
    if node.op == "sum":
        start, update, clause = f"{kind}(0)", f"{name} += {{value}};", "+"
    elif is_float:
        # NaN must win, which no reduction clause says: this loop stays scalar.
        sign, better = ("-", "larger") if node.op == "max" else ("", "smaller")
        start, update, clause = f"{sign}{limits}::infinity()", f"{name} = {better}({name}, {{value}});", None
    else:
        bound, comparison = ("lowest", ">") if node.op == "max" else ("max", "<")
        start, update, clause = (
            f"{limits}::{bound}()",
            f"{name} = {{value}} {comparison} {name} ? {{value}} : {name};",
            node.op,
        )
    pragma = [f"{indent}#pragma omp simd reduction({clause} : {name})"] if clause else []
    lines = [f"{indent}{kind} {name} = {start};"]
    for (first, last), conditions in column_segments(node.args, variable, extent):
        inner = outer.inner()
        inner.indent = indent + "    "
        inner.conditions = {**outer.conditions, **conditions}
        value = inner.value(node.args[0])
        lines += [
            *pragma,
            f"{indent}for (int64_t {variable} = {index_text(first)}; {variable} < {index_text(last)}; ++{variable}) {{",
            *inner.lines,
            inner.indent + update.format(value=value),
            f"{indent}}}",
        ]
    return lines


def column_segments(
    roots: Iterable[Scalar], column: LoopVariable, extent: sympy.Expr
) -> Iterator[tuple[tuple[sympy.Expr, sympy.Expr], dict[Scalar, bool]]]:
    """Parts of a loop over columns, and what each condition on the column is there."""
    breaks = column_breaks(roots, column)
    points = [sympy.Integer(0), *(point for point, _ in breaks), extent]
    for segment, bounds in enumerate(pairwise(points)):
        yield bounds, {each: segment <= place for place, (_, found) in enumerate(breaks) for each in found}


def column_breaks(roots: Iterable[Scalar], column: LoopVariable) -> list[tuple[sympy.Expr, list[Scalar]]]:
    """Where the column loop must be split so that conditions on the column are known on each side."""
    breaks: dict[sympy.Expr, list[Scalar]] = {}
    seen: set[Scalar] = set()
    pending = list(roots)
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        pending.extend(node.args)
        if node.op == "index_less":
            left, right = node.payload  # type: ignore[misc]
            point = sympy.expand(right - left + column)
            if left.coeff(column, 1) == 1 and point.is_Integer:
                breaks.setdefault(point, []).append(node)
    return sorted(breaks.items(), key=lambda item: int(item[0]))
