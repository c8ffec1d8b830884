"""What the runtime may spend: cache blocks, tokens per step, sequences at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import ConfigError, InfercompError

MEBIBYTE = 1 << 20
LARGEST_COUNT = (1 << 31) - 1
LARGEST_BLOCK_SIZE = 4096
LARGEST_CACHE_BYTES = 1 << 50


def require_int(
    value: object,
    field: str,
    low: int,
    high: int,
    error: type[InfercompError] = ConfigError,
    remedy: str | None = None,
) -> int:
    """Return ``value`` if it is an ``int`` (no bool) in ``[low, high]``; raise ``error`` naming ``field`` otherwise."""
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return value
    raise error(
        f"{field} must be an integer from {low} to {high}, got {describe(value)}",
        remedy=remedy or f"pass {field} as an int between {low} and {high}",
        field=field,
    )


def require_number(
    value: object, field: str, in_words: str, *, low: float, high: float = math.inf, is_open: bool = True
) -> None:
    """Raise ConfigError unless ``value`` is finite, at most ``high``, and above ``low`` or, if closed, at least it."""
    number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if math.isfinite(number) and low <= number <= high and not (is_open and number == low):
        return
    raise ConfigError(f"{field} must be a number {in_words}, not {describe(value)}", field=field)


def describe(value: object) -> str:
    """A short text for an error: bounded in length whatever was passed (the repr of a huge int raises)."""
    kind = type(value).__name__
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str):
        return f"{value[:40]!r} (str)"
    if value is None or isinstance(value, (int, float)):
        return f"{value!r} ({kind})"
    return f"a value of type {kind}"


@dataclass(frozen=True)
class RuntimeConfig:
    """The budgets of one engine.

    block_size: tokens per cache block.
    num_blocks: blocks in the cache; ``None`` means as many as fit into ``kv_cache_bytes``.
    kv_cache_bytes: bytes for keys and values of all layers, used when ``num_blocks`` is ``None``.
    max_num_batched_tokens: tokens computed in one step; a longer prompt is computed in several steps.
    max_num_seqs: sequences in the running batch.
    max_model_len: prompt and output tokens of one sequence; ``None`` means the model's own limit.
    decode_graphs: whether decoding on a GPU with generated kernels replays CUDA graphs.
    """

    block_size: int = 16
    num_blocks: int | None = None
    kv_cache_bytes: int = 256 * MEBIBYTE
    max_num_batched_tokens: int = 512
    max_num_seqs: int = 64
    max_model_len: int | None = None
    decode_graphs: bool = True

    def __post_init__(self) -> None:
        require_int(self.block_size, "block_size", 1, LARGEST_BLOCK_SIZE)
        require_int(self.kv_cache_bytes, "kv_cache_bytes", 1, LARGEST_CACHE_BYTES)
        require_int(self.max_num_batched_tokens, "max_num_batched_tokens", 1, LARGEST_COUNT)
        require_int(self.max_num_seqs, "max_num_seqs", 1, LARGEST_COUNT)
        if self.num_blocks is not None:
            require_int(self.num_blocks, "num_blocks", 1, LARGEST_COUNT)
        if self.max_model_len is not None:
            require_int(self.max_model_len, "max_model_len", 2, LARGEST_COUNT)
