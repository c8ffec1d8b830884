"""What the cost model knows of a chip: data-sheet numbers, dense, without sparsity."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """``flops_per_second`` by input dtype; shared memory is what one program, and one multiprocessor, may have."""

    name: str
    target: str
    num_multiprocessors: int
    shared_bytes_per_program: int
    shared_bytes_per_multiprocessor: int
    bytes_per_second: float
    flops_per_second: dict[str, float]
    has_tensor_memory_access: bool = False
    warp_size: int = 32


def _flops(half: float, int8: float, single: float) -> dict[str, float]:
    return {"fp16": half, "bf16": half, "i8": int8, "fp32": single}


A100 = Chip("A100", "cuda:80", 108, 166_912, 167_936, 2.0e12, _flops(312e12, 624e12, 19.5e12))
H100 = Chip("H100", "cuda:90", 132, 232_448, 233_472, 3.35e12, _flops(989e12, 1979e12, 67e12), True)
B200 = Chip("B200", "cuda:100", 148, 232_448, 233_472, 8.0e12, _flops(2250e12, 4500e12, 80e12), True)
MI300X = Chip("MI300X", "hip:gfx942", 304, 65_536, 65_536, 5.3e12, _flops(1307e12, 2615e12, 163e12), False, 64)
CHIPS = (A100, H100, B200, MI300X)


def chip_of(target: str) -> Chip | None:
    """The chip that a target was described by, if one of ``CHIPS`` was."""
    return next((chip for chip in CHIPS if chip.target == target), None)
