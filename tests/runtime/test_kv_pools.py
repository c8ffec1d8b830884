"""Sizes and names of the cache tensors."""

from __future__ import annotations

import pytest
import torch

from infercomp.runtime.config import RuntimeConfig
from infercomp.runtime.errors import ConfigError
from infercomp.runtime.kv_pools import KvCacheSpec, allocate_pools, bytes_per_block, num_blocks_for

SPECS = (
    KvCacheSpec("layer_0", num_kv_heads=2, head_dim=8, value_head_dim=4, dtype=torch.float32),
    KvCacheSpec("layer_1", num_kv_heads=1, head_dim=16, value_head_dim=16, dtype=torch.bfloat16),
)


def test_bytes_per_block_is_what_the_tensors_take() -> None:
    pools = allocate_pools(SPECS, num_blocks=5, block_size=16)
    assert sum(pool.nbytes for pool in pools.values()) == 5 * bytes_per_block(SPECS, 16)
    assert bytes_per_block(SPECS, 16) == 16 * (2 * 12 * 4 + 1 * 32 * 2)


def test_pools_are_named_and_shaped_per_layer() -> None:
    pools = allocate_pools(SPECS, num_blocks=5, block_size=16)
    assert {name: tuple(pool.shape) for name, pool in pools.items()} == {
        "layer_0_key": (5, 16, 2, 8),
        "layer_0_value": (5, 16, 2, 4),
        "layer_1_key": (5, 16, 1, 16),
        "layer_1_value": (5, 16, 1, 16),
    }
    assert pools["layer_1_key"].dtype is torch.bfloat16
    assert all(not pool.any() for pool in pools.values())


def test_codes_have_scales_beside_them() -> None:
    specs = [KvCacheSpec("layer_0", 2, 8, 4, torch.bfloat16, tile, is_int8=True) for tile in (0, 4)]
    rows, tiled = (allocate_pools([spec], num_blocks=5, block_size=16) for spec in specs)
    assert {name: (tuple(pool.shape), pool.dtype) for name, pool in rows.items()} == {
        "layer_0_key": ((5, 16, 2, 8), torch.int8),
        "layer_0_key_scale": ((5, 16, 2), torch.float32),
        "layer_0_value": ((5, 16, 2, 4), torch.int8),
        "layer_0_value_scale": ((5, 16, 2), torch.float32),
    }
    assert {name: tuple(pool.shape) for name, pool in tiled.items()} == {
        "layer_0_key": (5, 2, 2, 16, 4),
        "layer_0_key_scale": (5, 2, 16),
        "layer_0_value": (5, 2, 4, 4, 4),
        "layer_0_value_scale": (5, 2, 16),
    }
    for pools, spec in zip((rows, tiled), specs, strict=True):
        assert sum(pool.nbytes for pool in pools.values()) == 5 * bytes_per_block([spec], 16)
    assert specs[0].bytes_per_token == 2 * (8 + 4) + 2 * 2 * 4


def test_the_budget_buys_whole_blocks() -> None:
    num_bytes = bytes_per_block(SPECS, 16)
    assert num_blocks_for(SPECS, RuntimeConfig(kv_cache_bytes=3 * num_bytes + 1)) == 3
    assert num_blocks_for(SPECS, RuntimeConfig(kv_cache_bytes=1, num_blocks=7)) == 7


def test_a_budget_below_one_block_says_what_is_needed() -> None:
    with pytest.raises(ConfigError) as caught:
        num_blocks_for(SPECS, RuntimeConfig(kv_cache_bytes=100))
    assert caught.value.field == "kv_cache_bytes"
    assert str(bytes_per_block(SPECS, 16)) in str(caught.value)


def test_no_layers_and_equal_names_are_errors() -> None:
    with pytest.raises(ConfigError):
        num_blocks_for((), RuntimeConfig())
    with pytest.raises(ConfigError):
        allocate_pools((SPECS[0], SPECS[0]), 2, 16)
