"""Ahead-of-time compilation of emitted text for a chip that need not be here.

Triton compiles for a named target without a device; registers and spills, which Triton reads from a loaded
kernel, are read from the binary instead (``resources.py``).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from .chip import chip_of
from .errors import KernelCompileError
from .module import LoadedKernel, load_kernel
from .resources import Resources, resources_of

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")


@dataclass(frozen=True)
class CompiledKernel:
    """A cubin or hsaco, and what a launch and an autotuner need to know of it."""

    name: str
    target: str
    binary: bytes = field(repr=False)
    assembly: str = field(repr=False)  # PTX or AMDGCN
    num_warps: int
    shared_bytes: int
    global_scratch_bytes: int  # per program, for TMA descriptors
    resources: Resources


def compile_text(text: str, target: str) -> CompiledKernel:
    """Compile an emitted module's kernel for one of ``TARGETS``, for arguments aligned as it says."""
    chip = gpu_target(target)
    if os.environ.get("TRITON_INTERPRET") == "1":
        remedy = "unset it before Triton is imported"
        raise KernelCompileError("TRITON_INTERPRET turns compilation off", target=target, remedy=remedy)
    kernel = load_kernel(text)
    compiled = _run_triton(kernel, chip, target)
    _check_shared_memory(compiled.metadata.name, compiled.metadata.shared, target)
    binary = compiled.asm["cubin" if chip.backend == "cuda" else "hsaco"]
    assembly = compiled.asm["ptx" if chip.backend == "cuda" else "amdgcn"]
    return CompiledKernel(
        name=compiled.metadata.name,
        target=target,
        binary=binary,
        assembly=assembly,
        num_warps=kernel.num_warps,
        shared_bytes=compiled.metadata.shared,
        # Triton 3.6 does not say it for AMD, where no kernel needs any.
        global_scratch_bytes=getattr(compiled.metadata, "global_scratch_size", 0),
        resources=resources_of(target, binary, assembly),
    )


def gpu_target(target: str) -> Any:
    """Triton's own name of a target; raises KernelCompileError for one that it does not know."""
    try:
        from triton.backends.compiler import GPUTarget
    except ImportError:
        raise KernelCompileError("Triton is not installed", target=target, remedy="pip install triton") from None

    backend, _, architecture = target.partition(":")
    if backend == "cuda" and architecture.isdecimal():
        return GPUTarget("cuda", int(architecture), 32)
    if backend == "hip" and architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, 64 if architecture.startswith("gfx9") else 32)
    raise KernelCompileError(f"no target {target!r}", target=target, remedy=f"name one as {', '.join(TARGETS)} are")


def _run_triton(kernel: LoadedKernel, chip: Any, target: str) -> Any:
    import triton
    from triton.compiler import ASTSource

    parts = [argument.partition(":") for argument in kernel.arguments.values()]
    types = dict(zip(kernel.arguments, (each[0] for each in parts), strict=True))
    attributes = {(index,): [["tt.divisibility", int(each[2])]] for index, each in enumerate(parts) if each[2]}
    source = ASTSource(kernel.function, signature=types, attrs=attributes)
    try:
        return triton.compile(source, target=chip, options=kernel.launch_options())
    except Exception as error:  # Triton raises whatever its passes, LLVM and the assembler raise.
        what = f"{kernel.function.__name__} does not compile for {target}: {_last_line(error)}"
        raise KernelCompileError(what, target=target, remedy="try smaller tiles or fewer stages") from error


def _check_shared_memory(name: str, shared_bytes: int, target: str) -> None:
    """Triton finds this out at launch; ahead of time it is ours to say."""
    chip = chip_of(target)
    if chip is not None and shared_bytes > chip.shared_bytes_per_program:
        what = f"{name} needs {shared_bytes} bytes of shared memory; {chip.name} has {chip.shared_bytes_per_program}"
        raise KernelCompileError(what, target=target, remedy="try smaller tiles or fewer stages")


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
