"""fuse_norm_gather: a norm writes its channels in the order in which they are read, if nothing reads them otherwise."""

from __future__ import annotations

import pytest
import torch
from fusions import fused, kernels
from small_llm import byte_model
from torch import nn

from infercomp import LLM, NM
from infercomp.codegen.ops import quantize_per_token

PASSES = ("fuse_linear_epilogue", "fuse_residual_norm", "fuse_norm_gather")


class Gathered(nn.Module):
    def __init__(self, *, dim: int = -1, is_read_twice: bool = False, quantizes: bool = False) -> None:
        super().__init__()
        self.norm, self.dim = nn.LayerNorm(16), dim
        self.is_read_twice, self.quantizes = is_read_twice, quantizes
        self.register_buffer("order", torch.tensor([2, 0, 1]) if dim == 0 else torch.randperm(16))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        residual = x + y
        rows = self.norm(residual)
        found = torch.index_select(rows, self.dim, self.order)
        if self.quantizes:
            return residual, *quantize_per_token(found, 8)
        return (residual, found, torch.tanh(rows)) if self.is_read_twice else (residual, found)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(3, 16), torch.randn(3, 16)


def test_fires() -> None:
    model_graph, record = fused(Gathered(), *inputs(), passes=PASSES)
    assert kernels(model_graph) == [["add", "layer_norm", "index_select"]]
    assert (record.matches, record.max_error) == (1, 0.0)


def test_what_is_quantised_behind_it_joins_too() -> None:
    model_graph, record = fused(Gathered(quantizes=True), *inputs(), passes=(*PASSES, "fuse_norm_quantize"))
    assert kernels(model_graph) == [["add", "layer_norm", "index_select", "quantize_per_token"]]
    assert (record.matches, record.max_error) == (1, 0.0)


@pytest.mark.parametrize("options", [{"dim": 0}, {"is_read_twice": True}])
def test_near_misses(options: dict[str, int]) -> None:
    model_graph, record = fused(Gathered(**options), *inputs(), passes=PASSES)  # type: ignore[arg-type]
    assert (kernels(model_graph), record.matches) == ([["add", "layer_norm"]], 0)
    assert len(record.near_misses) == 1


@pytest.mark.parametrize("quantization", [None, "w8a8"])
def test_kernels_of_a_sparse_model_are_its_definitions(quantization: str | None) -> None:
    tokens = list(range(3, 40))
    sparsity = NM(2, 4, permute="greedy")
    by_kernels, by_definitions, apart = (
        LLM(byte_model(), num_blocks=8, sparsity=sparsity, quantization=quantization, codegen=codegen, disable=disable)
        for codegen, disable in (("cpp", ()), ("reference", ()), ("cpp", ("fuse_norm_gather",)))
    )
    expected = by_definitions.logits(tokens)
    found = by_kernels.logits(tokens)
    assert (found - expected).norm() <= (1e-5 if quantization is None else 2e-2) * expected.norm()
    assert torch.equal(found, apart.logits(tokens))
    assert {record.name: record.matches for record in by_kernels.report.passes}["fuse_norm_gather"] == 4
