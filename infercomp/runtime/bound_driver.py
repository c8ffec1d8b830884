"""A program's driver with what never changes bound once, so that a step passes on only what it was given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from .native_step import NativeStep


def bound_driver(
    driver: fx.Graph, steps: Sequence[Any], constants: Mapping[str, torch.Tensor]
) -> Callable[..., Sequence[Any]]:
    """``driver`` as a function of the inputs that are not in ``constants`` (tensors by name of input).

    ``steps`` are what the driver calls, in the order of its calls.
    """
    graph = fx.Graph()
    attributes: dict[str, Any] = {}
    values: dict[fx.Node, fx.Node] = {}
    remaining = iter(steps)

    def value_of(node: fx.Node) -> fx.Node:
        if node not in values:
            attributes[node.name] = constants[node.name]
            values[node] = graph.get_attr(node.name)
        return values[node]

    for node in driver.nodes:
        if node.op == "placeholder" and node.name in constants:
            continue
        step = next(remaining) if node.op == "call_module" else None
        if isinstance(step, NativeStep):
            fixed = {i: constants[x.name] for i, x in enumerate(node.args) if _name_of(x) in constants}
            attributes[node.name] = step.bound(fixed)
            rest = tuple(x for i, x in enumerate(node.args) if i not in fixed)
            values[node] = graph.call_module(node.name, fx.node.map_arg(rest, value_of))
        elif step is not None:
            attributes[node.name] = step
            values[node] = graph.call_module(node.name, fx.node.map_arg(node.args, value_of))
        else:
            values[node] = graph.node_copy(node, value_of)
    function: Callable[..., Sequence[Any]] = fx.GraphModule(attributes, graph, "BoundDriver").forward
    return function


def _name_of(value: object) -> str | None:
    return value.name if isinstance(value, fx.Node) and value.op == "placeholder" else None
