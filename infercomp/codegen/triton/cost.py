"""A guess at a kernel's time from waves of programs, bytes and operations: good enough to drop hopeless tiles.

Roofline (Williams et al. 2009) per wave. Registers are counted as the accumulators and scores that a thread
holds, as these are what spills.
"""

from __future__ import annotations

from .chip import Chip
from .specs.attention import AttentionOptions, PagedAttentionSpec
from .specs.base import DTYPE_BYTES, KernelSpec, ceiling_division
from .specs.matmul import MatmulSpec

MOST_ACCUMULATORS_PER_THREAD = 160
_MOST_PROGRAMS_PER_MULTIPROCESSOR = 8
_SECONDS_PER_LAUNCH = 3e-6
_WEIGHT_BYTES = {"i8": 1.0, "u4": 0.5}


def shared_bytes(spec: KernelSpec) -> int:
    """Shared memory that the stages of a loop need, from tile sizes alone; the compiler may take somewhat more."""
    if isinstance(spec, MatmulSpec):
        if spec.is_single_row:
            return 0
        element = DTYPE_BYTES[spec.input_dtype]
        weight = _WEIGHT_BYTES.get(spec.weight_format, element) * spec.num_accumulators
        stage = spec.tile_inner * (spec.tile_rows * element + spec.tile_columns * weight)
        return int(stage * max(1, spec.num_stages - 1))
    if isinstance(spec, AttentionOptions):
        element = DTYPE_BYTES[spec.dtype]
        keys = spec.tile_keys * (spec.tile_dim + spec.tile_value_dim) * max(1, spec.num_stages - 1)
        return (keys + spec.tile_rows * spec.tile_dim) * element
    return 0


def accumulators_per_thread(spec: KernelSpec, warp_size: int = 32) -> int:
    """Float32 values that live in a thread's registers through the loop."""
    threads = spec.num_warps * warp_size
    if isinstance(spec, MatmulSpec):
        inner = spec.tile_inner if spec.is_single_row else 1
        return spec.tile_rows * spec.tile_columns * inner * spec.num_accumulators // threads
    if isinstance(spec, AttentionOptions):
        # Scores exist twice, as scores and as probabilities, and 64-bit addresses of keys and values besides.
        addresses = spec.tile_keys * (spec.tile_dim + spec.tile_value_dim) // 4
        return (spec.tile_rows * (spec.tile_value_dim + 2 * spec.tile_keys) + addresses) // threads
    return 0


def fits(spec: KernelSpec, chip: Chip) -> bool:
    """Whether a program has room on the chip."""
    registers = accumulators_per_thread(spec, chip.warp_size)
    return shared_bytes(spec) <= chip.shared_bytes_per_program and registers <= MOST_ACCUMULATORS_PER_THREAD


def estimated_seconds(spec: KernelSpec, chip: Chip, num_rows: int, num_keys: int = 0) -> float:
    """Time of ``num_rows`` rows (tokens), against ``num_keys`` keys for attention."""
    if isinstance(spec, MatmulSpec):
        return _matmul_seconds(spec, chip, num_rows)
    if isinstance(spec, AttentionOptions):
        return _attention_seconds(spec, chip, num_rows, num_keys)
    return _SECONDS_PER_LAUNCH


def _in_waves(chip: Chip, num_programs: int, shared: int, flops: float, dtype: str, num_bytes: float) -> float:
    """Programs of ``flops`` and ``num_bytes`` each, a wave of them at a time."""
    fitting = chip.shared_bytes_per_multiprocessor // max(1, shared)
    resident = max(1, min(_MOST_PROGRAMS_PER_MULTIPROCESSOR, fitting))
    waves = ceiling_division(num_programs, chip.num_multiprocessors * resident)
    at_once = min(num_programs, chip.num_multiprocessors * resident)
    busy = min(at_once, chip.num_multiprocessors)
    compute = flops * at_once / (chip.flops_per_second[dtype] * busy / chip.num_multiprocessors)
    # Half of the multiprocessors are about enough to draw the whole bandwidth.
    share = min(1.0, 2 * busy / chip.num_multiprocessors)
    return waves * max(compute, num_bytes * at_once / (chip.bytes_per_second * share))


def _matmul_seconds(spec: MatmulSpec, chip: Chip, num_rows: int) -> float:
    grid = spec.grid(num_rows, chip.num_multiprocessors)
    tiles = ceiling_division(num_rows, spec.tile_rows) * ceiling_division(spec.num_columns, spec.tile_columns)
    inner = spec.inner_per_split if spec.num_splits > 1 else spec.num_inner
    columns = spec.tile_columns * spec.num_accumulators
    element = DTYPE_BYTES[spec.input_dtype]
    num_bytes = inner * columns * _WEIGHT_BYTES.get(spec.weight_format, element) + inner * spec.tile_rows * element
    flops = 2.0 * spec.tile_rows * columns * inner
    seconds = _in_waves(chip, tiles * grid[1], shared_bytes(spec), flops, spec.input_dtype, num_bytes)
    if spec.num_splits > 1:
        partials = spec.num_splits * num_rows * spec.num_columns * spec.num_accumulators * 4
        seconds += 2 * partials / chip.bytes_per_second + _SECONDS_PER_LAUNCH
    return seconds + _SECONDS_PER_LAUNCH


def _attention_seconds(spec: AttentionOptions, chip: Chip, num_rows: int, num_keys: int) -> float:
    width = spec.head_dim + spec.value_width
    seen = num_keys if spec.sliding_window is None else min(num_keys, spec.sliding_window)
    programs, keys = spec.num_heads * ceiling_division(num_rows, spec.tile_rows), seen
    if isinstance(spec, PagedAttentionSpec):
        programs = spec.num_kv_heads * ceiling_division(num_rows, spec.tile_tokens)
        if spec.chunk_keys is not None:
            programs, keys = programs * ceiling_division(seen, spec.chunk_keys), min(seen, spec.chunk_keys)
    tiles = ceiling_division(keys, spec.tile_keys)
    num_bytes = tiles * spec.tile_keys * width * DTYPE_BYTES[spec.dtype]
    flops = 2.0 * spec.tile_rows * tiles * spec.tile_keys * width
    return _SECONDS_PER_LAUNCH + _in_waves(chip, programs, shared_bytes(spec), flops, spec.dtype, float(num_bytes))
