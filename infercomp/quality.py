"""What a served model costs against a reference: how far its next-token distributions are from the reference's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from .bench.agreement import nats_of_tokens

Logits = Callable[[Sequence[int]], torch.Tensor]
"""Token ids -> teacher-forced logits [tokens, vocabulary], as ``LLM.logits`` gives them."""

# Rows of logits in float64 at a time: of 49,152 words, 25 MB a copy.
_ROWS = 64
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
    nats: list[torch.Tensor] = []
    agrees: list[torch.Tensor] = []
    losses: list[tuple[torch.Tensor, torch.Tensor]] = []
    for number, window in enumerate(windows):
        begin(f"window {number + 1}")
        for our_rows, their_rows, following in _rows(ours(window), reference(window), window):
            nats.append(nats_of_tokens(our_rows, their_rows))
            agrees.append((our_rows.argmax(-1) == their_rows.argmax(-1)).double())
            losses.append((_loss(our_rows, following), _loss(their_rows, following)))
    all_nats = torch.cat(nats)
    our_loss, their_loss = (float(torch.cat(each).mean()) for each in zip(*losses, strict=True))
    return Quality(
        num_tokens=len(all_nats),
        mean_nats=float(all_nats.mean()),
        p99_nats=float(all_nats.quantile(_REMARKABLE)),
        top_1=float(torch.cat(agrees).mean()),
        perplexity=math.exp(our_loss),
        reference_perplexity=math.exp(their_loss),
    )


def _rows(
    ours: torch.Tensor, theirs: torch.Tensor, window: Sequence[int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Some rows of both in float64, and the tokens that follow those that have a next one."""
    following = torch.as_tensor(window)[1:].to(ours.device)
    for start in range(0, len(ours), _ROWS):
        rows = slice(start, start + _ROWS)
        yield ours[rows].double(), theirs[rows].double(), following[rows]


def _loss(rows: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood in nats of each token that follows [tokens]."""
    known = rows[: len(following)]
    return known.logsumexp(-1) - known.gather(-1, following[:, None]).squeeze(-1)
