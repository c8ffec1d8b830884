"""What is asked for (``SamplingParams``), one sequence on its way (``Request``), what comes back (``RequestOutput``).

Names follow vLLM's offline API. No torch here: a request is integers and text.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from .config import LARGEST_COUNT, describe, require_int
from .errors import InfercompError, InputError

FinishReason = Literal["stop", "length", "abort", "error"]

LARGEST_N = 16
LARGEST_TEMPERATURE = 100.0
LARGEST_SEED = (1 << 63) - 1
MOST_STOP_STRINGS = 16
LONGEST_STOP_STRING = 256
MOST_STOP_TOKEN_IDS = 256


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when a sequence ends. Checked on construction; errors name the field.

    n: independent sequences for one prompt. temperature: 0 is greedy.
    top_k: 0 or -1 is off. top_p: in (0, 1], 1 is off. max_tokens: output tokens per sequence.
    stop: text that ends the sequence and is cut off; kept as a tuple.
    stop_token_ids: tokens that end the sequence, also under ``ignore_eos``; kept as a tuple.
    seed: sequence ``i`` of ``n`` uses ``seed + i``; ``None`` draws a fresh one.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int = 16
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        require_int(self.n, "n", 1, LARGEST_N, InputError)
        _require_number(self.temperature, "temperature")
        if not 0.0 <= self.temperature <= LARGEST_TEMPERATURE:
            raise _refuse("temperature", f"be between 0 (greedy) and {LARGEST_TEMPERATURE}", self.temperature)
        require_int(self.top_k, "top_k", -1, LARGEST_COUNT, InputError, "pass 0 (or -1) to switch top_k off")
        _require_number(self.top_p, "top_p")
        if not 0.0 < self.top_p <= 1.0:
            raise _refuse("top_p", "be above 0 and at most 1 (1 is off)", self.top_p)
        require_int(self.max_tokens, "max_tokens", 1, LARGEST_COUNT, InputError)
        object.__setattr__(self, "stop", _checked_stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _checked_stop_token_ids(self.stop_token_ids))
        if not isinstance(self.ignore_eos, bool):
            raise _refuse("ignore_eos", "be True or False", self.ignore_eos)
        if self.seed is not None:
            require_int(self.seed, "seed", 0, LARGEST_SEED, InputError, "leave seed out for a fresh one")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as a tuple, empty when there is none."""
        return tuple(self.stop or ())


def _refuse(field_name: str, must: str, value: object) -> InputError:
    return InputError(
        f"{field_name} must {must}, got {describe(value)}",
        remedy=f"pass another {field_name}, or leave it out for the default",
        field=field_name,
    )


def _require_number(value: object, field_name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _refuse(field_name, "be a number", value)


def _checked_stop_strings(stop: object) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else () if stop is None else stop
    if not isinstance(strings, (list, tuple)):
        raise _refuse("stop", "be a string or a list of strings", stop)
    if len(strings) > MOST_STOP_STRINGS:
        raise _refuse("stop", f"hold at most {MOST_STOP_STRINGS} strings", len(strings))
    for string in strings:
        if not isinstance(string, str):
            raise _refuse("stop", "hold only strings", string)
        if not 1 <= len(string) <= LONGEST_STOP_STRING:
            raise _refuse("stop", f"hold strings of 1 to {LONGEST_STOP_STRING} characters", string)
    return tuple(strings)


def _checked_stop_token_ids(token_ids: object) -> tuple[int, ...]:
    if token_ids is None:
        return ()
    if not isinstance(token_ids, (list, tuple, set, frozenset)):
        raise _refuse("stop_token_ids", "be a list of token ids", token_ids)
    if len(token_ids) > MOST_STOP_TOKEN_IDS:
        raise _refuse("stop_token_ids", f"hold at most {MOST_STOP_TOKEN_IDS} ids", len(token_ids))
    return tuple(require_int(token, "stop_token_ids", 0, LARGEST_COUNT, InputError) for token in token_ids)


def checked_prompt(prompt_token_ids: object, max_model_len: int, vocab_size: int | None = None) -> list[int]:
    """A copy of the prompt as a list of ints, or an ``InputError`` with field ``prompt``.

    The length is looked at first, so that an oversized prompt costs nothing.
    """
    if not isinstance(prompt_token_ids, (list, tuple)):
        raise _refuse_prompt(f"must be a list of token ids, got {describe(prompt_token_ids)}", "pass list[int]")
    num_tokens = len(prompt_token_ids)
    if num_tokens == 0:
        raise _refuse_prompt("is empty", "pass at least one token")
    if num_tokens > max_model_len - 1:
        raise _refuse_prompt(
            f"has {num_tokens} tokens; max_model_len={max_model_len} leaves room for at most {max_model_len - 1}",
            "shorten the prompt, or raise max_model_len",
        )
    limit = LARGEST_COUNT if vocab_size is None else vocab_size
    for index, token in enumerate(prompt_token_ids):
        if type(token) is not int or not 0 <= token < limit:
            raise _refuse_prompt(
                f"token {index} must be an int from 0 to {limit - 1}, got {describe(token)}",
                "encode the prompt with the tokenizer of this model",
            )
    return list(prompt_token_ids)


def _refuse_prompt(what: str, remedy: str) -> InputError:
    return InputError(f"prompt {what}", remedy=remedy, field="prompt")


class RequestStatus(enum.Enum):
    """Where a request is: in the waiting queue, in the running batch, or done."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """One sequence in the ledger: its tokens, how many of them are in the cache, and the blocks that hold them.

    There is no prefill and no decoding, only ``num_computed_tokens`` on its way to ``num_tokens``.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    block_ids: list[int] = field(default_factory=list)
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: InfercompError | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens known so far: prompt and output."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_wanted_tokens(self) -> int:
        """Known tokens whose keys and values are not in the cache yet."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Tokens at positions ``start`` to ``stop`` (not included), across prompt and output."""
        num_prompt = len(self.prompt_token_ids)
        prompt_part = self.prompt_token_ids[start:stop]
        return prompt_part + self.output_token_ids[max(0, start - num_prompt) : max(0, stop - num_prompt)]

    def advance(self, num_scheduled_tokens: int, sampled_token_id: int | None) -> None:
        """Settle one step: the sampled token, if any, is appended and the scheduled tokens count as cached."""
        # Appending first keeps an interrupt harmless: the step would be computed again into the same slots.
        if sampled_token_id is not None:
            self.output_token_ids.append(sampled_token_id)
        self.num_computed_tokens += num_scheduled_tokens


@dataclass(frozen=True)
class CompletionOutput:
    """One sequence as far as it has come; ``text`` leaves out what may still become a stop string."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: InfercompError | None = None


@dataclass(frozen=True)
class RequestOutput:
    """All sequences of one request, cumulative; ``finished`` when every one of them is."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
