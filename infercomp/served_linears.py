"""The linears of a rewritten graph and the weights that each of them is computed from, quantised or not."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from .codegen.model_graph import ModelGraph, value_of
from .codegen.ops import quantize_per_tensor
from .passes.compress_weights import SPARSE_VALUES
from .passes.graph_pass import is_float_tensor
from .passes.quantizable_linears import sources_of
from .served_model import ServedLinear

_SCHEMA_NAMES = ("weight", "weight_values", "weight_indices", "weight_scale", "weight_zero")


def linears_of(model_graph: ModelGraph) -> tuple[ServedLinear, ...]:
    """The linears in the graph's order; those merged into one product are told apart. A computed weight has none."""
    heads = {_head_of(output) for output in model_graph.output_node().args[0]}
    calls = [node for node in model_graph.graph.nodes if _is_linear(node)]
    return tuple(each for node in calls for each in _of_call(model_graph, node, node in heads))


def _is_linear(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "infercomp":
        return False
    return target._schema.name.endswith("linear")


def _head_of(output: Any) -> fx.Node | None:
    """The last linear before an output."""
    node = output
    while isinstance(node, fx.Node) and not _is_linear(node):
        sources = [each for each in node.all_input_nodes if is_float_tensor(value_of(each))]
        node = next((each for each in sources if each.op == "call_function"), None)
    return node


def _of_call(model_graph: ModelGraph, node: fx.Node, is_head: bool) -> Iterator[ServedLinear]:
    given = {each.name: value for each, value in zip(node.target._schema.arguments, node.args, strict=False)}  # type: ignore[union-attr]
    weights = {name: given[name] for name in _SCHEMA_NAMES if given.get(name) is not None}
    by_layer = zip(*(sources_of(each) for each in weights.values()), strict=True)  # type: ignore[arg-type]
    rows = value_of(node.args[0])
    num_channels, activation_bits = int(rows.shape[-1]), 8 if rows.dtype == torch.int8 else 16
    for sources in by_layer:
        if not all(map(model_graph.is_weight, sources)):
            continue
        values = model_graph.weights[sources[0].name]
        is_dense = values.is_floating_point() and "weight_values" not in given
        num_weights = values.numel() if is_dense else len(values) * num_channels
        # Outliers that were split off have left zeros behind, in the part that the others are in.
        num_weights *= not sources[0].name.endswith("_outliers")
        source = model_graph.weight_sources.get(sources[0].name, sources[0].name)
        name = source.removeprefix("model.").removesuffix("_packed").removesuffix(".weight").removesuffix(SPARSE_VALUES)
        weight_bits = given.get("bits", 8 * values.dtype.itemsize)
        tensors = tuple(each.name for each in sources)
        step = _input_step(model_graph, node.args[0])
        yield ServedLinear(name, num_weights, tensors, is_head, weight_bits, activation_bits, step)


def _input_step(model_graph: ModelGraph, rows: Any) -> float | None:
    """Of the grid that all tokens of these integers are on."""
    call = rows.args[0] if rows.target is operator.getitem else rows
    if call.target != quantize_per_tensor.overload:
        return None
    return float(model_graph.weights[call.args[1].name])
