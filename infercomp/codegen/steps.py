"""Steps made of their parts: kernels found or built, and the driver that calls the steps.

A program that was saved is made again by these functions alone, so nothing here is imported before it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import fx

from ..runtime.native_step import KernelCall, NativeStep, OutputSpec, SizeSource
from ..runtime.triton_step import TritonStep
from .config import CodegenConfig
from .cpp.toolchain import SUPPORT, start_building

if TYPE_CHECKING:
    from .kernel_set import Kernels

Step = NativeStep | TritonStep


@dataclass(frozen=True)
class StepParts:
    """What a step is made of, whatever its kernels are written in."""

    calls: tuple[KernelCall, ...]
    sizes: tuple[SizeSource, ...]
    slot_bytes: tuple[str, ...]
    outputs: tuple[OutputSpec, ...]
    num_inputs: int
    weight_inputs: tuple[int, ...]


def make_steps(
    parts: Sequence[StepParts],
    kernels: Kernels,
    config: CodegenConfig,
    language: str,
    library: Future[Path] | None = None,
) -> list[Step]:
    """Steps that can be called: over ``library`` or the one that is built of the kernels, or with Triton's."""
    if not parts:
        return []
    if language == "triton":
        from .triton.steps import TritonKernels

        triton_kernels = TritonKernels(kernels)
        return [triton_kernels.step(each) for each in parts]
    executor = start_executor(config)
    if library is None:
        from .kernel_set import start_library

        library = start_library(kernels, config)
    built = library.result()
    return [_native_step(each, built, executor.result()) for each in parts]


def _native_step(parts: StepParts, library: Path, executor: Path) -> NativeStep:
    return NativeStep(
        library,
        executor,
        parts.calls,
        parts.sizes,
        parts.slot_bytes,
        parts.outputs,
        parts.num_inputs,
        parts.weight_inputs,
    )


def start_executor(config: CodegenConfig) -> Future[Path]:
    """Start to build what runs the kernels of every program."""
    return start_building([(SUPPORT / "executor.cpp").read_text()], config)


def step_name(number: int) -> str:
    """What the driver calls a step."""
    return f"native_step_{number}"


def driver_function(driver: fx.Graph, steps: Sequence[Step]) -> Callable[..., Sequence[Any]]:
    """The driver as a function of weights and inputs."""
    named: dict[str, Any] = {step_name(number): step for number, step in enumerate(steps)}
    function: Callable[..., Sequence[Any]] = fx.GraphModule(named, driver, "Program").forward
    return function
