"""Lowering: what the passes left becomes a ``Program``.

Each call takes the first implementation that accepts it. Until kernels are generated there are two:
an op of the vocabulary runs by its definition, called directly, and everything else as its ATen op.
Weight merges leave the graph: the program carries them as work to be done once, when weights are bound.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

from torch import fx

from ..runtime.program import MergedWeight, OpExecution, Program
from .model_graph import ModelGraph
from .ops import definition_of, merge_weights

_NO_KERNEL = "no kernel is generated for it yet"


def lower(model_graph: ModelGraph) -> Program:
    """The executable form of a graph; the graph itself is left as it is."""
    ops = _executions(model_graph)
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    weight_names = list(model_graph.weights)
    merges = [node for node in model_graph.graph.nodes if node.target == merge_weights.overload]
    merged = [MergedWeight(node.name, tuple(source.name for source in node.args[0]), _dim(node)) for node in merges]
    merged_sources = {name for merge in merged for name in merge.sources}
    kept = [name for name in weight_names if name not in merged_sources or _is_used_alone(model_graph, name)]
    for name in (*kept, *(merge.name for merge in merged), *model_graph.input_names):
        values[_node_named(model_graph, name)] = graph.placeholder(name)
    for node in model_graph.graph.nodes:
        if node in values or node.op == "placeholder":
            continue
        if node.op == "output":
            graph.output(fx.node.map_arg(node.args[0], values.__getitem__))
            continue
        copied = graph.node_copy(node, values.__getitem__)
        copied.meta = copy.copy(node.meta)
        op = definition_of(node.target)
        if op is not None:
            copied.target = op.definition
        values[node] = copied
    function = fx.GraphModule({}, graph, "Program")
    names = (*kept, *(merge.name for merge in merged))
    return Program(
        function.forward,
        names,
        model_graph.input_names,
        tuple(merged),
        model_graph.mutated_inputs,
        ops,
        model_graph.output_orders,
    )


def _dim(node: fx.Node) -> int:
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)  # type: ignore[return-value]


def _is_used_alone(model_graph: ModelGraph, name: str) -> bool:
    return any(user.target != merge_weights.overload for user in model_graph.placeholder(name).users)


def _node_named(model_graph: ModelGraph, name: str) -> fx.Node:
    return next(node for node in model_graph.graph.nodes if node.name == name)


def _executions(model_graph: ModelGraph) -> tuple[OpExecution, ...]:
    calls = [node for node in model_graph.graph.nodes if node.op == "call_function"]
    counts = Counter((_op_name(node), definition_of(node.target) is not None) for node in calls)
    return tuple(
        OpExecution(name, "definition" if ours else "aten", count, _NO_KERNEL if ours else None)
        for (name, ours), count in sorted(counts.items())
    )


def _op_name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name.replace("::", ".") if schema else getattr(node.target, "__name__", str(node.target))
