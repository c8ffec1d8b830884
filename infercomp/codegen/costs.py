"""What a kernel call costs at least: bytes that must cross the memory bus, and operations, from its spec alone.

The roofline of Williams, Waterman and Patterson (2009): a call takes no less than its bytes at the machine's
streaming bandwidth, and no less than its operations at the peak of the unit that does them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import sympy
import torch

from .accesses import count_stores, evaluate
from .specs import AttentionSpec, KernelSpec, LoopSpec, MatmulSpec, PagedAttentionSpec, symbols_of
from .weight_panels import BF16, HALF, PANEL

_INT64_BYTES = 8
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class SequenceLengths:
    """One sequence of a step: ``num_queries`` new tokens, ``num_keys`` cached tokens with those included."""

    num_queries: int
    num_keys: int


@dataclass(frozen=True)
class Cost:
    """Bytes read or written, each distinct element once, and operations by unit.

    The units are "float32", "bfloat16" and "int8"; a multiplication and its addition are two operations.
    """

    num_bytes: int
    operations: Mapping[str, int]

    def seconds(self, bytes_per_second: float, operations_per_second: Mapping[str, float]) -> float:
        """The least time. A unit that the machine lacks is float32's."""
        computing = sum(
            count / operations_per_second.get(unit, operations_per_second["float32"])
            for unit, count in self.operations.items()
        )
        return max(self.num_bytes / bytes_per_second, computing)


def cost_of(spec: KernelSpec, sizes: Sequence[int], sequences: Sequence[SequenceLengths] = ()) -> Cost:
    """The cost of one call with ``sizes`` in the order of ``symbols_of``; a paged attention needs its ``sequences``."""
    given = dict(zip(symbols_of(spec), sizes, strict=True))
    if isinstance(spec, LoopSpec):
        return _loop_cost(spec, given)
    if isinstance(spec, MatmulSpec):
        return _matmul_cost(spec, given)
    if isinstance(spec, PagedAttentionSpec):
        return _paged_attention_cost(spec, given, sequences)
    return _attention_cost(spec, given)


def label_of(spec: KernelSpec) -> str:
    """What a kernel is, in a few words."""
    if isinstance(spec, LoopSpec):
        return "loop"
    if isinstance(spec, MatmulSpec):
        num_outputs = spec.stores[0].column.extent * (2 if _is_paired(spec) else 1)
        return f"matmul {spec.panel_format.name} {spec.reduced} → {num_outputs}"
    heads = f"{spec.num_heads}/{spec.num_kv_heads} heads of {spec.head_dim}"
    return f"{'paged ' if isinstance(spec, PagedAttentionSpec) else ''}attention {heads}"


def _loop_cost(spec: LoopSpec, sizes: Mapping[sympy.Symbol, int]) -> Cost:
    num_bytes, num_operations = _stores_cost(spec, sizes)
    return Cost(num_bytes, {"float32": num_operations})


def _stores_cost(spec: LoopSpec | MatmulSpec, sizes: Mapping[sympy.Symbol, int]) -> tuple[int, int]:
    counted = count_stores(spec.row, spec.stores, sizes)
    num_bytes = 0
    for buffer in spec.buffers:
        # What a kernel writes and reads back is still in the cache.
        count = counted.elements_written if buffer.is_written else counted.elements_read
        num_bytes += count(buffer.name) * buffer.dtype.itemsize
    return num_bytes, counted.num_operations


def _is_paired(spec: MatmulSpec) -> bool:
    return spec.half_distance != HALF


def _matmul_cost(spec: MatmulSpec, sizes: Mapping[sympy.Symbol, int]) -> Cost:
    rows, columns = evaluate(spec.row.extent, sizes), evaluate(spec.stores[0].column.extent, sizes)
    num_outputs = columns * (2 if _is_paired(spec) else 1)
    num_bytes, num_operations = _stores_cost(spec, sizes)
    num_bytes += rows * spec.reduced * spec.activation.itemsize + _weight_bytes(spec, columns)
    if spec.activation == torch.int8:
        num_bytes += rows * (spec.reduced // (spec.panel_format.group or spec.reduced)) * _FLOAT_BYTES
    unit = _unit(spec.activation if spec.panel_format == BF16 or spec.activation == torch.int8 else torch.float32)
    operations = {"float32": num_operations}
    products = 2 * rows * spec.reduced * num_outputs // (2 if spec.panel_format.is_sparse else 1)
    return Cost(num_bytes, {**operations, unit: operations.get(unit, 0) + products})


def _weight_bytes(spec: MatmulSpec, columns: int) -> int:
    """Whole panels, or the weight as it lies."""
    if spec.weight_layout == "panels":
        return -(-columns // (HALF if _is_paired(spec) else PANEL)) * spec.panel_format.panel_bytes(spec.reduced)
    return columns * (2 if _is_paired(spec) else 1) * spec.reduced * spec.panel_format.bits // 8


def _unit(dtype: torch.dtype) -> str:
    return {torch.int8: "int8", torch.bfloat16: "bfloat16"}.get(dtype, "float32")


def _paged_attention_cost(
    spec: PagedAttentionSpec, sizes: Mapping[sympy.Symbol, int], sequences: Sequence[SequenceLengths]
) -> Cost:
    assert len(sequences) == evaluate(spec.num_sequences, sizes), "one entry for each sequence of the step"
    query, cache = spec.buffers[0].dtype, spec.buffers[1].dtype
    num_tokens, block_size = evaluate(spec.num_tokens, sizes), evaluate(spec.block_size, sizes)
    channels = spec.head_dim + spec.value_head_dim
    scale_bytes = 2 * _FLOAT_BYTES if spec.has_scales else 0
    num_bytes = num_tokens * spec.num_heads * channels * query.itemsize
    num_bytes += (2 * len(sequences) + 1) * _INT64_BYTES + _num_vectors(spec) * spec.num_heads * _FLOAT_BYTES
    num_pairs = 0
    for one in sequences:
        keys = _keys_read(one, spec.sliding_window)
        num_bytes += keys * spec.num_kv_heads * (channels * cache.itemsize + scale_bytes)
        num_bytes += -(-keys // block_size) * _INT64_BYTES
        num_pairs += _pairs_seen(one, spec.sliding_window)
    return Cost(num_bytes, {_unit(query): 2 * num_pairs * spec.num_heads * channels})


def _attention_cost(spec: AttentionSpec, sizes: Mapping[sympy.Symbol, int]) -> Cost:
    batch, num_queries, num_keys = (evaluate(extent, sizes) for extent in spec.extents)
    dtype = spec.buffers[-1].dtype
    one, channels = SequenceLengths(num_queries, num_keys), spec.head_dim + spec.value_head_dim
    keys = _keys_read(one, spec.sliding_window, spec.is_causal)
    pairs = _pairs_seen(one, spec.sliding_window, spec.is_causal)
    num_bytes = batch * (num_queries * spec.num_heads + keys * spec.num_kv_heads) * channels * dtype.itemsize
    num_bytes += _num_vectors(spec) * spec.num_heads * _FLOAT_BYTES
    if spec.bias is not None:
        _, bias_dtype, _, strides = spec.bias
        extents = (batch, spec.num_heads, num_queries, num_keys)
        num_bytes += bias_dtype.itemsize * prod(n for n, step in zip(extents, strides, strict=True) if step != 0)
    return Cost(num_bytes, {_unit(dtype): 2 * batch * pairs * spec.num_heads * channels})


def _num_vectors(spec: PagedAttentionSpec | AttentionSpec) -> int:
    return (spec.alibi_slopes is not None) + (spec.sinks is not None)


def _keys_read(one: SequenceLengths, window: int | None, is_causal: bool = True) -> int:
    """Keys that at least one query sees."""
    spans = _seen(one, window, is_causal)
    return max(0, max(end for _, end in spans) - min(first for first, _ in spans)) if spans else 0


def _pairs_seen(one: SequenceLengths, window: int | None, is_causal: bool = True) -> int:
    """Pairs of a query and a key that it sees."""
    return sum(max(0, end - first) for first, end in _seen(one, window, is_causal))


def _seen(one: SequenceLengths, window: int | None, is_causal: bool) -> list[tuple[int, int]]:
    """The first key and the end of the keys of each query; the last query is at the last key."""
    positions = range(one.num_keys - one.num_queries, one.num_keys)
    return [
        (0 if window is None else max(0, position - window + 1), position + 1 if is_causal else one.num_keys)
        for position in positions
    ]
