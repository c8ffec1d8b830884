"""Calls of a graph as Python text that runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx


def target_text(node: fx.Node) -> str:
    """The name that a call's target is found by."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return f"torch.ops.{target}"
    module, name = getattr(target, "__module__", ""), getattr(target, "__name__", str(target))
    return f"operator.{name}" if module == "_operator" else f"{module}.{name}"


def argument_text(value: Any, name_of: Callable[[fx.Node], str] = lambda node: node.name) -> str:
    """An argument of a call; ``name_of`` writes the nodes in it."""
    if isinstance(value, fx.Node):
        return name_of(value)
    if isinstance(value, (list, tuple)):
        inner = ", ".join(argument_text(element, name_of) for element in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, slice):
        return f"slice({', '.join(argument_text(part, name_of) for part in (value.start, value.stop, value.step))})"
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return f"float({str(value)!r})"
    return repr(value)
