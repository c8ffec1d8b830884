"""What tests of passes share: capture a small model, run some passes on it, run the graph, print it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.testing import FileCheck

from infercomp.capture import _from_exported, _functional
from infercomp.codegen.model_graph import ModelGraph
from infercomp.passes.config import PassConfig
from infercomp.passes.graph_pass import Pass
from infercomp.passes.pipeline import PIPELINE, run_pipeline
from infercomp.passes.record import PassRecord
from infercomp.passes.verify import relative_error

__all__ = [
    "FLOAT64_BOUND",
    "FileCheck",
    "assert_graph_agrees",
    "assert_rounds_like_eager",
    "captured",
    "copied",
    "count",
    "named_inputs",
    "outputs",
    "run_passes",
    "text",
]

FLOAT64_BOUND = 1e-9


class _Function(nn.Module):
    """A plain function as a module; its parameters' names become the names of the graph's inputs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = function


def captured(
    function: Callable[..., Any], *inputs: torch.Tensor, dynamic: Mapping[int, int] | None = None, largest: int = 4096
) -> ModelGraph:
    """The graph of a function or module of tensors, as ``capture_export`` makes it.

    ``dynamic`` maps the position of an input to its symbolic dimension; all of them share one symbol
    from 2 to ``largest``. Parameters and buffers of a module become weights.
    """
    module = function if isinstance(function, nn.Module) else _Function(function)
    length = torch.export.Dim("length", min=2, max=largest)
    shapes = tuple({(dynamic or {})[i]: length} if i in (dynamic or {}) else None for i in range(len(inputs)))
    with torch.no_grad():
        program = _functional(torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False))
    return _from_exported(program)


def copied(model_graph: ModelGraph) -> ModelGraph:
    """A graph and weights to rewrite: copying takes a fraction of the time of capturing again."""
    graph, copies = fx.Graph(), {}
    for node in model_graph.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    return dataclasses.replace(
        model_graph,
        graph_module=fx.GraphModule(model_graph.graph_module, graph),
        weights=copy.deepcopy(model_graph.weights),
        weight_sources=dict(model_graph.weight_sources),
        stored_integers=dict(model_graph.stored_integers),
        stored_steps=dict(model_graph.stored_steps),
        known_values=dict(model_graph.known_values),
    )


def named_inputs(model_graph: ModelGraph, inputs: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(model_graph.input_names, inputs, strict=True))


def run_passes(
    model_graph: ModelGraph,
    *passes: str | Pass,
    inputs: Sequence[Any] | None = None,
    disable: tuple[str, ...] = (),
    limit: int | None = None,
) -> tuple[PassRecord, ...]:
    """Run these passes only (by name, or as they are), in this order; verified if ``inputs`` are given."""
    by_name = {each.name: each for each in PIPELINE}
    chosen = [by_name[each] if isinstance(each, str) else each for each in passes]
    names = {each.name for each in chosen}
    pipeline = tuple(
        dataclasses.replace(each, after=tuple(name for name in each.after if name in names)) for each in chosen
    )
    records = run_pipeline(
        model_graph,
        PassConfig(disable=disable, limit=limit, verify=inputs is not None),
        serving=any(each.serving for each in pipeline),
        example_inputs=None if inputs is None else named_inputs(model_graph, inputs),
        pipeline=pipeline,
    )
    for record in records:
        if inputs is not None and record.matches:
            assert record.max_error is not None, f"{record.name} was not measured"
    return records


def outputs(model_graph: ModelGraph, inputs: Sequence[Any]) -> list[Any]:
    """Run the graph for real: weights first, then ``inputs`` in the order of ``input_names``."""
    named = {**model_graph.weights, **named_inputs(model_graph, inputs)}
    placeholders = [node.name for node in model_graph.graph.nodes if node.op == "placeholder"]
    model_graph.graph.lint()
    with torch.no_grad():
        return list(torch.fx.Interpreter(model_graph.graph_module).run(*(named[name] for name in placeholders)))


def text(model_graph: ModelGraph) -> str:
    """The graph's calls, one a line, for ``torch.testing.FileCheck``."""
    return "\n".join(node.format_node() or node.name for node in model_graph.graph.nodes)


def count(model_graph: ModelGraph, target: Any) -> int:
    """How many calls of an overload, or of an op of the vocabulary, the graph has."""
    return len(model_graph.calls(getattr(target, "overload", target)))


def assert_graph_agrees(
    model_graph: ModelGraph, function: Callable[..., Any], inputs: Sequence[torch.Tensor], bound: float = FLOAT64_BOUND
) -> None:
    """The graph, captured from ``function`` in float64, still computes what the function does."""
    with torch.no_grad():
        expected = function(*inputs)
    expected = [expected] if isinstance(expected, torch.Tensor) else list(expected)
    found = outputs(model_graph, inputs)[len(model_graph.mutated_inputs) :]
    assert len(expected) == len(found)
    for one, other in zip(expected, found, strict=True):
        assert other.dtype == one.dtype
        assert relative_error(one, other) <= bound


def assert_rounds_like_eager(
    function: Callable[..., Any], inputs: Sequence[torch.Tensor], dtype: torch.dtype, *passes: str | Pass
) -> None:
    """In ``dtype``, the rewritten graph errs at most twice as much against float64 as eager does.

    ``function`` may be a module; ``inputs`` are float64. One unit in the last place is always allowed.
    """
    exact = _run(function, inputs, torch.float64)
    low = [_cast(each, dtype) for each in inputs]
    eager = _run(function, inputs, dtype)
    if isinstance(function, nn.Module):
        function.to(dtype)
    model_graph = captured(function, *low)
    run_passes(model_graph, *passes, inputs=low)
    for reference, expected, found in zip(exact, eager, outputs(model_graph, low), strict=True):
        assert found.dtype == expected.dtype
        allowed = max(2 * relative_error(reference, expected.double()), torch.finfo(dtype).eps)
        assert relative_error(reference, found.double()) <= allowed
    if isinstance(function, nn.Module):
        function.to(torch.float64)


def _cast(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _run(function: Callable[..., Any], inputs: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    if isinstance(function, nn.Module):
        function.to(dtype)
    with torch.no_grad():
        result = function(*(_cast(each, dtype) for each in inputs))
    return [result] if isinstance(result, torch.Tensor) else list(result)
