"""The generated kernels of a program: what each was made from, and all of them as one library."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from torch import fx

from .config import CodegenConfig
from .cpp.emit import emit_units
from .cpp.toolchain import start_building
from .grouping import Group
from .model_graph import source_line
from .overrides import check_overrides, read_overrides
from .regions import Source
from .specs import KernelSpec, spec_name


@dataclass(frozen=True)
class GeneratedKernel:
    """A kernel's spec, the ops that it was first made from, and lines that say where they came from."""

    spec: KernelSpec
    ops: tuple[str, ...]
    origin: tuple[str, ...]


Kernels = Mapping[str, GeneratedKernel]


def kernels_of(groups: Sequence[Group]) -> tuple[dict[str, GeneratedKernel], dict[int, str]]:
    """The distinct kernels of these groups by name, and the names by the identity of a group."""
    kernels: dict[str, GeneratedKernel] = {}
    names: dict[int, str] = {}
    for group in groups:
        name = names[id(group)] = spec_name(group.spec)
        if name not in kernels:
            kernels[name] = GeneratedKernel(group.spec, _ops_of(group), tuple(origin_of(group)))
    return kernels, names


def cpp_units(kernels: Kernels, config: CodegenConfig) -> list[str]:
    """The C++ texts of the kernels, those of ``kernel_overrides`` alone."""
    overrides = read_overrides(config.kernel_overrides)
    check_overrides(overrides, kernels, config.kernel_overrides)
    specs = {name: kernel.spec for name, kernel in kernels.items() if name not in overrides}
    origins = {name: kernel.origin for name, kernel in kernels.items()}
    return [*emit_units(specs, origins, os.cpu_count() or 1), *overrides.values()]


def start_library(kernels: Kernels, config: CodegenConfig) -> Future[Path]:
    """Start to build the library of these kernels, unless it is in the cache."""
    return start_building(cpp_units(kernels, config), config)


def origin_of(group: Group) -> Iterator[str]:
    """What a kernel was made from: ops, the passes that fused them, the first layer's nodes, and their lines."""
    passes = dict.fromkeys(name for node in group.nodes for name in node.meta.get("fused_by", ()))
    yield f"ops: {', '.join(_ops_of(group))}"
    if passes:
        yield f"fused by: {', '.join(passes)}"
    yield f"nodes: {', '.join(node.name for node in group.nodes)}"
    yield f"operands: {', '.join(f'b{i} = {_operand_name(each)}' for i, each in enumerate(group.operands))}"
    yield from dict.fromkeys(line for node in group.nodes if (line := source_line(node)))


def _ops_of(group: Group) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(node.target) for node in group.nodes))


def _operand_name(operand: Source) -> str:
    return operand.name if isinstance(operand, fx.Node) else f"packed {operand.parts[0].name}"
