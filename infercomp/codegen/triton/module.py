"""Emitted text as a Python module with a kernel that can be launched; here Triton is imported."""

from __future__ import annotations

import hashlib
import importlib.util
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from .specs.base import Grid


@dataclass(frozen=True, eq=False)
class LoadedKernel:
    """A ``@triton.jit`` function with what its text says of it."""

    function: Any
    arguments: dict[str, str]
    num_warps: int
    num_stages: int
    allows_contraction: bool

    def launch_options(self) -> dict[str, int | bool]:
        """What Triton is told besides the arguments."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return {**options, "enable_fp_fusion": self.allows_contraction}

    def launch(self, grid: Grid, *arguments: object) -> None:
        """Run the kernel on tensors and numbers in the order of ``arguments``."""
        self.function[grid](*arguments, **self.launch_options())


def load_kernel(text: str, folder: Path | None = None) -> LoadedKernel:
    """Write the text to a file named after its content and import it: Triton reads a kernel's source from a file."""
    module = _load(text, folder or _process_folder())
    options = (module.NUM_WARPS, module.NUM_STAGES, module.ALLOWS_CONTRACTION)
    return LoadedKernel(getattr(module, module.KERNEL), module.ARGUMENTS, *options)


@cache
def _process_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="infercomp_kernels_"))


@cache
def _load(text: str, folder: Path) -> ModuleType:
    path = folder / f"kernel_{hashlib.sha256(text.encode()).hexdigest()[:16]}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def provide_descriptor_memory(device: str = "cuda") -> None:
    """Kernels that make TMA descriptors need a little global memory at launch; call once before the first one."""
    import torch
    import triton

    def allocate(num_bytes: int, alignment: int, stream: int | None) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.int8, device=device)

    triton.set_allocator(allocate)
