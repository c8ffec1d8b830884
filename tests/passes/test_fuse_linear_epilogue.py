"""fuse_linear_epilogue: pointwise calls behind a linear join it as long as nothing else reads what lies between."""

from __future__ import annotations

import torch
from fusions import fused, kernels
from torch import nn

PASSES = ("fuse_gated_epilogue", "fuse_linear_epilogue")


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(8, 16)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return torch.tanh((residual + self.down(x)) * 0.5)


class TwoReaders(Residual):
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        y = self.down(x)
        return torch.cat([y, residual + y])


class Widened(Residual):
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.down(x)[:, None] + residual


class Between(Residual):
    """The residual itself is computed from the product."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        y = self.down(x)
        return y * y.sum(-1, keepdim=True)


def test_fires_on_a_whole_chain() -> None:
    model_graph, record = fused(Residual(), torch.randn(3, 8), torch.randn(3, 16), passes=PASSES)
    assert kernels(model_graph) == [["linear", "add", "mul", "tanh"]]
    assert (record.matches, record.max_error) == (3, 0.0)


def test_near_misses() -> None:
    for module, residual in (
        (TwoReaders(), torch.randn(3, 16)),
        (Widened(), torch.randn(3, 2, 16)),
        (Between(), torch.randn(3, 16)),
    ):
        model_graph, record = fused(module, torch.randn(3, 8), residual, passes=PASSES)
        assert (kernels(model_graph), record.matches) == ([], 0), type(module).__name__


def test_switched_off_in_the_middle() -> None:
    model_graph, record = fused(
        Residual(), torch.randn(3, 8), torch.randn(3, 16), passes=PASSES, disable=("fuse_linear_epilogue#1",)
    )
    assert kernels(model_graph) == [["linear", "add"]]
    assert record.skipped == 1
