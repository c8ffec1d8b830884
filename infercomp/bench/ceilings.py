"""What the machine reaches at most, measured by small C++ programs in the same run as the model."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass

from infercomp.codegen.config import CodegenConfig
from infercomp.codegen.cpp.toolchain import SUPPORT, build_library
from infercomp.runtime.errors import BenchmarkError

# Several times the largest cache of a desktop or of a small virtual machine.
MEMORY_BYTES = 256 << 20
_NUM_STREAMS = (1, 2, 4, 8)
_UNITS = ("float32", "int8", "bfloat16")
_FIRST_ROUNDS = 10_000


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second of streaming reads by number of threads, and operations a second by unit on all threads.

    A unit that the instruction set lacks is left out; a multiplication and its addition are two operations.
    """

    num_threads: int
    read_bytes_per_second: dict[int, float]
    operations_per_second: dict[str, float]

    @property
    def bandwidth(self) -> float:
        """Of all threads or of one, whichever is more: two cores may be in each other's way."""
        return max(self.read_bytes_per_second.values())


def measure_ceilings(
    config: CodegenConfig,
    num_threads: int,
    repetitions: int = 5,
    seconds: float = 0.05,
    memory_bytes: int = MEMORY_BYTES,
) -> Ceilings:
    """The best of ``repetitions``, each of about ``seconds`` of computing or one read of ``memory_bytes``.

    Raises BuildError without a compiler and BenchmarkError without the memory.
    """
    probes = _load(config)
    return Ceilings(
        num_threads,
        _read_bandwidths(probes, num_threads, repetitions, memory_bytes),
        {unit: peak for unit in _UNITS if (peak := _peak(probes, unit, num_threads, repetitions, seconds)) > 0},
    )


def _load(config: CodegenConfig) -> ctypes.CDLL:
    probes = ctypes.CDLL(str(build_library([(SUPPORT / "ceilings.cpp").read_text()], config)))
    probes.infercomp_ceiling_memory.restype = ctypes.c_void_p
    probes.infercomp_ceiling_memory.argtypes = [ctypes.c_int64]
    probes.infercomp_ceiling_free.argtypes = [ctypes.c_void_p]
    probes.infercomp_ceiling_read.restype = ctypes.c_double
    probes.infercomp_ceiling_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    for unit in _UNITS:
        function = probes[f"infercomp_ceiling_{unit}"]
        function.restype = ctypes.c_double
        function.argtypes = [ctypes.c_int, ctypes.c_int64]
        setattr(probes, unit, function)
    return probes


def _read_bandwidths(probes: ctypes.CDLL, num_threads: int, repetitions: int, memory_bytes: int) -> dict[int, float]:
    memory = probes.infercomp_ceiling_memory(memory_bytes)
    if not memory:
        raise BenchmarkError(
            f"{memory_bytes >> 20} MiB could not be allocated to measure the bandwidth of reading",
            remedy="free some memory",
        )
    try:
        return {
            threads: max(
                probes.infercomp_ceiling_read(memory, memory_bytes, threads, streams)
                for _ in range(repetitions)
                for streams in _NUM_STREAMS
            )
            for threads in sorted({1, num_threads})
        }
    finally:
        probes.infercomp_ceiling_free(memory)


def _peak(probes: ctypes.CDLL, unit: str, num_threads: int, repetitions: int, seconds: float) -> float:
    function: Callable[[int, int], float] = getattr(probes, unit)
    start = time.perf_counter()
    if function(num_threads, _FIRST_ROUNDS) == 0:
        return 0.0
    rounds = max(1, int(_FIRST_ROUNDS * seconds / (time.perf_counter() - start)))
    return max(function(num_threads, rounds) for _ in range(repetitions))
