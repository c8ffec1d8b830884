"""Compile one transformer block with ``torch.compile`` and see what was made of it.

The block is plain PyTorch and knows nothing of infercomp. Run it: ``python examples/compile_a_block.py``
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import infercomp

WIDTH, NUM_HEADS = 32, 4


class Block(nn.Module):
    """Pre-norm causal attention and a gated MLP, spelled out as models spell them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.output = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, S, D] -> [B, S, D]."""
        h = self.norm(x)
        heads = [
            layer(h).unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        ]
        query, key, value = heads  # each [B, H, S, D / H]
        scores = query @ key.transpose(-1, -2) / (WIDTH // NUM_HEADS) ** 0.5
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        attended = F.softmax(scores.masked_fill(future, -torch.inf), dim=-1) @ value
        x = x + self.output(attended.transpose(1, 2).flatten(-2))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def _split_heads(x: torch.Tensor) -> torch.Tensor:
    """[B, S, D] -> [B, H, S, D / H]"""
    return x.unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2)


def main() -> None:
    torch.manual_seed(0)
    block = Block().eval()
    compiled = torch.compile(block, backend="infercomp")
    with torch.inference_mode():
        for length in (5, 9, 17):
            x = torch.randn(2, length, WIDTH)
            difference = (compiled(x) - block(x)).abs().max().item()
            print(f"length {length}: differs from eager by at most {difference:.1e}")
            assert difference < 1e-5
    report = infercomp.explain(block, torch.randn(2, 5, WIDTH))
    print(report)
    assert report.matches_of("recognize_attention") == 1


if __name__ == "__main__":
    main()
