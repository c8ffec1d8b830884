"""fuse_residual_norm: an addition that no product has taken joins the norm behind it."""

from __future__ import annotations

import torch
from fusions import fused, kernels
from torch import nn

PASSES = ("fuse_gated_epilogue", "fuse_linear_epilogue", "fuse_residual_norm")


class AddNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = x + y
        return h, self.norm(h)


class ProductNorm(AddNorm):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = x + self.down(y)
        return h, self.norm(h)


class MulNorm(AddNorm):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = x * y
        return h, self.norm(h)


def _inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(3, 16), torch.randn(3, 16)


def test_fires() -> None:
    model_graph, record = fused(AddNorm(), *_inputs(), passes=PASSES)
    assert kernels(model_graph) == [["add", "layer_norm"]]
    assert (record.matches, record.max_error) == (1, 0.0)


def test_an_addition_that_a_product_has_taken() -> None:
    model_graph, record = fused(ProductNorm(), *_inputs(), passes=PASSES)
    assert kernels(model_graph) == [["linear", "add"]]
    assert record.matches == 0
    assert "kernel of" in record.near_misses[0].reason


def test_a_product_is_no_residual() -> None:
    model_graph, record = fused(MulNorm(), *_inputs(), passes=PASSES)
    assert (kernels(model_graph), record.matches) == ([], 0)
