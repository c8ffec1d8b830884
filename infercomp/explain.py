"""``infercomp.explain``: compile without keeping, and tell what each pass did and why not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from .backend import Runner, compile_dynamo
from .report import Report, merged_report


def explain(
    target: torch.nn.Module | Callable[..., Any],
    *example_inputs: Any,
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Report:
    """Compile ``target`` for these inputs and return the report; every pass is measured in float64.

    ``target`` is a module or function, called once with the inputs under ``torch.inference_mode``.
    Raises what compiling raises; the target itself is left uncompiled.
    """
    reports: list[Report] = []
    chosen = {"verify": True, **(options or {})}

    def collect(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Runner:
        return compile_dynamo(graph_module, inputs, chosen, reports.append)

    with torch.inference_mode():
        torch.compile(target, backend=collect)(*example_inputs, **kwargs)
    return merged_report(reports) if reports else Report(num_graphs=0)
