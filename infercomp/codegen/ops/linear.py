"""Linear layers, gated activations, and the one op that rewrites weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .op import compute_dtype, like_first, op


def _fake_linear(input: torch.Tensor, weight: torch.Tensor, *_, transposed: bool = False):  # type: ignore[no-untyped-def]
    return input.new_empty(*input.shape[:-1], weight.shape[1 if transposed else 0])


@op("linear(Tensor input, Tensor weight, Tensor? bias=None, *, bool transposed=False) -> Tensor", fake=_fake_linear)
def linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, transposed: bool = False
) -> torch.Tensor:
    """input [..., K] times weight [N, K] (or [K, N] if ``transposed``, GPT-2's layout) plus bias [N] -> [..., N]."""
    return F.linear(input, weight.t() if transposed else weight, bias)


ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}


@op("gated_activation(Tensor gate, Tensor up, str activation) -> Tensor", fake=like_first)
def gated_activation(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(gate) * up (Shazeer 2020), both [..., N]; activation is a key of ACTIVATIONS."""
    dtype = compute_dtype(gate)
    return (ACTIVATIONS[activation](gate.to(dtype)) * up.to(dtype)).to(gate.dtype)


@op("merge_weights(Tensor[] weights, int dim=0) -> Tensor")
def merge_weights(weights: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """Weights of linears that share an input, laid end to end. Evaluated once, when weights are bound:
    the originals then become views of the result, so that no second copy is kept."""
    return torch.cat(weights, dim)
