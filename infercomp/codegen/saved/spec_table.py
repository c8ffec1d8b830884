"""A kernel's spec as a table of plain entries, and back.

Specs are trees of dataclasses, scalars and index expressions in which equal parts are shared, so each distinct part
is one entry and is referred to by its place, counted from 0; the last entry is the spec:

    [["integer", 4], ["symbol", "n0", ["integer", "positive"]], ["sympy", "Mul", 0, 1], …]

Expressions are rebuilt by the functions named here, never parsed or evaluated as text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import sympy
import torch

from ...runtime.errors import ModelLoadError
from ..indexing import Element, FloorDiv, LoopVariable
from ..scalar import Scalar
from ..specs import AttentionSpec, Buffer, KernelSpec, LoopSpec, MatmulSpec, PagedAttentionSpec, Store, spec_name
from ..weight_panels import PanelFormat
from .dtypes import dtype_named

Table = list[list[Any]]

_CLASSES: dict[str, Callable[..., Any]] = {
    each.__name__: each
    for each in (AttentionSpec, Buffer, LoopSpec, MatmulSpec, PagedAttentionSpec, PanelFormat, Scalar, Store)
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    each.__name__: each
    for each in (sympy.Add, sympy.Mul, sympy.Pow, sympy.Max, sympy.Min, sympy.Mod, sympy.floor, FloorDiv, Element)
}
_ASSUMPTIONS = ("integer", "positive", "nonnegative")
_PLAIN = (str, bool, int, float, type(None))


def spec_table(spec: KernelSpec) -> Table:
    """The entries that ``spec`` is made of, parts before what holds them."""
    writer = _Writer()
    writer.place(spec)
    return writer.table


def spec_of(table: Table, name: str) -> KernelSpec:
    """The spec whose entries these are; raises ModelLoadError where they are no table or no spec called ``name``."""
    try:
        values: list[Any] = []
        for entry in table:
            values.append(_value(entry, values))
        spec: KernelSpec = values[-1]
        found = spec_name(spec)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(f"the spec of kernel {name} cannot be read: {error}") from error
    if found != name:
        raise _damaged(f"the spec of kernel {name} says something else: it is that of {found}")
    return spec


def _damaged(what: str) -> ModelLoadError:
    return ModelLoadError(what, remedy="copy the saved model again, or save it anew", field="kernels")


class _Writer:
    def __init__(self) -> None:
        self.table: Table = []
        self._places: dict[Any, int] = {}

    def place(self, value: Any) -> int:
        # True, 1 and 1.0 are equal keys, and so are expressions of two kinds of symbols with one name.
        key = (type(value), repr(value) if isinstance(value, float) else value)
        if key not in self._places:
            entry = self._entry(value)
            self._places[key] = len(self.table)
            self.table.append(entry)
        return self._places[key]

    def _entry(self, value: Any) -> list[Any]:
        if isinstance(value, _PLAIN):
            return ["plain", value]
        if isinstance(value, torch.dtype):
            return ["dtype", str(value).removeprefix("torch.")]
        if isinstance(value, tuple):
            return ["tuple", *map(self.place, value)]
        if is_dataclass(value) and type(value).__name__ in _CLASSES:
            return ["data", type(value).__name__, *(self.place(getattr(value, each.name)) for each in fields(value))]
        if isinstance(value, sympy.Basic):
            return self._expression(value)
        raise TypeError(f"a spec holds no {type(value).__name__}")

    def _expression(self, value: sympy.Basic) -> list[Any]:
        if isinstance(value, LoopVariable):
            return ["loop", value.name, self.place(value.extent)]
        if isinstance(value, sympy.Symbol):
            return ["symbol", value.name, _assumptions(value)]
        if isinstance(value, sympy.Integer):
            return ["integer", int(value)]
        if isinstance(value, sympy.Rational):
            return ["rational", int(value.p), int(value.q)]
        if value.func.__name__ in _FUNCTIONS:
            return ["sympy", value.func.__name__, *map(self.place, value.args)]
        raise TypeError(f"an index expression holds no {value.func.__name__}")


def _assumptions(symbol: sympy.Symbol) -> list[str]:
    """Those that sizes are declared with; what follows from them follows again."""
    return [name for name in _ASSUMPTIONS if symbol.assumptions0.get(name)]


def _value(entry: list[Any], earlier: Sequence[Any]) -> Any:
    """The entry's value; what follows its kind and its name, if it has one, are places of earlier entries."""
    kind, *rest = entry
    if kind in _LEAVES:
        return _LEAVES[kind](*rest)
    build, num_names = _BRANCHES[kind]
    places = rest[num_names:]
    if not all(type(place) is int and 0 <= place < len(earlier) for place in places):
        raise ValueError(f"an entry refers to {places}, and {len(earlier)} come before it")
    return build(*rest[:num_names], [earlier[place] for place in places])


def _symbol(name: str, assumptions: list[str]) -> sympy.Symbol:
    return sympy.Symbol(name, **{each: True for each in _ASSUMPTIONS if each in assumptions})


_LEAVES: dict[str, Callable[..., Any]] = {
    "plain": lambda value: value,
    "dtype": dtype_named,
    "symbol": _symbol,
    "integer": sympy.Integer,
    "rational": sympy.Rational,
}
# What builds the value of its parts, and how many names come before those.
_BRANCHES: dict[str, tuple[Callable[..., Any], int]] = {
    "tuple": (tuple, 0),
    "data": (lambda name, parts: _CLASSES[name](*parts), 1),
    "loop": (lambda name, parts: LoopVariable(name, *parts), 1),
    "sympy": (lambda name, parts: _FUNCTIONS[name](*parts), 1),
}
