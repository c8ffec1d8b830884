"""Checks before any speed is told: greedy tokens next to those of the model in float32, and the divergence of logits.

The bounds tell a broken model from a rounded one, and judge no quality: of a wrong output hardly a token
agrees and the divergence is several nats, while rounding to 4 bits costs parts of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from infercomp.bench.work import Work
from infercomp.runtime.config import RuntimeConfig

CHECK_STEPS = 4
_BATCH = 16
_PROMPT_TOKENS = 64
# By bits of a weight: the least share of first tokens that must agree, the most nats of mean divergence.
LEAST_AGREEMENT = {32: 0.9, 16: 0.75, 8: 0.6, 4: 0.4}
MOST_NATS = {32: 1e-3, 16: 0.05, 8: 0.25, 4: 1.0}


@dataclass(frozen=True)
class Check:
    """How near one side is to the reference.

    ``first_tokens`` is the share of prompts whose first new token agrees, ``all_tokens`` that of new tokens
    before the first difference; ``mean_nats`` is known for infercomp only.
    """

    side: str
    weight_bits: int
    first_tokens: float
    all_tokens: float
    mean_nats: float | None = None

    @property
    def is_passed(self) -> bool:
        is_near = self.mean_nats is None or self.mean_nats <= MOST_NATS[self.weight_bits]
        return is_near and self.first_tokens >= LEAST_AGREEMENT[self.weight_bits]


def check_work(position_limit: int | None, runtime: RuntimeConfig) -> Work:
    """Prompts of the checks, as many and as long as the model and the options allow."""
    length = min(_PROMPT_TOKENS, (position_limit or 1 << 30) // 4)
    return Work(min(_BATCH, runtime.max_num_seqs), max(1, length), CHECK_STEPS)


def check_of(
    side: str,
    weight_bits: int,
    tokens: Sequence[Sequence[int]],
    reference: Sequence[Sequence[int]],
    mean_nats: float | None = None,
) -> Check:
    """Compare new tokens, a sequence a prompt, with the reference's."""
    pairs = list(zip(tokens, reference, strict=True))
    first = sum(ours[0] == theirs[0] for ours, theirs in pairs) / len(pairs)
    agreeing = sum(_common_prefix(ours, theirs) for ours, theirs in pairs)
    return Check(side, weight_bits, first, agreeing / sum(len(theirs) for _, theirs in pairs), mean_nats)


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b), len(left))
