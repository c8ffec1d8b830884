"""Whether outputs are those of the model: measured before any speed is."""

from __future__ import annotations

import torch


def divergence(logits: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Kullback–Leibler divergence in nats and agreement of the likeliest tokens; both [tokens, vocabulary].

    The divergence is that of the reference's distribution from ours: the mean over tokens, and the largest.
    """
    ours, theirs = logits.double().log_softmax(-1), reference.double().log_softmax(-1)
    nats = (theirs.exp() * (theirs - ours)).sum(-1)
    agrees = (ours.argmax(-1) == theirs.argmax(-1)).double()
    return {"mean_nats": float(nats.mean()), "largest_nats": float(nats.max()), "top_1": float(agrees.mean())}
