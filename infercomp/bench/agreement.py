"""Whether outputs are those of the model: measured before any speed is."""

from __future__ import annotations

import torch


def nats_of_tokens(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Kullback–Leibler divergence of the reference's distribution from ours for each token, float64 [tokens].

    Both are [tokens, vocabulary].
    """
    ours, theirs = logits.double().log_softmax(-1), reference.double().log_softmax(-1)
    return (theirs.exp() * (theirs - ours)).sum(-1)


def divergence(logits: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """The mean and the largest divergence in nats, and agreement of the likeliest tokens; both [tokens, vocabulary]."""
    nats = nats_of_tokens(logits, reference)
    agrees = (logits.argmax(-1) == reference.argmax(-1)).double()
    return {"mean_nats": float(nats.mean()), "largest_nats": float(nats.max()), "top_1": float(agrees.mean())}
