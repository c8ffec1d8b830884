"""Registers and spills of a compiled kernel, read from its binary without a device."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .errors import KernelCompileError


@dataclass(frozen=True)
class Resources:
    """Per thread. On NVIDIA a spill lives on the stack, and our kernels put nothing else there."""

    registers: int
    spill_bytes: int


def resources_of(target: str, binary: bytes, assembly: str) -> Resources:
    """What a cubin (through the cuobjdump that comes with Triton) or AMDGCN text says of itself."""
    return _from_amdgcn(assembly, target) if target.startswith("hip") else _from_cubin(binary, target)


def _from_cubin(cubin: bytes, target: str) -> Resources:
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__path__[0]) / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", done.stdout)
    if found is None:
        raise KernelCompileError("cuobjdump does not read the cubin", target=target, where=done.stderr.strip())
    registers, stack, local = map(int, found.groups())
    return Resources(registers, stack + local)


def _from_amdgcn(assembly: str, target: str) -> Resources:
    counts = {name: re.search(rf"\.{name}:\s+(\d+)", assembly) for name in ("vgpr_count", "vgpr_spill_count")}
    if None in counts.values():
        raise KernelCompileError("the assembly does not name its registers", target=target)
    registers, spilled = (int(found[1]) for found in counts.values() if found)
    return Resources(registers, spilled * 4)
