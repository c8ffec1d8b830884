"""Lowering: what the passes left becomes a ``Program``.

Each call takes the first implementation that accepts it: a generated kernel, else its definition (an op
of the vocabulary) or its ATen op, with the reason kept. Kernels run in native steps; a graph of calls
holds the steps and what runs between them. Weights that are merged or packed leave the graph: the
program carries them as work to be done once, when weights are bound.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ..runtime.errors import CompilerRefusedError
from ..runtime.program import MergedWeight, PackedWeightSource, Program, WeightSource
from .accounts import executions, groups_taken_apart, kernel_uses, require_kernels
from .assembly import AssembledSegment, assemble_segments, start_kernels
from .config import CodegenConfig
from .grouping import Plan, Planner, is_computed, is_weight_merge
from .model_graph import ModelGraph, value_of
from .ops import definition_of
from .packing import PanelPacking
from .regions import PackedWeight
from .segments import Segment, dependencies, exported_nodes, schedule
from .steps import Step, driver_function, make_steps, step_name
from .target import language_of

_NO_KERNELS = 'codegen="reference"'


def lower(model_graph: ModelGraph, config: CodegenConfig | None = None, *, strict: bool = False) -> Program:
    """The executable form of a graph; the graph itself is left as it is.

    Where kernels are asked for and the C++ compiler refuses them, definitions run and ``fallbacks`` says why;
    under ``strict`` that raises CompilerRefusedError, and a call without a kernel raises UnsupportedError.
    """
    config = config or CodegenConfig()
    plan = _plan(model_graph, config)
    if strict and config.codegen != "reference":
        require_kernels(plan)
    try:
        return _lowered(model_graph, plan, config)
    except CompilerRefusedError as error:
        if strict:
            raise
        reason = f"the C++ compiler refused the generated kernels ({error.where})"
        return replace(_lowered(model_graph, _without_kernels(model_graph, reason), config), fallbacks=(str(error),))


def _lowered(model_graph: ModelGraph, plan: Plan, config: CodegenConfig) -> Program:
    items = schedule(plan, dependencies(model_graph.graph, plan))
    exported = exported_nodes(model_graph.graph, plan)
    segments = [item for item in items if isinstance(item, Segment)]
    language = language_of(config, _device_of(model_graph)) or "cpp"
    assembled, kernels = assemble_segments(segments, exported, model_graph.weights)
    remaining = iter(assembled)
    parts = [next(remaining) if isinstance(item, Segment) else item for item in items]
    steps = make_steps([each.parts for each in assembled], kernels, config, language)
    program = _Driver(model_graph, plan, language).program(parts, steps)
    return replace(program, kernels=kernels, kernel_uses=kernel_uses(plan, config))


def start_building_kernels(model_graph: ModelGraph, config: CodegenConfig) -> Future[Path] | None:
    """Start to build the kernels that ``lower`` would want for this graph; None where it would want none."""
    plan = _plan(model_graph, config)
    items = schedule(plan, dependencies(model_graph.graph, plan))
    segments = [item for item in items if isinstance(item, Segment)]
    return start_kernels(segments, config) if segments else None


def kernel_language(model_graph: ModelGraph, config: CodegenConfig) -> str | None:
    """What the kernels of this graph are written in, "cpp" or "triton"; None where none are generated."""
    return language_of(config, _device_of(model_graph))


def _plan(model_graph: ModelGraph, config: CodegenConfig) -> Plan:
    device = _device_of(model_graph)
    language = language_of(config, device)
    if language is None:
        reason = _NO_KERNELS if config.codegen == "reference" else f"no kernel is generated for {device.type} yet"
        return _without_kernels(model_graph, reason)
    return Planner(model_graph, language).plan()


def _without_kernels(model_graph: ModelGraph, reason: str) -> Plan:
    return Plan(refused={node: reason for node in model_graph.graph.nodes if is_computed(node)})


def _device_of(model_graph: ModelGraph) -> torch.device:
    tensors = (value_of(node) for node in model_graph.graph.nodes if node.op == "placeholder")
    return next((value.device for value in tensors if isinstance(value, torch.Tensor)), torch.device("cpu"))


class _Driver:
    """The graph of calls that the program runs: native steps, and ATen ops and views where they are needed."""

    def __init__(self, model_graph: ModelGraph, plan: Plan, language: str) -> None:
        self._model_graph = model_graph
        self._language = language
        self._plan = plan
        self._graph = fx.Graph()
        self._values: dict[fx.Node, Any] = {}
        self._packed: dict[PackedWeight, fx.Node] = {}
        self._num_steps = 0

    def program(self, parts: list[AssembledSegment | fx.Node], steps: Sequence[Step]) -> Program:
        inputs_of_steps = [source for part in parts if isinstance(part, AssembledSegment) for source in part.inputs]
        packed = dict.fromkeys(source for source in inputs_of_steps if isinstance(source, PackedWeight))
        needed = self._needed(parts, [source for source in inputs_of_steps if isinstance(source, fx.Node)])
        merges = [node for node in needed if is_weight_merge(node)]
        merged = tuple(MergedWeight(node.name, _merge_sources(node), _dim(node)) for node in merges)
        merged_sources = {name for merge in merged for name in merge.source_names}
        used = {node.name for node in needed if node.op == "placeholder"}
        kept = [name for name in self._model_graph.weights if name in used and name not in merged_sources]
        kept += [
            name
            for name in self._model_graph.weights
            if name in used and name in merged_sources and self._is_used_alone(name)
        ]
        for name in kept:
            self._values[self._model_graph.placeholder(name)] = self._graph.placeholder(name)
        for node in merges:
            self._values[node] = self._graph.placeholder(node.name)
        sources = tuple(self._packed_source(weight, i) for i, weight in enumerate(packed))
        for name in self._model_graph.input_names:
            self._values[self._model_graph.placeholder(name)] = self._graph.placeholder(name)
        for part in parts:
            self._emit(part)
        output = self._model_graph.output_node()
        self._graph.output(fx.node.map_arg(output.args[0], self._value))
        return Program(
            driver_function(self._graph, steps),
            (*kept, *(merge.name for merge in merged), *(source.name for source in sources)),
            self._model_graph.input_names,
            merged,
            sources,
            self._model_graph.mutated_inputs,
            tuple(executions(self._model_graph, self._plan, self._language)),
            self._model_graph.output_orders,
            driver=self._graph,
            steps=tuple(steps),
            step_parts=tuple(part.parts for part in parts if isinstance(part, AssembledSegment)),
            language=self._language if steps else "reference",
            taken_apart=groups_taken_apart(self._plan),
        )

    def _needed(self, parts: list[AssembledSegment | fx.Node], read: list[fx.Node]) -> list[fx.Node]:
        """Nodes that the driver itself reads: what steps, calls and the output take, through views."""
        produced = {node for group in self._plan.groups for node in group.results}
        pending = [*read, *self._model_graph.output_node().all_input_nodes]
        pending += [source for part in parts if isinstance(part, fx.Node) for source in part.all_input_nodes]
        found: set[fx.Node] = set()
        while pending:
            node = pending.pop()
            if node in found:
                continue
            found.add(node)
            if node not in produced and not is_weight_merge(node):
                pending.extend(node.all_input_nodes)
        return [node for node in self._model_graph.graph.nodes if node in found]

    def _is_used_alone(self, name: str) -> bool:
        users = self._model_graph.placeholder(name).users
        return any(not is_weight_merge(user) for user in users)

    def _packed_source(self, weight: PackedWeight, number: int) -> PackedWeightSource:
        name = f"packed_{number}_{weight.parts[0].name}"
        self._packed[weight] = self._graph.placeholder(name)
        parts = tuple(_merge_sources(part) if is_weight_merge(part) else (_source(part),) for part in weight.parts)
        packing = PanelPacking(weight.panel_format, weight.half_distance, weight.is_transposed)
        return PackedWeightSource(name, parts, packing)

    def _emit(self, part: AssembledSegment | fx.Node) -> None:
        if isinstance(part, fx.Node):
            self._value(part)
            return
        arguments = tuple(self._packed[s] if isinstance(s, PackedWeight) else self._value(s) for s in part.inputs)
        call = self._graph.call_module(step_name(self._num_steps), arguments)
        self._num_steps += 1
        for i, node in enumerate(part.outputs):
            self._values[node] = self._graph.call_function(operator.getitem, (call, i))

    def _value(self, node: fx.Node) -> Any:
        """The node's value in the driver: views and calls outside of kernels are copied when first asked for."""
        found = self._values.get(node)
        if found is None:
            for source in node.all_input_nodes:
                self._value(source)
            found = self._graph.node_copy(node, self._values.__getitem__)
            found.meta = copy.copy(node.meta)
            op = definition_of(node.target)
            if op is not None:
                found.target = op.definition
            self._values[node] = found
        return found


def _merge_sources(merge: fx.Node) -> tuple[WeightSource, ...]:
    return tuple(_source(source) for source in merge.args[0])  # type: ignore[union-attr]


def _source(weight: fx.Node) -> WeightSource:
    return WeightSource(weight.name, tuple(int(extent) for extent in value_of(weight).shape))


def _dim(node: fx.Node) -> int:
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)  # type: ignore[return-value]
