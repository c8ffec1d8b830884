"""The driver graph of a program as plain nodes, and back.

Calls are named ``step 0`` for a step, ``aten.view.default`` or ``infercomp.rms_norm`` for an op, ``operator.getitem``
for a function of Python on sizes. Arguments that JSON does not know are mappings of one key: ``{"node": name}``,
``{"tuple": […]}``, ``{"dtype": "float32"}`` …
"""

from __future__ import annotations

import keyword
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from ...runtime.errors import UnsupportedError
from ..steps import step_name
from .dtypes import dtype_named

_ARITHMETIC = ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg")
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_")
_SYMBOLIC = ("sym_max", "sym_min", "sym_not", "sym_float", "sym_int")
_OPERATORS: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in ("getitem", *_ARITHMETIC, *_COMPARISONS)},
    **{f"torch.{name}": getattr(torch, name) for name in _SYMBOLIC},
}
_NAMED = {"memory_format": torch.memory_format, "layout": torch.layout}
# Ops that reach out of memory have no place in a graph of numbers.
_REFUSED = ("aten.from_file.default",)


@dataclass(frozen=True)
class DriverNode:
    """One node: ``op`` is "placeholder", "call" or "output"; ``target`` names what is called."""

    name: str
    op: str
    target: str = ""
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None


def driver_nodes(driver: fx.Graph) -> tuple[DriverNode, ...]:
    """The nodes of a driver in order; raises UnsupportedError for a call that has no name here."""
    return tuple(_written(node) for node in driver.nodes)


def driver_graph(nodes: Sequence[DriverNode], num_steps: int) -> fx.Graph:
    """The driver whose nodes these are; raises ValueError or LookupError where they are no driver of so many steps."""
    graph = fx.Graph()
    values: dict[str, fx.Node] = {}
    for node in nodes:
        if not node.name.isidentifier() or keyword.iskeyword(node.name) or node.name in values:
            raise ValueError(f"a node of the driver is called {node.name[:60]!r}")
        args = tuple(_read(argument, values) for argument in node.args)
        kwargs = {key: _read(value, values) for key, value in (node.kwargs or {}).items()}
        values[node.name] = _node(graph, node, args, kwargs, num_steps)
    if not nodes or nodes[-1].op != "output":
        raise ValueError("the driver has no output")
    return graph


def _node(graph: fx.Graph, node: DriverNode, args: tuple[Any, ...], kwargs: dict[str, Any], num_steps: int) -> fx.Node:
    if node.op in ("placeholder", "output"):
        return graph.create_node(node.op, node.name, args, kwargs, node.name)
    kind, _, number = node.target.partition(" ")
    if kind != "step":
        return graph.create_node("call_function", _function(node.target), args, kwargs, node.name)
    if not (number.isdigit() and int(number) < num_steps):
        raise ValueError(f"there is no {node.target[:60]!r}")
    return graph.create_node("call_module", step_name(int(number)), args, kwargs, node.name)


def _written(node: fx.Node) -> DriverNode:
    if node.op == "placeholder":
        return DriverNode(node.name, "placeholder")
    args = tuple(_plain(argument, node) for argument in node.args)
    kwargs = {key: _plain(value, node) for key, value in node.kwargs.items()} or None
    if node.op == "output":
        return DriverNode(node.name, "output", "", args)
    target = f"step {str(node.target).rpartition('_')[2]}" if node.op == "call_module" else _target(node)
    return DriverNode(node.name, "call", target, args, kwargs)


def _target(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    name = _names_of_functions().get(node.target)  # type: ignore[arg-type]
    if name is None:
        raise _unsupported(f"{getattr(node.target, '__name__', node.target)} of {node.name}")
    return name


@lru_cache(maxsize=1)
def _names_of_functions() -> dict[Callable[..., Any], str]:
    from ..ops import VOCABULARY

    names = {op.definition: f"infercomp.{op.name}" for op in VOCABULARY.values()}
    return names | {function: name for name, function in _OPERATORS.items()}


def _function(target: str) -> Callable[..., Any]:
    if target in _OPERATORS:
        return _OPERATORS[target]
    namespace, _, rest = target.partition(".")
    if namespace == "infercomp":
        from ..ops import VOCABULARY

        return VOCABULARY[rest].definition
    name, _, overload = rest.partition(".")
    found = getattr(getattr(torch.ops.aten, name, None), overload, None) if namespace == "aten" else None
    if not isinstance(found, torch._ops.OpOverload) or target in _REFUSED:
        raise LookupError(f"the driver calls {target[:60]!r}, which is no op")
    return found


def _plain(value: Any, node: fx.Node) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return {"list" if isinstance(value, list) else "tuple": [_plain(each, node) for each in value]}
    if isinstance(value, slice):
        return {"slice": [_plain(each, node) for each in (value.start, value.stop, value.step)]}
    if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    raise _unsupported(f"an argument of type {type(value).__name__} of {node.name}")


def _read(value: Any, values: Mapping[str, fx.Node]) -> Any:
    if not isinstance(value, Mapping):
        return value
    ((kind, held),) = value.items()
    if kind == "node":
        return values[held]
    if kind in ("list", "tuple", "slice"):
        parts = [_read(each, values) for each in held]
        return parts if kind == "list" else tuple(parts) if kind == "tuple" else slice(*parts)
    if kind == "dtype":
        return dtype_named(held)
    if kind == "device":
        return torch.device(held)
    found = getattr(torch, held, None)
    if kind not in _NAMED or not isinstance(found, _NAMED[kind]):
        raise ValueError(f"{held!r} is no {kind}")
    return found


def _unsupported(what: str) -> UnsupportedError:
    return UnsupportedError(f"a saved program cannot hold {what}", remedy="serve the model without saving it")
