"""Kernel specs: what a kernel computes, as pure data that an emitter turns into text.

A spec knows its operands by position (``b0``, ``b1`` …), its sizes as ``n0``, ``n1`` … and nothing of the
layer it came from, so equal regions of a model have equal specs and share one kernel.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

import sympy
import torch

from .indexing import LoopVariable
from .scalar import Scalar
from .weight_panels import PanelFormat


@dataclass(frozen=True)
class Buffer:
    """An operand: ``name`` in the spec's expressions, its dtype, and whether the kernel writes it."""

    name: str
    dtype: torch.dtype
    is_written: bool = False


@dataclass(frozen=True)
class Store:
    """For every ``column``: ``value`` goes to a flat element index of a buffer, in the buffer's dtype."""

    buffer: str
    column: LoopVariable
    index: sympy.Expr
    value: Scalar


@dataclass(frozen=True)
class LoopSpec:
    """For every row the stores, one after the other; a later store may read what an earlier one wrote to the row."""

    buffers: tuple[Buffer, ...]
    row: LoopVariable
    stores: tuple[Store, ...]


WeightLayout = Literal["panels", "rows", "columns"]


@dataclass(frozen=True)
class MatmulSpec:
    """rows [M, K] times a weight, then the stores for every row and column.

    Row m of the left operand ``b0`` starts at element ``row_offset + m * row_stride``; ``b1`` holds the
    weight: "panels" (packed ahead of time, C++), or in place as "rows" [N, K] or "columns" [K, N], where a
    4-bit weight's scales and zeros are the buffers after it (Triton). Integer activations on panels also
    need ``b2``, the sums of each row's groups. ``accumulator`` in the stores is the product; a panel's two
    halves start ``half_distance`` columns apart: 16 for neighbours, the width of the gate for gated
    activations.
    """

    buffers: tuple[Buffer, ...]
    panel_format: PanelFormat
    weight_layout: WeightLayout
    activation: torch.dtype
    row: LoopVariable
    reduced: int
    row_stride: sympy.Expr
    row_offset: sympy.Expr
    half_distance: int
    stores: tuple[Store, ...]


@dataclass(frozen=True)
class PagedAttentionSpec:
    """Attention of packed queries over a paged cache, tiled for C++ and in rows for Triton; strides are in elements.

    The first six buffers are query, key cache, value cache, block tables, sequence lengths and query
    starts, then where the caches are int8 the scales of keys and values; the last is the output [T, H, Dv];
    ``alibi_slopes`` and ``sinks`` name buffers between.
    """

    buffers: tuple[Buffer, ...]
    num_tokens: sympy.Expr
    num_sequences: sympy.Expr
    table_width: sympy.Expr
    block_size: sympy.Expr
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    query_offset: sympy.Expr
    query_strides: tuple[sympy.Expr, sympy.Expr]
    scale: float
    sliding_window: int | None
    logit_softcap: float | None
    alibi_slopes: str | None
    sinks: str | None

    @property
    def has_scales(self) -> bool:
        return self.buffers[1].dtype == torch.int8


@dataclass(frozen=True)
class AttentionSpec:
    """Attention over given keys and values; ``operands`` names the buffers of query, key and value.

    ``offsets`` and ``strides`` (batch, head, position) are in elements; ``extents`` are batch, queries and
    keys; ``bias`` is a buffer, its dtype, offset and strides over [B, H, Sq, Skv]. The last buffer is the
    output [B, H, Sq, Dv], row-major.
    """

    buffers: tuple[Buffer, ...]
    operands: tuple[str, str, str]
    offsets: tuple[sympy.Expr, ...]
    strides: tuple[tuple[sympy.Expr, ...], ...]
    extents: tuple[sympy.Expr, sympy.Expr, sympy.Expr]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    bias: tuple[str, torch.dtype, sympy.Expr, tuple[sympy.Expr, ...]] | None
    scale: float
    is_causal: bool
    sliding_window: int | None
    logit_softcap: float | None
    alibi_slopes: str | None
    sinks: str | None


KernelSpec = LoopSpec | MatmulSpec | PagedAttentionSpec | AttentionSpec
_KINDS = {LoopSpec: "loop", MatmulSpec: "matmul", PagedAttentionSpec: "paged_attention", AttentionSpec: "attention"}


def symbols_of(spec: KernelSpec) -> tuple[sympy.Symbol, ...]:
    """The sizes that a spec depends on, in the order of their names."""
    sizes = {symbol for symbol in _symbols(spec) if not isinstance(symbol, LoopVariable) and _is_size(symbol)}
    return tuple(sorted(sizes, key=lambda symbol: int(symbol.name[1:])))


def _is_size(symbol: sympy.Symbol) -> bool:
    return symbol.name[0] == "n" and symbol.name[1:].isdigit()


def _symbols(value: Any) -> set[sympy.Symbol]:
    """Every symbol in a spec, those in the extents of loop variables too."""
    if isinstance(value, LoopVariable):
        return {value} | _symbols(value.extent)
    if isinstance(value, sympy.Basic):
        return {value} if isinstance(value, sympy.Symbol) else set().union(*map(_symbols, value.free_symbols))
    if isinstance(value, tuple):
        return set().union(*map(_symbols, value))
    if is_dataclass(value) and not isinstance(value, type):
        return set().union(*(_symbols(getattr(value, each.name)) for each in fields(value)))
    return set()


def spec_name(spec: KernelSpec) -> str:
    """A short name that says the kind and tells different specs apart."""
    extents = sorted((v.name, str(v.extent)) for v in _symbols(spec) if isinstance(v, LoopVariable))
    return f"{_KINDS[type(spec)]}_{hashlib.sha256(repr((spec, extents)).encode()).hexdigest()[:12]}"
