"""From segments to native steps: kernels emitted and built, operands numbered, sizes found."""

from __future__ import annotations

import os
from collections.abc import Container, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import sympy
import torch
from torch import fx

from ..runtime.native_step import KernelCall, NativeStep, OutputSpec, SizeSource
from ..runtime.triton_step import TritonStep
from .config import CodegenConfig
from .cpp.emit import emit_units
from .cpp.toolchain import SUPPORT, build_library, start_building
from .grouping import Group, is_weight_merge
from .indexing import size_expr
from .lazy_tensor import Refused
from .model_graph import source_line, value_of
from .overrides import check_overrides, read_overrides
from .regions import PackedWeight, Source
from .segments import Segment, plan_arena
from .specs import KernelSpec, spec_name, symbols_of
from .triton.steps import TritonKernels


@dataclass(frozen=True)
class GeneratedKernel:
    """A kernel's spec, and the ops that it was first made from."""

    spec: KernelSpec
    ops: tuple[str, ...]


@dataclass(frozen=True)
class BuiltSegment:
    """A step, the graph nodes or packed weights it takes, and the nodes it returns."""

    step: NativeStep | TritonStep
    inputs: tuple[Source, ...]
    outputs: tuple[fx.Node, ...]


@dataclass(frozen=True)
class StepParts:
    """What a step is made of, whatever its kernels are written in."""

    calls: tuple[KernelCall, ...]
    sizes: tuple[SizeSource, ...]
    slot_bytes: tuple[str, ...]
    outputs: tuple[OutputSpec, ...]
    num_inputs: int
    weight_inputs: tuple[int, ...]


def build_segments(
    segments: Sequence[Segment],
    exported: set[fx.Node],
    weights: Container[str],
    config: CodegenConfig,
    language: str = "cpp",
) -> tuple[list[BuiltSegment], dict[str, GeneratedKernel]]:
    """All segments of a program, over one library of C++ kernels or with Triton's, and the kernels by name."""
    leaving = exported | _read_by_other_segments(segments)
    named = _named(segments)
    assemblies = [_Assembly(segment, leaving, named.names, weights) for segment in segments]
    if language == "triton":
        triton_kernels = TritonKernels(named.groups, named.names, named.origins)
        return [assembly.built_for_triton(triton_kernels) for assembly in assemblies], named.kernels
    executor = start_executor(config)
    library = build_library(named.units(config), config)
    return [assembly.built(library, executor.result()) for assembly in assemblies], named.kernels


def start_executor(config: CodegenConfig) -> Future[Path]:
    """Start to build what runs the kernels of every program."""
    return start_building([(SUPPORT / "executor.cpp").read_text()], config)


def start_kernels(segments: Sequence[Segment], config: CodegenConfig) -> Future[Path]:
    """Start to build the library that ``build_segments`` would wait for."""
    return start_building(_named(segments).units(config), config)


@dataclass(frozen=True)
class _Named:
    """The groups of a program, their kernels' names by the identity of a group, and what each name stands for."""

    groups: list[Group]
    names: dict[int, str]
    kernels: dict[str, GeneratedKernel]
    origins: dict[str, list[str]]

    def units(self, config: CodegenConfig) -> list[str]:
        """The C++ texts, those of ``kernel_overrides`` alone."""
        overrides = read_overrides(config.kernel_overrides)
        specs = {name: kernel.spec for name, kernel in self.kernels.items()}
        check_overrides(overrides, specs, config.kernel_overrides)
        generated = {name: spec for name, spec in specs.items() if name not in overrides}
        return [*emit_units(generated, self.origins, os.cpu_count() or 1), *overrides.values()]


def _named(segments: Sequence[Segment]) -> _Named:
    named = _Named([group for segment in segments for group in segment.groups], {}, {}, {})
    for group in named.groups:
        name = named.names[id(group)] = spec_name(group.spec)
        named.kernels.setdefault(name, GeneratedKernel(group.spec, _ops_of(group)))
        named.origins.setdefault(name, origin_of(group))
    return named


def _ops_of(group: Group) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(node.target) for node in group.nodes))


def origin_of(group: Group) -> list[str]:
    """What a kernel was made from: ops, the passes that fused them, the first layer's nodes, and their lines."""
    passes = dict.fromkeys(name for node in group.nodes for name in node.meta.get("fused_by", ()))
    lines = dict.fromkeys(line for node in group.nodes if (line := source_line(node)))
    return [
        f"ops: {', '.join(_ops_of(group))}",
        *([f"fused by: {', '.join(passes)}"] if passes else []),
        f"nodes: {', '.join(node.name for node in group.nodes)}",
        f"operands: {', '.join(f'b{i} = {_operand_name(each)}' for i, each in enumerate(group.operands))}",
        *lines,
    ]


def _operand_name(operand: Source) -> str:
    return operand.name if isinstance(operand, fx.Node) else f"packed {operand.parts[0].name}"


def _read_by_other_segments(segments: Sequence[Segment]) -> set[fx.Node]:
    owner = {node: i for i, segment in enumerate(segments) for group in segment.groups for node in group.results}
    return {
        source
        for i, segment in enumerate(segments)
        for group in segment.groups
        for source in group.sources
        if isinstance(source, fx.Node) and owner.get(source, i) != i
    }


class _Assembly:
    """Numbers the operands and sizes of one segment."""

    def __init__(
        self, segment: Segment, leaving: set[fx.Node], names: Mapping[int, str], weights: Container[str]
    ) -> None:
        self._segment = segment
        self._weights = weights
        self._names = names
        produced = {node for group in segment.groups for node in group.results}
        self._outputs = tuple(node for group in segment.groups for node in group.results if node in leaving)
        self._slot_of, self._slots = plan_arena(segment, leaving)
        sources = dict.fromkeys(source for group in segment.groups for source in group.sources)
        self._inputs: list[Source] = [source for source in sources if source not in produced]
        self._symbols: dict[sympy.Symbol, int] = {}
        self._sizes: list[SizeSource] = []

    def built(self, library: object, executor: object) -> BuiltSegment:
        parts = self._parts()
        step = NativeStep(
            library,  # type: ignore[arg-type]
            executor,  # type: ignore[arg-type]
            parts.calls,
            parts.sizes,
            parts.slot_bytes,
            parts.outputs,
            parts.num_inputs,
            parts.weight_inputs,
        )
        return BuiltSegment(step, tuple(self._inputs), self._outputs)

    def built_for_triton(self, kernels: TritonKernels) -> BuiltSegment:
        step = kernels.step(self._parts(), self._segment.groups)
        return BuiltSegment(step, tuple(self._inputs), self._outputs)

    def _parts(self) -> StepParts:
        phases = [(group, self._segment.phases[id(group)]) for group in self._segment.groups]
        self._find_sizes()
        calls = tuple(
            KernelCall(
                self._names[id(group)],
                phase,
                tuple(self._place(operand) for operand in group.operands),
                tuple(self._symbols[group.symbols[int(s.name[1:])]] for s in symbols_of(group.spec)),
            )
            for group, phase in phases
        )
        outputs = tuple(
            OutputSpec(tuple(self._text(size_expr(e)) for e in value_of(node).shape), value_of(node).dtype)
            for node in self._outputs
        )
        slots = tuple(self._text(slot.num_bytes) for slot in self._slots)
        weights = tuple(i for i, source in enumerate(self._inputs) if self._is_weight(source))
        return StepParts(calls, tuple(self._sizes), slots, outputs, len(self._inputs), weights)

    def _is_weight(self, source: Source) -> bool:
        return isinstance(source, PackedWeight) or is_weight_merge(source) or source.name in self._weights

    def _place(self, operand: Source) -> int:
        if isinstance(operand, fx.Node) and operand in self._slot_of:
            return len(self._inputs) + self._slot_of[operand]
        if operand in self._outputs:
            return len(self._inputs) + len(self._slots) + self._outputs.index(operand)  # type: ignore[arg-type]
        return self._inputs.index(operand)

    def _find_sizes(self) -> None:
        wanted: dict[sympy.Symbol, None] = {}
        for group in self._segment.groups:
            for symbol in group.symbols:
                wanted.setdefault(symbol)
            for node in group.results:
                for extent in value_of(node).shape:
                    for symbol in sorted(size_expr(extent).free_symbols, key=str):
                        wanted.setdefault(symbol)
        for symbol in wanted:
            self._symbols[symbol] = len(self._sizes)
            self._sizes.append(self._size_source(symbol))

    def _size_source(self, symbol: sympy.Symbol) -> SizeSource:
        for position, source in enumerate(self._inputs):
            if isinstance(source, fx.Node) and isinstance(value_of(source), torch.Tensor):
                for dim, extent in enumerate(value_of(source).shape):
                    if size_expr(extent) == symbol:
                        return SizeSource(position, dim)
        node = self._graph_input_with(symbol)
        self._inputs.append(node)
        return self._size_source_of(node, symbol)

    def _size_source_of(self, node: fx.Node, symbol: sympy.Symbol) -> SizeSource:
        value = value_of(node)
        if not isinstance(value, torch.Tensor):
            return SizeSource(self._inputs.index(node), None)
        dims = [dim for dim, extent in enumerate(value.shape) if size_expr(extent) == symbol]
        return SizeSource(self._inputs.index(node), dims[0])

    def _graph_input_with(self, symbol: sympy.Symbol) -> fx.Node:
        graph = self._segment.groups[0].nodes[0].graph
        for node in (node for node in graph.nodes if node.op == "placeholder"):
            value = value_of(node)
            if isinstance(value, torch.SymInt) and size_expr(value) == symbol:
                return node
            if isinstance(value, torch.Tensor) and any(size_expr(extent) == symbol for extent in value.shape):
                return node
        raise Refused(f"no input has the size {symbol}")

    def _text(self, expression: sympy.Expr) -> str:
        names = {symbol: sympy.Symbol(f"s{i}") for symbol, i in self._symbols.items()}
        return str(expression.subs(names))
