"""From segments to the parts of steps: operands numbered, sizes found, kernels named."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import sympy
import torch
from torch import fx

from ..runtime.native_step import KernelCall, OutputSpec, SizeSource
from .config import CodegenConfig
from .grouping import is_weight_merge
from .indexing import size_expr
from .kernel_set import GeneratedKernel, kernels_of, start_library
from .lazy_tensor import Refused
from .model_graph import value_of
from .regions import PackedWeight, Source
from .segments import Segment, plan_arena
from .specs import symbols_of
from .steps import StepParts


@dataclass(frozen=True)
class AssembledSegment:
    """A step's parts, the graph nodes or packed weights it takes, and the nodes it returns."""

    parts: StepParts
    inputs: tuple[Source, ...]
    outputs: tuple[fx.Node, ...]


def assemble_segments(
    segments: Sequence[Segment], exported: set[fx.Node], weights: Container[str]
) -> tuple[list[AssembledSegment], dict[str, GeneratedKernel]]:
    """The parts of a step for each segment, and the kernels that they call by name."""
    leaving = exported | _read_by_other_segments(segments)
    kernels, names = kernels_of([group for segment in segments for group in segment.groups])
    return [_Assembly(segment, leaving, names, weights).assembled() for segment in segments], kernels


def start_kernels(segments: Sequence[Segment], config: CodegenConfig) -> Future[Path]:
    """Start to build the library that steps over these segments would wait for."""
    kernels, _ = kernels_of([group for segment in segments for group in segment.groups])
    return start_library(kernels, config)


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

    def assembled(self) -> AssembledSegment:
        parts = self._parts()
        return AssembledSegment(parts, tuple(self._inputs), self._outputs)

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
