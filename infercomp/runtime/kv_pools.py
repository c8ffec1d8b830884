"""The tensors behind the block numbers: per layer one pool of keys and one of values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .config import RuntimeConfig
from .errors import ConfigError
from .untouched_memory import untouched_zeros

# Kernels that read a tiled cache take the keys of so many tokens at a time, whatever the dtype.
TILED_TOKENS = 16
_SCALE_DTYPE = torch.float32


@dataclass(frozen=True)
class Pool:
    """The layout of one pool of keys or values; ``tile`` is 0 for rows of channels, else as in paged_attention."""

    num_kv_heads: int
    width: int
    tile: int
    is_key: bool

    def shape(self, num_blocks: int, block_size: int) -> tuple[int, ...]:
        if not self.tile:
            return (num_blocks, block_size, self.num_kv_heads, self.width)
        if self.is_key:
            return (num_blocks, self.num_kv_heads, self.width // self.tile, block_size, self.tile)
        return (num_blocks, self.num_kv_heads, block_size // self.tile, self.width, self.tile)

    def scale_shape(self, num_blocks: int, block_size: int) -> tuple[int, ...]:
        """Of the scales beside a pool of codes, one for each token and head."""
        return (num_blocks, self.num_kv_heads, block_size) if self.tile else (num_blocks, block_size, self.num_kv_heads)


@dataclass(frozen=True)
class KvCacheSpec:
    """What one attention layer keeps per token: ``num_kv_heads`` keys of ``head_dim``, values of ``value_head_dim``.

    ``dtype`` is what the model computes them in. Where ``is_int8`` they are kept as codes, each with a scale.
    """

    name: str
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    dtype: torch.dtype
    tile: int = 0
    is_int8: bool = False

    def pool(self, role: str) -> Pool:
        """The pool of ``role`` "key" or "value"."""
        width = self.head_dim if role == "key" else self.value_head_dim
        return Pool(self.num_kv_heads, width, self.tile, role == "key")

    @property
    def bytes_per_token(self) -> int:
        num_elements = self.num_kv_heads * (self.head_dim + self.value_head_dim)
        if self.is_int8:
            return num_elements + 2 * self.num_kv_heads * _SCALE_DTYPE.itemsize
        return num_elements * int(self.dtype.itemsize)

    def pools(self, num_blocks: int, block_size: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor, by name."""
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for role in ("key", "value"):
            pool, name = self.pool(role), f"{self.name}_{role}"
            found[name] = pool.shape(num_blocks, block_size), torch.int8 if self.is_int8 else self.dtype
            if self.is_int8:
                found[f"{name}_scale"] = pool.scale_shape(num_blocks, block_size), _SCALE_DTYPE
        return found


def bytes_per_block(specs: Sequence[KvCacheSpec], block_size: int) -> int:
    """Bytes of one block over all layers, keys and values."""
    return block_size * sum(spec.bytes_per_token for spec in specs)


def num_blocks_for(specs: Sequence[KvCacheSpec], config: RuntimeConfig) -> int:
    """``config.num_blocks`` if set, else the whole blocks that fit into ``config.kv_cache_bytes``."""
    if config.num_blocks is not None:
        return config.num_blocks
    num_bytes = bytes_per_block(specs, config.block_size)
    if num_bytes == 0:
        raise ConfigError(
            "no layer keeps keys and values, so kv_cache_bytes says nothing about num_blocks",
            remedy="pass num_blocks",
            field="num_blocks",
        )
    if num_bytes > config.kv_cache_bytes:
        raise ConfigError(
            f"kv_cache_bytes={config.kv_cache_bytes} does not hold one block of {num_bytes} bytes",
            remedy=f"raise kv_cache_bytes to at least {num_bytes}, or lower block_size",
            field="kv_cache_bytes",
        )
    return config.kv_cache_bytes // num_bytes


def allocate_pools(
    specs: Sequence[KvCacheSpec],
    num_blocks: int,
    block_size: int,
    device: torch.device | str = "cpu",
) -> dict[str, torch.Tensor]:
    """Per spec ``{name}_key`` and ``{name}_value``, shaped as ``Pool`` says, all zero; of codes also ``…_scale``."""
    pools: dict[str, torch.Tensor] = {}
    for spec in specs:
        for pool_name, (shape, dtype) in spec.pools(num_blocks, block_size).items():
            if pool_name in pools:
                raise ConfigError(
                    f"two layers want a pool named {pool_name!r}", remedy="give each layer its own name", field="name"
                )
            pools[pool_name] = _zeros(shape, dtype, torch.device(device))
    return pools


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A cache is as large as it may become; on a CPU it takes what tokens were written to."""
    return untouched_zeros(shape, dtype) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)
