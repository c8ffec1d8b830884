"""One small module a kernel family, each of which becomes one kernel; their C++ texts are kept in golden/."""

from __future__ import annotations

import torch
from graph_testing import captured
from torch import Tensor, nn

from infercomp.codegen.grouping import Group, Planner
from infercomp.codegen.model_graph import ModelGraph
from infercomp.codegen.ops import (
    attention,
    group_weight_linear,
    int8_linear,
    linear,
    paged_attention,
    quantize_weight_groups,
    quantize_weight_int8,
    rms_norm,
    write_kv,
)
from infercomp.passes.config import PassConfig
from infercomp.passes.pipeline import run_pipeline
from infercomp.runtime.kv_pools import Pool

HEADS, KV_HEADS, HEAD_DIM, CHANNELS, OUTPUTS, TOKENS, GROUP = 4, 2, 16, 64, 48, 6, 32
BLOCKS, BLOCK_SIZE = 8, 16
Model = tuple[nn.Module, tuple[Tensor, ...]]


class Norm(nn.Module):
    """A reduction over each row."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CHANNELS))

    def forward(self, rows: Tensor) -> Tensor:
        return rms_norm(rows, self.weight, 1e-5)


class Product(nn.Module):
    """Rows times a weight of the given dtype, with a bias."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(OUTPUTS, CHANNELS).to(dtype))
        self.bias = nn.Parameter(torch.randn(OUTPUTS).to(dtype))

    def forward(self, rows: Tensor) -> Tensor:
        return linear(rows, self.weight, self.bias)


class Int8Product(nn.Module):
    """Quantised rows times an INT8 weight: sums of integers, scaled at the end."""

    def __init__(self) -> None:
        super().__init__()
        weight, scale = quantize_weight_int8(torch.randn(OUTPUTS, CHANNELS))
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, quantized: Tensor, scale: Tensor, sums: Tensor) -> Tensor:
        return int8_linear(quantized, scale, sums, self.weight, self.scale, None, torch.float32)


class Int4Product(nn.Module):
    """Rows times a 4-bit weight with a scale and a zero for every group of channels."""

    def __init__(self) -> None:
        super().__init__()
        packed, scale, zero = quantize_weight_groups(torch.randn(OUTPUTS, CHANNELS), 4, GROUP, False)
        self.register_buffer("weight", packed)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)

    def forward(self, rows: Tensor) -> Tensor:
        return group_weight_linear(rows, self.weight, self.scale, self.zero, None, 4, GROUP)


class Attention(nn.Module):
    """Causal attention over given keys."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(query, key, value, scale=0.25, is_causal=True)


class PagedAttention(nn.Module):
    """Attention of packed queries over a cache."""

    def forward(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, tables: Tensor, lengths: Tensor, starts: Tensor
    ) -> Tensor:
        return paged_attention(query, key_cache, value_cache, tables, lengths, starts, scale=0.25, tile=1)


class PagedAttentionOverCodes(nn.Module):
    """The same over a cache of int8."""

    def forward(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, key_scale: Tensor, value_scale: Tensor,
        tables: Tensor, lengths: Tensor, starts: Tensor,
    ) -> Tensor:  # fmt: skip
        operands = (query, key_cache, value_cache, tables, lengths, starts)
        return paged_attention(*operands, scale=0.25, tile=4, key_scale=key_scale, value_scale=value_scale)


class Write(nn.Module):
    """The place of a cache write, which only a pass puts into a graph."""

    def forward(self, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> Tensor:
        return key + value


class WriteCodes(nn.Module):
    """The same for a cache of int8."""

    def forward(
        self, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor, key_scale: Tensor,
        value_scale: Tensor,
    ) -> Tensor:  # fmt: skip
        return key + value


class SparseProduct(nn.Module):
    """Rows times a weight of which two in every four inputs are kept."""

    def __init__(self) -> None:
        super().__init__()
        kept = torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(CHANNELS // 4)
        self.weight = nn.Parameter(torch.randn(OUTPUTS, CHANNELS) * kept)

    def forward(self, rows: Tensor) -> Tensor:
        return nn.functional.linear(rows, self.weight)


def graph_of(name: str) -> ModelGraph:
    """The graph of one family, as the passes leave it."""
    torch.manual_seed(0)
    module, inputs = models()[name]
    model_graph = captured(module, *inputs)
    model_graph.frozen = True
    run_pipeline(model_graph, PassConfig())
    if name.startswith("write_kv"):
        (anchor,) = model_graph.calls(torch.ops.aten.add.Tensor)
        arguments = [model_graph.placeholder(each) for each in model_graph.input_names]
        scales = dict(zip(("key_scale", "value_scale"), arguments[5:], strict=False))
        with model_graph.inserting_before(anchor) as emit:
            emit(write_kv, *arguments[:5], 4 if scales else 1, **scales)
    return model_graph


def group_of(model_graph: ModelGraph) -> Group:
    """The group of a family: of a cache write the first of two, else the only one."""
    return Planner(model_graph).plan().groups[0]


def _caches() -> tuple[Tensor, Tensor]:
    key = torch.zeros(BLOCKS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, 1)
    return key, torch.zeros(BLOCKS, KV_HEADS, BLOCK_SIZE, HEAD_DIM, 1)


def _codes() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pools = [Pool(KV_HEADS, HEAD_DIM, 4, is_key) for is_key in (True, False)]
    key, value = (torch.zeros(pool.shape(BLOCKS, BLOCK_SIZE), dtype=torch.int8) for pool in pools)
    key_scale, value_scale = (torch.zeros(pool.scale_shape(BLOCKS, BLOCK_SIZE)) for pool in pools)
    return key, value, key_scale, value_scale


def models() -> dict[str, Model]:
    rows, keys = torch.randn(TOKENS, CHANNELS), torch.randn(TOKENS, KV_HEADS, HEAD_DIM)
    query = torch.randn(1, HEADS, TOKENS, HEAD_DIM)
    quantized = torch.ops.infercomp.quantize_per_token(rows, CHANNELS)
    placed = (torch.tensor([[0, 1]]), torch.tensor([TOKENS]), torch.tensor([0, TOKENS]))
    return {
        "loop_reduction": (Norm(), (rows,)),
        "write_kv": (Write(), (keys, keys.clone(), *_caches(), torch.arange(TOKENS))),
        "write_kv_int8": (WriteCodes(), (keys, keys.clone(), *_codes()[:2], torch.arange(TOKENS), *_codes()[2:])),
        "matmul_float32": (Product(torch.float32), (rows,)),
        "matmul_bfloat16": (Product(torch.bfloat16), (rows.bfloat16(),)),
        "matmul_int8": (Int8Product(), quantized),
        "matmul_sparse": (SparseProduct(), (rows,)),
        "matmul_int4": (Int4Product(), (rows,)),
        "attention": (Attention(), (query, keys.transpose(0, 1)[None], keys.transpose(0, 1)[None].clone())),
        "paged_attention": (PagedAttention(), (query[0].transpose(0, 1), *_caches(), *placed)),
        "paged_attention_int8": (PagedAttentionOverCodes(), (query[0].transpose(0, 1), *_codes(), *placed)),
    }
