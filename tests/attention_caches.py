"""Paged caches for the attention kernels, filled with sequences in shuffled blocks: of floats, and of codes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from attention_harness import Options, call, dtype_name, is_right, pair
from torch import Tensor

from infercomp.codegen.ops import write_kv
from infercomp.codegen.ops.quantized import nearest_int8
from infercomp.runtime.kv_pools import Pool


def tiled_keys(cache: Tensor) -> Tensor:
    """[blocks, block_size, heads, D] -> [blocks, heads, D / PAIR, block_size, PAIR]"""
    blocks, size, heads, dim = cache.shape
    words = cache.reshape(blocks, size, heads, dim // pair(cache.dtype), pair(cache.dtype))
    return words.permute(0, 2, 3, 1, 4).contiguous()


def tiled_values(cache: Tensor) -> Tensor:
    """[blocks, block_size, heads, D] -> [blocks, heads, block_size / PAIR, D, PAIR]"""
    blocks, size, heads, dim = cache.shape
    words = cache.reshape(blocks, size // pair(cache.dtype), pair(cache.dtype), heads, dim)
    return words.permute(0, 3, 1, 4, 2).contiguous()


@dataclass(frozen=True)
class Sequences:
    """What some sequences hold: all positions' queries, keys and values."""

    queries: list[Tensor]  # [L, H, D] each
    keys: list[Tensor]  # [L, Hkv, D]
    values: list[Tensor]  # [L, Hkv, Dv]

    @staticmethod
    def random(
        lengths: list[int], heads: int, kv_heads: int, dim: int, value_dim: int, dtype: torch.dtype
    ) -> Sequences:
        draw = lambda heads, dim: [torch.randn(n, heads, dim).to(dtype) for n in lengths]  # noqa: E731
        return Sequences(draw(heads, dim), draw(kv_heads, dim), draw(kv_heads, value_dim))

    @property
    def dtype(self) -> torch.dtype:
        return self.queries[0].dtype


@dataclass
class Cache:
    """Tiled caches of some sequences' first positions in shuffled blocks, the rest of them poison."""

    library: ctypes.CDLL
    sequences: Sequences
    lengths: list[int]
    block_size: int
    poison: float = float("nan")
    keys: Tensor = field(init=False)
    values: Tensor = field(init=False)
    block_tables: Tensor = field(init=False)

    def __post_init__(self) -> None:
        key, value = self.sequences.keys[0], self.sequences.values[0]
        width = max(-(-max(self.lengths) // self.block_size), 1)
        blocks = len(self.lengths) * width + 2
        self.block_tables = torch.randperm(blocks)[: len(self.lengths) * width].reshape(len(self.lengths), width)
        (_, kv_heads, dim), value_dim = key.shape, value.shape[2]
        self.keys = tiled_keys(torch.full((blocks, self.block_size, kv_heads, dim), self.poison, dtype=key.dtype))
        self.values = tiled_values(
            torch.full((blocks, self.block_size, kv_heads, value_dim), self.poison, dtype=key.dtype)
        )
        for i, length in enumerate(self.lengths):
            self.write(self.slots(i, length), self.sequences.keys[i][:length], self.sequences.values[i][:length])

    def slots(self, sequence: int, length: int) -> Tensor:
        positions = torch.arange(length)
        return self.block_tables[sequence, positions // self.block_size] * self.block_size + positions % self.block_size

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        numbers = [len(slots), keys.stride(0), keys.stride(1), values.stride(0), values.stride(1)]
        numbers += [keys.shape[1], keys.shape[2], values.shape[2], self.block_size]
        function = getattr(self.library, f"write_kv_{dtype_name(keys.dtype)}")
        call(function, [keys, values, self.keys, self.values, slots], numbers)

    def function(self, dtype: torch.dtype) -> Callable[..., None]:
        return getattr(self.library, f"paged_{dtype_name(dtype)}")  # type: ignore[no-any-return]

    def scales(self) -> list[Tensor | None]:
        return [None, None]

    def attend(self, chunks: list[int], options: Options, backwards: bool = False) -> list[Tensor]:
        """The newest `chunks[i]` queries of sequence i: [chunk, H, Dv] each."""
        taken = [
            queries[length - chunk : length]
            for queries, length, chunk in zip(self.sequences.queries, self.lengths, chunks, strict=True)
        ]
        packed = torch.cat(taken)
        # Wider rows and rows after the last sequence's, as a fused projection and a padded batch have them.
        tokens, heads, dim = packed.shape
        query = torch.full((tokens + 2, heads + 1, dim), float("nan"), dtype=packed.dtype)
        query[:tokens, :heads] = packed
        value_dim = self.sequences.values[0].shape[2]
        output = torch.full((tokens + 2, heads, value_dim), 99.0, dtype=packed.dtype)
        starts = torch.tensor([0, *chunks]).cumsum(0)
        numbers = [query.stride(0), query.stride(1), output.stride(0), self.block_tables.stride(0), tokens + 2]
        numbers += [len(chunks), heads, self.sequences.keys[0].shape[1], dim, value_dim, self.block_size]
        numbers += [options.sliding_window or 0, int(backwards)]
        tensors = [query, self.keys, self.values, output, self.block_tables, torch.tensor(self.lengths), starts]
        tensors += [options.alibi_slopes, options.sinks, *self.scales()]
        call(self.function(packed.dtype), tensors, numbers, options.scale, options.logit_softcap or 0.0)
        assert (output[tokens:] == 99).all()
        return list(output[:tokens].split(chunks))

    def held(self, rows: Tensor) -> Tensor:
        """What the cache keeps of rows."""
        return rows

    def is_right(self, outputs: list[Tensor], options: Options) -> bool:
        right = []
        for i, (output, length) in enumerate(zip(outputs, self.lengths, strict=True)):
            taken = slice(length - len(output), length)
            operands = [
                self.sequences.queries[i][taken],
                self.held(self.sequences.keys[i][:length]),
                self.held(self.sequences.values[i][:length]),
            ]
            operands = [t.transpose(0, 1)[None] for t in operands]
            right.append(is_right(output.transpose(0, 1)[None], operands, options, is_causal=True))
        return all(right)


class Int8Cache(Cache):
    """The same in codes; what nobody wrote is -128, with a scale of poison."""

    def __post_init__(self) -> None:
        super().__post_init__()
        (blocks, kv_heads), (dim, value_dim) = self.keys.shape[:2], self.dims()
        pools = Pool(kv_heads, dim, 4, True), Pool(kv_heads, value_dim, 4, False)
        self.keys, self.values = (
            torch.full(pool.shape(blocks, self.block_size), -128, dtype=torch.int8) for pool in pools
        )
        self.key_scale, self.value_scale = (
            torch.full(pool.scale_shape(blocks, self.block_size), self.poison) for pool in pools
        )
        for i, length in enumerate(self.lengths):
            key, value = self.sequences.keys[i][:length], self.sequences.values[i][:length]
            write_kv(
                key, value, self.keys, self.values, self.slots(i, length), 4,
                key_scale=self.key_scale, value_scale=self.value_scale,
            )  # fmt: skip

    def dims(self) -> tuple[int, int]:
        return self.sequences.keys[0].shape[2], self.sequences.values[0].shape[2]

    def function(self, dtype: torch.dtype) -> Callable[..., None]:
        return getattr(self.library, f"paged_{dtype_name(dtype)}_int8")  # type: ignore[no-any-return]

    def scales(self) -> list[Tensor | None]:
        return [self.key_scale, self.value_scale]

    def held(self, rows: Tensor) -> Tensor:
        codes, scale = nearest_int8(rows)
        return codes * scale
