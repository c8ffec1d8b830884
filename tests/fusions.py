"""What tests of fusion passes share: run passes on a captured module and say which calls share a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from graph_testing import captured, run_passes

from infercomp.codegen.model_graph import ModelGraph
from infercomp.passes.record import PassRecord

RECOGNISERS = ("normalize", "recognize_linear", "recognize_norm", "fuse_rope", "recognize_gated_mlp", "merge_linears")


def fused(
    module: Callable[..., Any], *inputs: torch.Tensor, passes: tuple[str, ...], disable: tuple[str, ...] = ()
) -> tuple[ModelGraph, PassRecord]:
    """The graph after recognition and ``passes``, and the record of the last pass."""
    model_graph = captured(module, *inputs)
    records = run_passes(model_graph, *RECOGNISERS, *passes, inputs=list(inputs), disable=disable)
    return model_graph, records[-1]


def kernels(model_graph: ModelGraph) -> list[list[str]]:
    """The op names of every kernel of more than one call, in the order of the graph."""
    groups: dict[str, list[str]] = {}
    for node in model_graph.graph.nodes:
        if "kernel" in node.meta:
            groups.setdefault(node.meta["kernel"], []).append(node.target._schema.name.split("::")[1])
    return [names for names in groups.values() if len(names) > 1]
