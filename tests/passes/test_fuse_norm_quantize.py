"""fuse_norm_quantize: the quantisation of a norm's rows joins the norm, that of a product's rows stays alone."""

from __future__ import annotations

import torch
from fusions import fused, kernels
from torch import nn

from infercomp.codegen.ops import quantize_per_token

PASSES = ("fuse_gated_epilogue", "fuse_linear_epilogue", "fuse_residual_norm", "fuse_norm_quantize")


class Quantized(nn.Module):
    def __init__(self, *, between: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.between = nn.LayerNorm(16), between

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.norm(x)
        if self.between is not None:
            y = self.between(y)
        return quantize_per_token(y, 8)


def test_fires() -> None:
    model_graph, record = fused(Quantized(), torch.randn(3, 16), passes=PASSES)
    assert kernels(model_graph) == [["layer_norm", "quantize_per_token"]]
    assert (record.matches, record.max_error) == (1, 0.0)


def test_near_misses() -> None:
    for between in (nn.Linear(16, 16), nn.Tanh()):
        model_graph, record = fused(Quantized(between=between), torch.randn(3, 16), passes=PASSES)
        assert (kernels(model_graph), record.matches) == ([], 0), between
