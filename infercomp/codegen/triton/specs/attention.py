"""Specs of attention: over given keys, over a paged cache, and the second stage of split keys."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .base import (
    Argument,
    Grid,
    KernelSpec,
    ceiling_division,
    power_of_two_at_least,
    require,
    require_dtype,
    require_power_of_two,
)

_SMALLEST_MATRIX_ROWS = 16


@dataclass(frozen=True, kw_only=True)
class AttentionOptions(KernelSpec):
    """What dense and paged attention have in common; the meaning is that of ``ops.attention``."""

    dtype: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    value_dim: int | None = None  # head_dim unless given
    sliding_window: int | None = None
    logit_softcap: float | None = None
    has_alibi: bool = False
    has_sinks: bool = False
    allow_tf32: bool = False
    tile_rows: int = 64
    tile_keys: int = 64
    num_warps: int = 4
    num_stages: int = 3

    @property
    def value_width(self) -> int:
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.num_heads // self.num_kv_heads

    @property
    def tile_dim(self) -> int:
        return max(_SMALLEST_MATRIX_ROWS, power_of_two_at_least(self.head_dim))

    @property
    def tile_value_dim(self) -> int:
        return max(_SMALLEST_MATRIX_ROWS, power_of_two_at_least(self.value_width))

    def validate(self) -> None:
        require_dtype(self.dtype, "dtype")
        is_grouped = self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads == 0
        require(is_grouped, f"{self.num_heads} heads do not share {self.num_kv_heads}", field="num_kv_heads")
        require_power_of_two(self.tile_rows, "tile_rows", _SMALLEST_MATRIX_ROWS)
        require_power_of_two(self.tile_keys, "tile_keys", _SMALLEST_MATRIX_ROWS)
        window = self.sliding_window
        require(window is None or window > 0, f"a window of {window} hides every key", field="sliding_window")

    def _head_arguments(self) -> tuple[Argument, ...]:
        alibi = (Argument("alibi_slopes", "*fp32"),) if self.has_alibi else ()
        return (*alibi, *((Argument("sinks", "*fp32"),) if self.has_sinks else ()))


@dataclass(frozen=True, kw_only=True)
class AttentionSpec(AttentionOptions):
    """``ops.attention``: query [B, H, Sq, D], key [B, Hkv, Skv, D], value [B, Hkv, Skv, Dv] -> [B, H, Sq, Dv].

    Strides are arguments in elements: multiples of ``stride_multiple``, the last dimension contiguous. The
    bias is contiguous along its keys and has stride 0 where it is broadcast along another dimension.
    ``bias_dtype``: None, a float dtype (added) or "i1" (True is seen). FlashAttention-2 (Dao 2023).
    """

    is_causal: bool = False
    bias_dtype: str | None = None

    @property
    def name(self) -> str:
        return f"attention_{self.dtype}"

    @property
    def stride_multiple(self) -> int:
        """What every stride is a multiple of: heads lie end to end, so a power of two that divides them."""
        return math.gcd(16, self.head_dim, self.value_width)

    def arguments(self) -> tuple[Argument, ...]:
        inputs = [Argument(name, f"*{self.dtype}") for name in ("output", "query", "key", "value")]
        if self.bias_dtype is not None:
            inputs.append(Argument("bias", f"*{self.bias_dtype}"))
        strides = [
            Argument(f"{tensor}_{axis}_stride", "i64", self.stride_multiple)
            for tensor in ("output", "query", "key", "value")
            for axis in ("batch", "head", "row")
        ]
        if self.bias_dtype is not None:
            strides += [Argument(f"bias_{axis}_stride", "i64") for axis in ("batch", "head", "row")]
        lengths = (Argument("num_queries", "i32"), Argument("num_keys", "i32"))
        return (*inputs, *self._head_arguments(), *strides, *lengths)

    def grid(self, batch: int, num_queries: int) -> Grid:
        return (ceiling_division(num_queries, self.tile_rows), self.num_heads, batch)


@dataclass(frozen=True, kw_only=True)
class PagedAttentionSpec(AttentionOptions):
    """``ops.paged_attention``: packed query [T, H, D] over key_cache [blocks, block_size, Hkv, D] -> [T, H, Dv].

    The query heads of a group are rows of one tile, so that they share each load of a key.

    Prefill (``chunk_keys`` None): any number of query tokens a sequence, keys in ascending tiles from
    position 0, FlashAttention-2 (Dao 2023). A row's result is the same in any batch and any chunked prefill.

    Decode: at most ``max_query_tokens`` tokens a sequence. Keys are cut at multiples of ``chunk_keys``
    counted from position 0 (FlashDecoding, Dao et al. 2023, but with the cuts fixed instead of fitted to
    the chip), each chunk gives partial sums, and ``combine()`` adds them in ascending order. The cuts
    depend on the row's own length only, so results do not depend on the batch; they may differ in the
    last bits from what the prefill kernel gives the same row, so route by a rule that the batch does not enter.
    """

    block_size: int
    chunk_keys: int | None = None
    max_query_tokens: int = 1
    query_token_stride: int | None = None  # elements between packed tokens; H·D unless given
    index_dtype: str = "i64"

    @property
    def name(self) -> str:
        return f"paged_{'decode' if self.chunk_keys else 'prefill'}_{self.dtype}"

    @property
    def tile_tokens(self) -> int:
        """Query tokens of a tile; the rest of its rows is idle where the group is no power of two."""
        return self.tile_rows // self.group

    def validate(self) -> None:
        super().validate()
        require(self.block_size > 0, "a block holds no token", field="block_size")
        require(self.tile_tokens >= 1, f"a group of {self.group} heads needs taller tiles", field="tile_rows")
        if self.chunk_keys is not None:
            require(self.chunk_keys % self.tile_keys == 0, "a chunk is not whole tiles", field="chunk_keys")
            require(self.max_query_tokens <= self.tile_tokens, "the tile has too few rows", field="max_query_tokens")

    def arguments(self) -> tuple[Argument, ...]:
        index = f"*{self.index_dtype}"
        outputs: tuple[Argument, ...] = (Argument("output", f"*{self.dtype}"),)
        if self.chunk_keys is not None:
            outputs = tuple(Argument(name, "*fp32") for name in ("partials", "partial_maxima", "partial_sums"))
        inputs = (Argument(name, f"*{self.dtype}") for name in ("query", "key_cache", "value_cache"))
        indices = (Argument(name, index) for name in ("block_tables", "seq_lens", "query_start_loc"))
        heads = [each for each in self._head_arguments() if each.name != "sinks" or self.chunk_keys is None]
        chunks = (Argument("num_chunk_slots", "i32"),) if self.chunk_keys else ()
        return (*outputs, *inputs, *indices, *heads, Argument("block_table_stride", "i32"), *chunks)

    def grid(self, num_sequences: int, *, max_query_tokens: int = 1, max_keys: int = 0) -> Grid:
        """Prefill needs the longest query of the batch, decode its longest sequence."""
        tiles = ceiling_division(max_query_tokens, self.tile_tokens)
        if self.chunk_keys is not None:
            tiles = self.num_chunk_slots(max_keys)
        return (tiles, self.num_kv_heads, num_sequences)

    def num_chunk_slots(self, max_keys: int) -> int:
        """Chunks of the longest sequence; partials are [T, H, slots, Dv], maxima and sums [T, H, slots], float32."""
        assert self.chunk_keys is not None
        return ceiling_division(max_keys, self.chunk_keys)

    def combine(self) -> PagedCombineSpec:
        """The second stage of decode."""
        require(self.chunk_keys is not None, "prefill has no second stage", field="chunk_keys")
        return PagedCombineSpec(attention=self, origin=self.origin)


@dataclass(frozen=True, kw_only=True)
class PagedCombineSpec(KernelSpec):
    """Partial sums of a row's chunks [T, H, slots, Dv] -> [T, H, Dv], in ascending order of the chunks."""

    attention: PagedAttentionSpec
    tile_chunks: int = 8
    num_warps: int = 2

    @property
    def name(self) -> str:
        return f"paged_combine_{self.attention.dtype}"

    def arguments(self) -> tuple[Argument, ...]:
        attention = self.attention
        partials = (Argument(name, "*fp32") for name in ("partials", "partial_maxima", "partial_sums"))
        indices = (Argument(name, f"*{attention.index_dtype}") for name in ("seq_lens", "query_start_loc"))
        sinks = (Argument("sinks", "*fp32"),) if attention.has_sinks else ()
        output = Argument("output", f"*{attention.dtype}")
        return (output, *partials, *indices, *sinks, Argument("num_chunk_slots", "i32"))

    def grid(self, num_sequences: int) -> Grid:
        return (self.attention.max_query_tokens, self.attention.num_heads, num_sequences)
