"""The loop that turns requests into tokens: schedule, inputs, model, sample, settle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .block_pool import BlockPool
from .config import LARGEST_COUNT, RuntimeConfig, describe, require_int
from .detokenize import TextStream, Tokenizer
from .errors import InfercompError, InputError, NumericalError
from .request import CompletionOutput, FinishReason, Request, RequestOutput, SamplingParams, checked_prompt
from .sampler import make_generator, sample
from .scheduler import Schedule, Scheduler
from .step import StepInputs

StepModel = Callable[[StepInputs], torch.Tensor]


@dataclass
class EngineStats:
    """Counts since the engine was made."""

    num_steps: int = 0
    num_scheduled_tokens: int = 0
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    peak_used_blocks: int = 0


@dataclass(eq=False)
class _Sequence:
    """One of the ``n`` sequences of a request: its ledger entry, its randomness, its text."""

    group: _Group
    index: int
    request: Request
    generator: torch.Generator
    stream: TextStream


@dataclass(eq=False)
class _Group:
    """A request as the user made it."""

    request_id: str
    prompt: str | None
    sequences: list[_Sequence]


class Engine:
    """Serves many requests with one model.

    ``model`` takes ``StepInputs`` and returns logits [R, vocab] (floating), one row per entry of
    ``logits_indices``; keys and values it keeps itself, in pools of ``num_blocks`` blocks.

    If the model raises, ``step()`` may be called again: nothing was settled. After a
    ``KeyboardInterrupt`` at any other point, call ``abort_all()``.
    """

    def __init__(
        self,
        model: StepModel,
        config: RuntimeConfig,
        *,
        num_blocks: int,
        max_model_len: int,
        eos_token_ids: frozenset[int],
        tokenizer: Tokenizer | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.max_model_len = require_int(max_model_len, "max_model_len", 2, LARGEST_COUNT)
        self.eos_token_ids = frozenset(eos_token_ids)
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.scheduler = Scheduler(config, BlockPool(num_blocks), max_model_len)
        self.stats = EngineStats()
        self._groups: dict[str, _Group] = {}
        self._sequences: dict[str, _Sequence] = {}

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        prompt: str | None = None,
    ) -> None:
        """Queue a request, or raise ``InputError`` or ``CapacityError`` and leave the engine as it was."""
        self._require_new_id(request_id)
        token_ids = self.check_request(prompt_token_ids, params)
        group = _Group(request_id, prompt, [])
        group.sequences = [self._make_sequence(group, index, token_ids, params) for index in range(params.n)]
        self._groups[request_id] = group
        for sequence in group.sequences:
            self._sequences[sequence.request.request_id] = sequence
            self.scheduler.add(sequence.request)

    def check_request(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> list[int]:
        """The prompt as a list, or ``InputError`` or ``CapacityError`` if it could not be queued with these params."""
        if not isinstance(params, SamplingParams):
            raise InputError(
                f"params must be SamplingParams, got {describe(params)}",
                remedy="pass SamplingParams(...)",
                field="params",
            )
        if params.stop_strings and self.tokenizer is None:
            raise InputError(
                "stop strings need text, and this engine has no tokenizer",
                remedy="give the engine a tokenizer, or use stop_token_ids",
                field="stop",
            )
        token_ids = checked_prompt(prompt_token_ids, self.max_model_len, self.vocab_size)
        self.scheduler.require_capacity(len(token_ids), params.max_tokens)
        return token_ids

    def has_unfinished_requests(self) -> bool:
        return bool(self._groups)

    def step(self) -> list[RequestOutput]:
        """Compute one batch; returns the requests that got a token or ended, with all their output so far."""
        schedule = self.scheduler.schedule()
        if not schedule.scheduled:
            return []
        inputs = StepInputs.from_schedule(schedule, self.config.block_size)
        logits = self.model(inputs)
        tokens = self._sample(schedule, logits)
        return self._settle(schedule, tokens)

    def abort_request(self, request_id: str) -> RequestOutput | None:
        """End a request and free its blocks; returns its last output. An unknown or finished id is a no-op."""
        group = self._groups.get(request_id)
        if group is None:
            return None
        for sequence in group.sequences:
            if not sequence.request.is_finished:
                self._finish(sequence, "abort")
        return self._output(group)

    def abort_all(self) -> None:
        """End every request and free every block, whatever state an interrupt has left behind."""
        self.scheduler.abort_all()
        self._groups.clear()
        self._sequences.clear()

    def _require_new_id(self, request_id: object) -> None:
        if not isinstance(request_id, str) or not request_id:
            raise InputError(
                f"request_id must be a string that is not empty, got {describe(request_id)}",
                remedy="pass a unique str",
                field="request_id",
            )
        if request_id in self._groups:
            raise InputError(
                f"a request with id {request_id!r} is in progress",
                remedy="choose an id that is unique among unfinished requests",
                field="request_id",
            )

    def _make_sequence(self, group: _Group, index: int, token_ids: list[int], params: SamplingParams) -> _Sequence:
        seed = None if params.seed is None else params.seed + index
        # The index comes after the last slash, so no two users' ids can meet here.
        request = Request(f"{group.request_id}/{index}", token_ids, params)
        return _Sequence(group, index, request, make_generator(seed), TextStream(self.tokenizer, params.stop_strings))

    def _sample(self, schedule: Schedule, logits: torch.Tensor) -> list[int | NumericalError]:
        """One token or error per sampled request, in the order of the schedule."""
        sequences = [self._sequences[item.request.request_id] for item in schedule.sampled]
        if logits.dim() != 2 or logits.shape[0] != len(sequences):
            raise InfercompError(
                f"the model returned logits of shape {list(logits.shape)}, expected [{len(sequences)}, vocab]",
                remedy="return one row per entry of StepInputs.logits_indices",
                field="logits",
            )
        if not sequences:
            return []
        return sample(logits, [s.request.params for s in sequences], [s.generator for s in sequences])

    def _settle(self, schedule: Schedule, tokens: list[int | NumericalError]) -> list[RequestOutput]:
        self._count(schedule)
        token_of = dict(zip((item.request.request_id for item in schedule.sampled), tokens, strict=True))
        advanced: dict[str, _Group] = {}
        for item in schedule.scheduled:
            request = item.request
            sequence = self._sequences[request.request_id]
            token = token_of.get(request.request_id)
            if isinstance(token, NumericalError):
                request.error = token
                self._finish(sequence, "error")
            else:
                request.advance(item.num_scheduled_tokens, token)
                if token is not None:
                    self._settle_token(sequence, token)
            if token is not None:
                advanced[sequence.group.request_id] = sequence.group
        return [self._output(group) for group in advanced.values()]

    def _settle_token(self, sequence: _Sequence, token: int) -> None:
        """Add the token's text and end the sequence if this token ends it. The text of a stop token is left out."""
        request, params = sequence.request, sequence.request.params
        if token in self.eos_token_ids and not params.ignore_eos:
            self._finish(sequence, "stop")
        elif token in (params.stop_token_ids or ()):
            request.stop_reason = token
            self._finish(sequence, "stop")
        else:
            sequence.stream.append(token)
            is_full = request.num_output_tokens >= params.max_tokens or request.num_tokens >= self.max_model_len
            if sequence.stream.matched_stop is not None:
                self._finish(sequence, "stop")
            elif is_full:
                self._finish(sequence, "length")

    def _finish(self, sequence: _Sequence, reason: FinishReason) -> None:
        request = sequence.request
        sequence.stream.flush()
        # The flush may complete a stop string; an abort or an error stays what it is.
        if sequence.stream.matched_stop is not None and reason in ("stop", "length") and request.stop_reason is None:
            request.stop_reason, reason = sequence.stream.matched_stop, "stop"
        self.scheduler.finish(request, reason)
        del self._sequences[request.request_id]
        if all(other.request.is_finished for other in sequence.group.sequences):
            del self._groups[sequence.group.request_id]

    def _output(self, group: _Group) -> RequestOutput:
        outputs = [
            CompletionOutput(
                index=sequence.index,
                text=sequence.stream.text,
                token_ids=list(sequence.request.output_token_ids),
                finish_reason=sequence.request.finish_reason,
                stop_reason=sequence.request.stop_reason,
                error=sequence.request.error,
            )
            for sequence in group.sequences
        ]
        finished = all(sequence.request.is_finished for sequence in group.sequences)
        prompt_token_ids = list(group.sequences[0].request.prompt_token_ids)
        return RequestOutput(group.request_id, group.prompt, prompt_token_ids, outputs, finished)

    def _count(self, schedule: Schedule) -> None:
        stats = self.stats
        stats.num_steps += 1
        stats.num_scheduled_tokens += schedule.num_scheduled_tokens
        stats.num_generated_tokens += len(schedule.sampled)
        stats.num_preemptions = self.scheduler.num_preemptions
        stats.peak_used_blocks = max(stats.peak_used_blocks, self.scheduler.pool.num_used_blocks)
