"""fuse_gated_epilogue: the gated activation joins the merged gate/up product, and nothing else does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from fusions import fused, kernels
from torch import nn


class GatedMlp(nn.Module):
    def __init__(self, *, returns_gate: bool = False) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(8, 32, bias=False), nn.Linear(8, 32, bias=False)
        self.returns_gate = returns_gate

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        gate = self.gate(x)
        y = F.silu(gate) * self.up(x)
        return (y, gate) if self.returns_gate else y


def test_fires() -> None:
    model_graph, record = fused(GatedMlp(), torch.randn(3, 8), passes=("fuse_gated_epilogue",))
    assert kernels(model_graph) == [["linear", "gated_activation"]]
    assert (record.matches, record.max_error) == (1, 0.0)


def test_a_product_that_is_read_elsewhere_stays_alone() -> None:
    model_graph, record = fused(GatedMlp(returns_gate=True), torch.randn(3, 8), passes=("fuse_gated_epilogue",))
    assert kernels(model_graph) == []
    assert "also read elsewhere" in record.near_misses[0].reason


def test_gate_and_up_of_two_products_stay_apart() -> None:
    model_graph, record = fused(
        GatedMlp(), torch.randn(3, 8), passes=("fuse_gated_epilogue",), disable=("merge_linears",)
    )
    assert kernels(model_graph) == []
    assert "not two halves" in record.near_misses[0].reason


def test_switched_off() -> None:
    model_graph, record = fused(
        GatedMlp(), torch.randn(3, 8), passes=("fuse_gated_epilogue",), disable=("fuse_gated_epilogue#0",)
    )
    assert (kernels(model_graph), record.matches, record.skipped) == ([], 0, 1)
