"""What a served model costs against a reference: how far its next-token distributions are from the reference's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .bench.agreement import nats_of_tokens

Logits = Callable[[Sequence[int]], torch.Tensor]
"""Token ids -> teacher-forced logits [tokens, vocabulary], as ``LLM.logits`` gives them."""

# Rows of logits in float64 at a time: of 49,152 words, 6 MB a copy.
_ROWS = 16
_REMARKABLE = 0.99


@dataclass(frozen=True)
class Quality:
    """Measured over ``num_tokens`` tokens, teacher-forced, in windows that know nothing of each other.

    ``mean_nats`` and ``p99_nats`` are the mean and the 99th percentile over tokens of the Kullback–Leibler divergence
    of the reference's next-token distribution from ours; ``top_1`` the share of tokens whose likeliest successor is
    the same; perplexities are of the text's own next tokens, the last token of a window having none.
    """

    num_tokens: int
    mean_nats: float
    p99_nats: float
    top_1: float
    perplexity: float
    reference_perplexity: float


def measure_quality(
    ours: Logits,
    reference: Logits,
    windows: Sequence[Sequence[int]],
    begin: Callable[[str], None] = lambda name: None,
) -> Quality:
    """Compare two models on windows of two tokens or more; memory holds the logits of one window.

    ``begin`` is told of each window before it is computed.
    """
    num_tokens = sum(map(len, windows))
    # In place: small tensors between the large ones would keep the memory of those from being used again.
    figures, has_next = torch.zeros(4, num_tokens, dtype=torch.float64), torch.ones(num_tokens, dtype=torch.bool)
    start = 0
    for number, window in enumerate(windows):
        begin(f"window {number + 1}")
        end = start + len(window)
        _measure_window(figures[:, start:end], ours(window), reference(window), torch.as_tensor(window)[1:])
        has_next[end - 1] = False
        start = end
    nats, agrees, our_loss, their_loss = figures
    return Quality(
        num_tokens=num_tokens,
        mean_nats=float(nats.mean()),
        p99_nats=float(nats.quantile(_REMARKABLE)),
        top_1=float(agrees.mean()),
        perplexity=math.exp(our_loss[has_next].mean()),
        reference_perplexity=math.exp(their_loss[has_next].mean()),
    )


def _measure_window(
    figures: torch.Tensor, ours: torch.Tensor, reference: torch.Tensor, following: torch.Tensor
) -> None:
    """Fill divergence, agreement, our loss and the reference's [4, tokens]; the last token has no loss."""
    for start in range(0, len(ours), _ROWS):
        rows = slice(start, start + _ROWS)
        known = slice(start, min(start + _ROWS, len(following)))
        our_rows, their_rows = ours[rows].double(), reference[rows].double()
        next_tokens = following[known].to(ours.device)
        figures[0, rows] = nats_of_tokens(our_rows, their_rows)
        figures[1, rows] = (our_rows.argmax(-1) == their_rows.argmax(-1)).double()
        figures[2, known] = _loss(our_rows, next_tokens)
        figures[3, known] = _loss(their_rows, next_tokens)


def _loss(rows: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood in nats of each token that follows [tokens]."""
    known = rows[: len(following)]
    return known.logsumexp(-1) - known.gather(-1, following[:, None]).squeeze(-1)
