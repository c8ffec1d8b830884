"""What is measured: prompts to compute and steps to decode, and the cache that they need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from infercomp.runtime.config import RuntimeConfig
from infercomp.runtime.errors import ConfigError

PROMPT_TOKENS = 128
"""Length of the prompts that decoding starts from."""


@dataclass(frozen=True)
class Work:
    """One measured thing: ``num_steps`` steps after ``batch`` prompts of ``prompt_tokens``, or (0 steps) one prompt."""

    batch: int
    prompt_tokens: int
    num_steps: int = 0

    @property
    def name(self) -> str:
        return f"decode {self.batch}" if self.num_steps else f"prefill {self.prompt_tokens}"

    @property
    def num_timed_tokens(self) -> int:
        return self.batch * self.num_steps or self.prompt_tokens

    def prompts(self, text: Sequence[int]) -> list[list[int]]:
        """Different pieces of ``text``, one for each sequence, taken from its beginning again where it ends."""
        size = self.prompt_tokens
        return [[text[(i * size + j) % len(text)] for j in range(size)] for i in range(self.batch)]


def parse_counts(text: str, field: str) -> list[int]:
    """``"1,8,32"`` as integers; nothing where the text is empty. Raises ConfigError for anything else."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and 0 < int(part) <= 1 << 20 for part in parts):
        raise ConfigError(
            f"{field} takes positive numbers with commas between them, not {text[:40]!r}",
            field=field,
            remedy=f"for example --{field} 1,8",
        )
    return list(dict.fromkeys(map(int, parts)))


def require_batches(decode: Sequence[int], runtime: RuntimeConfig) -> None:
    """Raise ConfigError where a batch is larger than ``max_num_seqs``."""
    if decode and max(decode) > runtime.max_num_seqs:
        raise ConfigError(
            f"max_num_seqs={runtime.max_num_seqs} is less than the batch of {max(decode)}",
            field="decode",
            remedy=f"use --option max_num_seqs={max(decode)}, or smaller batches",
        )


def plan_work(
    decode: Sequence[int], prefill: Sequence[int], num_steps: int, position_limit: int | None, runtime: RuntimeConfig
) -> tuple[list[Work], list[str]]:
    """The work that the model's positions allow, and what was left out or shortened, in words."""
    notes: list[str] = []
    limit = position_limit or 1 << 30
    work = []
    for batch in decode:
        slack = most_new_tokens(batch * PROMPT_TOKENS, num_steps, runtime.max_num_batched_tokens)
        length = min(PROMPT_TOKENS, limit - slack)
        if length < 1:
            notes.append(f"decode {batch} is left out: {num_steps} steps do not fit into {limit} positions")
            continue
        if length < PROMPT_TOKENS:
            notes.append(f"decode {batch} starts from {length} tokens: the model has {limit} positions")
        work.append(Work(batch, length, num_steps))
    for length in prefill:
        if length < limit:
            work.append(Work(1, length))
        else:
            notes.append(f"prefill {length} is left out: the model has {limit} positions")
    return work, notes


def most_new_tokens(num_prompt_tokens: int, num_steps: int, max_num_batched_tokens: int) -> int:
    """Tokens that the first sequence of a batch may get until the last has had ``num_steps`` steps of decoding."""
    return num_steps + 4 + 2 * -(-num_prompt_tokens // max_num_batched_tokens)


def blocks_needed(work: Sequence[Work], at_least_tokens: int, runtime: RuntimeConfig) -> int:
    """Blocks of the cache that the largest of ``work`` needs, or one sequence of ``at_least_tokens``."""

    def blocks(num_tokens: int) -> int:
        return -(-num_tokens // runtime.block_size)

    needed = [blocks(at_least_tokens)]
    for each in work:
        new = most_new_tokens(each.batch * each.prompt_tokens, each.num_steps, runtime.max_num_batched_tokens)
        needed.append(each.batch * blocks(each.prompt_tokens + new))
    return max(needed)
