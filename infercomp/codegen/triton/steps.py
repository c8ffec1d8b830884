"""From segments to Triton steps: kernels emitted once each, launches over the operands that assembly numbered."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from ...runtime.errors import BuildError
from ...runtime.triton_step import KernelLaunch, TritonStep
from ..specs import KernelSpec, symbols_of
from ..target import is_interpreted
from .emit_specs import emit_spec
from .kernel_text import Emitted
from .module import LoadedKernel, load_kernel

if TYPE_CHECKING:
    from ..kernel_set import Kernels
    from ..steps import StepParts

_SIZE = re.compile(r"\bn(\d+)\b")


class LazyKernel:
    """A kernel that is loaded when it is first launched: a step has kernels for sizes that may never come."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def _loaded(self) -> LoadedKernel:
        return load_kernel(self.text)

    def launch(self, grid: tuple[int, int, int], *arguments: object) -> None:
        self._loaded.launch(grid, *arguments)


class TritonKernels:
    """The emitted specs of a program, by name."""

    def __init__(self, kernels: Kernels) -> None:
        self.emitted: dict[str, Emitted] = {}
        self._kernels: dict[str, LazyKernel] = {}
        self._specs = {name: kernel.spec for name, kernel in kernels.items()}
        if is_interpreted():
            _require_no_bfloat16(self._specs.values())
        for name, kernel in kernels.items():
            emitted = self.emitted[name] = emit_spec(kernel.spec, name)
            header = "".join(f"# {line}\n" for line in kernel.origin)
            self._kernels |= {launch.name: LazyKernel(header + launch.text) for launch in emitted.launches}

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(kernel.text for kernel in self._kernels.values())

    def step(self, parts: StepParts) -> TritonStep:
        """The step of one segment."""
        launches: list[KernelLaunch] = []
        workspaces: dict[int, list[str]] = {}
        for call in parts.calls:
            emitted, spec = self.emitted[call.kernel], self._specs[call.kernel]
            sizes = dict(zip((symbol.name for symbol in symbols_of(spec)), call.symbols, strict=True))
            for i, text in enumerate(emitted.workspaces):
                workspaces.setdefault(i, []).append(f"4 * ({_renamed(text, sizes)})")
            launches += [
                KernelLaunch(
                    self._kernels[launch.name],
                    call.operands,
                    tuple(buffer.dtype for buffer in spec.buffers),
                    len(emitted.workspaces),
                    call.symbols,
                    tuple(_renamed(extent, sizes) for extent in launch.grid),  # type: ignore[arg-type]
                    _renamed(launch.condition, sizes),
                )
                for launch in emitted.launches
            ]
        # Launches follow each other on one stream, so all share their workspaces.
        workspace_bytes = tuple(f"max({', '.join(dict.fromkeys(texts))}, 0)" for texts in workspaces.values())
        return TritonStep(
            tuple(launches), parts.sizes, parts.slot_bytes, workspace_bytes, parts.outputs, parts.num_inputs
        )


def _require_no_bfloat16(specs: Iterable[KernelSpec]) -> None:
    """The interpreter truncates to bfloat16 and multiplies its bits as integers."""
    if any(buffer.dtype == torch.bfloat16 for spec in specs for buffer in spec.buffers):
        raise BuildError(
            "Triton's interpreter does not compute bfloat16", field="dtype", remedy="interpret a float32 model"
        )


def _renamed(text: str, sizes: dict[str, int]) -> str:
    return _SIZE.sub(lambda found: f"s{sizes[found[0]]}", text)
