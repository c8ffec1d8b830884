"""fuse_embedding_norm: the gather of embeddings joins the norm that reads it."""

from __future__ import annotations

import torch
from fusions import fused, kernels
from torch import nn


class Embedded(nn.Module):
    def __init__(self, *, is_scaled: bool = False) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(11, 16), nn.LayerNorm(16)
        self.is_scaled = is_scaled

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.table(ids)
        x = x * 4.0 if self.is_scaled else x
        return x, self.norm(x)


IDS = torch.tensor([[1, 10, 0, 3]])


def test_fires() -> None:
    model_graph, record = fused(Embedded(), IDS, passes=("fuse_embedding_norm",))
    assert kernels(model_graph) == [["embedding", "layer_norm"]]
    assert (record.matches, record.max_error) == (1, 0.0)


def test_a_call_between_keeps_them_apart() -> None:
    model_graph, record = fused(Embedded(is_scaled=True), IDS, passes=("fuse_embedding_norm",))
    assert (kernels(model_graph), record.matches) == ([], 0)
