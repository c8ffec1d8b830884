"""The whole loop with a model that is a pure function of its prefix (``paged_hash_model``)."""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Callable
from itertools import pairwise
from types import FrameType
from typing import Any

import pytest
import torch
from paged_hash_model import (
    EOS,
    GREEDY,
    MAX_MODEL_LEN,
    VOCAB_SIZE,
    PagedHashModel,
    make_engine,
    oracle,
    run_to_end,
    simulate,
)

from infercomp.runtime import engine as engine_module
from infercomp.runtime.block_pool import BlockPool
from infercomp.runtime.errors import CapacityError, InfercompError, InputError, NumericalError
from infercomp.runtime.request import Request, RequestOutput, SamplingParams
from infercomp.runtime.scheduler import Schedule, ScheduledRequest, Scheduler
from infercomp.runtime.step import StepInputs


def test_every_output_equals_the_oracle() -> None:
    fresh_seed = random.SystemRandom().randrange(1 << 32)
    print(f"fresh seed: {fresh_seed}")
    engines = [simulate(seed) for seed in (*range(40), fresh_seed)]
    assert sum(engine.stats.num_preemptions for engine in engines) > 20, "the cache was never short"
    assert sum(engine.stats.num_generated_tokens for engine in engines) > 2000
    assert all(engine.stats.peak_used_blocks <= engine.scheduler.pool.num_blocks for engine in engines)


def test_a_queue_far_longer_than_the_cache_drains_without_thrashing() -> None:
    """200 requests, 8 blocks: all end right, and recomputation after preemptions costs less than the work itself."""
    dice = random.Random(0)
    engine = make_engine(num_blocks=8, block_size=4, budget=16)
    prompts = {f"r{index}": [dice.randrange(VOCAB_SIZE) for _ in range(dice.randint(1, 16))] for index in range(200)}
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    for request_id, prompt in prompts.items():
        engine.add_request(request_id, prompt, params)
    finished = run_to_end(engine)
    assert all(finished[r].outputs[0].token_ids == oracle(prompt, params)[0] for r, prompt in prompts.items())
    num_needed_tokens = sum(len(prompt) + 15 for prompt in prompts.values())
    assert engine.stats.num_preemptions > 0
    assert num_needed_tokens < engine.stats.num_scheduled_tokens < 2 * num_needed_tokens


def shifted_slots(inputs: StepInputs) -> StepInputs:
    """Planted bug: tokens are written one slot too far."""
    return dataclasses.replace(inputs, slot_mapping=(inputs.slot_mapping + 1) % (int(inputs.slot_mapping.max()) + 1))


def shifted_rows(inputs: StepInputs) -> StepInputs:
    """Planted bug: the row before the last is sampled."""
    return dataclasses.replace(inputs, logits_indices=(inputs.logits_indices - 1).clamp(min=0))


def rolled_tables(inputs: StepInputs) -> StepInputs:
    """Planted bug: requests read each other's blocks."""
    return dataclasses.replace(inputs, block_tables=inputs.block_tables.roll(1, dims=0))


def shifted_positions(inputs: StepInputs) -> StepInputs:
    """Planted bug: positions count from one."""
    return dataclasses.replace(inputs, positions=inputs.positions + 1)


@pytest.mark.parametrize("bug", [shifted_slots, shifted_rows, rolled_tables, shifted_positions])
def test_planted_bugs_in_the_inputs_show(bug: Callable[[StepInputs], StepInputs], monkeypatch: Any) -> None:
    right = StepInputs.from_schedule

    class Wrong:
        @staticmethod
        def from_schedule(schedule: Schedule, block_size: int) -> StepInputs:
            return bug(right(schedule, block_size))

    monkeypatch.setattr(engine_module, "StepInputs", Wrong)
    with pytest.raises(AssertionError):
        for seed in range(10):
            simulate(seed)


class ReusesOwnedBlocks(BlockPool):
    """Planted bug: the last block handed out is also put back into the free list."""

    def allocate(self, num_wanted: int) -> list[int]:
        block_ids = super().allocate(num_wanted)
        if len(block_ids) > 1:
            self._free_block_ids.appendleft(block_ids[-1])
        return block_ids


class KeepsComputedTokens(Scheduler):
    """Planted bug: after preemption the tokens count as cached although their blocks are gone."""

    def _preempt(self, victim: Request) -> None:
        num_computed_tokens = victim.num_computed_tokens
        super()._preempt(victim)
        victim.num_computed_tokens = num_computed_tokens - 1


class KeepsStaleBlocks(Scheduler):
    """Planted bug: preemption frees the blocks but the request goes on using them."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.stale_block_ids: dict[str, list[int]] = {}

    def _preempt(self, victim: Request) -> None:
        self.stale_block_ids[victim.request_id] = list(victim.block_ids)
        super()._preempt(victim)

    def _admit_waiting(self, num_budget: int) -> list[ScheduledRequest]:
        items = super()._admit_waiting(num_budget)
        for request in (item.request for item in items):
            stale = self.stale_block_ids.get(request.request_id, [])
            request.block_ids = stale + request.block_ids[len(stale) :]
        return items


@pytest.mark.parametrize(
    ("name", "planted", "symptom"),
    [
        ("BlockPool", ReusesOwnedBlocks, "oracle"),
        ("Scheduler", KeepsComputedTokens, "oracle"),
        ("Scheduler", KeepsStaleBlocks, "has 0 owners"),
    ],
)
def test_planted_bugs_in_the_ledger_show(name: str, planted: type, symptom: str, monkeypatch: Any) -> None:
    """Even with the integrity checks off: in the tokens themselves, or when a block is freed twice."""
    monkeypatch.setattr(engine_module, name, planted)
    monkeypatch.setattr(Scheduler, "check_integrity", lambda self: None)
    with pytest.raises((AssertionError, InfercompError)) as caught:
        for seed in range(40):
            simulate(seed)
    assert symptom in str(caught.value)


def test_chunks_and_batches_do_not_change_a_sampled_output() -> None:
    params = SamplingParams(temperature=30.0, seed=5, max_tokens=20, n=3, ignore_eos=True)
    outputs = []
    for budget, num_neighbours in ((64, 0), (1, 0), (5, 4)):
        engine = make_engine(num_blocks=16, budget=budget)
        for neighbour in range(num_neighbours):
            engine.add_request(f"neighbour {neighbour}", [neighbour] * 7, GREEDY)
        engine.add_request("asked", list(range(1, 11)), params)
        outputs.append([completion.token_ids for completion in run_to_end(engine)["asked"].outputs])
    assert outputs[0] == outputs[1] == outputs[2]
    assert len({tuple(tokens) for tokens in outputs[0]}) == 3, "the n sequences are not independent"


def test_sequence_i_uses_seed_plus_i() -> None:
    params = SamplingParams(temperature=30.0, seed=5, max_tokens=6, ignore_eos=True)
    engine = make_engine()
    engine.add_request("three", [1, 2], dataclasses.replace(params, n=3))
    engine.add_request("second", [1, 2], dataclasses.replace(params, seed=6))
    finished = run_to_end(engine)
    assert finished["three"].outputs[1].token_ids == finished["second"].outputs[0].token_ids
    assert [completion.index for completion in finished["three"].outputs] == [0, 1, 2]


def test_max_model_len_ends_with_length() -> None:
    engine = make_engine(num_blocks=12)
    engine.add_request("long", list(range(1, 41)), SamplingParams(temperature=0.0, max_tokens=500, ignore_eos=True))
    completion = run_to_end(engine)["long"].outputs[0]
    assert completion.finish_reason == "length" and len(completion.token_ids) == MAX_MODEL_LEN - 40


def test_a_stop_token_ends_and_is_named() -> None:
    stop = oracle([3, 4], GREEDY)[0][2]
    engine = make_engine()
    engine.add_request("a", [3, 4], SamplingParams(temperature=0.0, stop_token_ids=[stop], ignore_eos=True))
    completion = run_to_end(engine)["a"].outputs[0]
    assert (completion.finish_reason, completion.stop_reason, completion.token_ids[-1]) == ("stop", stop, stop)


def test_a_nan_row_ends_its_own_request_only() -> None:
    engine = make_engine(num_blocks=24)
    engine.model.poisoned_token = 96  # type: ignore[attr-defined]
    prompts = {"a": [1, 2, 3], "bad": [4, 96], "c": [5, 6]}
    for request_id, prompt in prompts.items():
        engine.add_request(request_id, prompt, dataclasses.replace(GREEDY, n=2))
    finished = run_to_end(engine)
    for completion in finished["bad"].outputs:
        assert completion.finish_reason == "error" and isinstance(completion.error, NumericalError)
        assert completion.token_ids == []
    for request_id in ("a", "c"):
        tokens = oracle(prompts[request_id], GREEDY)[0]
        assert 96 not in tokens, "choose another prompt"
        assert [completion.token_ids for completion in finished[request_id].outputs] == [tokens, tokens]


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("prompt", ("a", [], GREEDY)),
        ("prompt", ("a", "text", GREEDY)),
        ("prompt", ("a", [1.5], GREEDY)),
        ("prompt", ("a", [VOCAB_SIZE], GREEDY)),
        ("prompt", ("a", [1] * MAX_MODEL_LEN, GREEDY)),
        ("prompt", ("a", [1] * 40, dataclasses.replace(GREEDY, n=2))),
        ("params", ("a", [1], {"n": 1})),
        ("request_id", ("", [1], GREEDY)),
        ("request_id", (7, [1], GREEDY)),
        ("request_id", ("known", [1], GREEDY)),
        ("stop", ("a", [1], SamplingParams(stop="x"))),
    ],
)
def test_a_refused_request_leaves_no_trace(field: str, arguments: tuple[Any, ...]) -> None:
    engine = make_engine(num_blocks=10, vocab_size=VOCAB_SIZE)
    engine.add_request("known", [1, 2], GREEDY)
    with pytest.raises((InputError, CapacityError)) as caught:
        engine.add_request(*arguments)
    assert caught.value.field == field and caught.value.remedy
    assert len(engine.scheduler) == 1
    assert run_to_end(engine)["known"].outputs[0].token_ids == oracle([1, 2], GREEDY)[0]


def test_abort_at_every_point_frees_the_blocks() -> None:
    for num_steps in range(12):
        engine = make_engine(num_blocks=10, budget=3)
        engine.add_request("gone", [1] * 10, dataclasses.replace(GREEDY, ignore_eos=True, n=2))
        engine.add_request("stays", [2] * 5, GREEDY)
        for _ in range(num_steps):
            engine.step()
        output = engine.abort_request("gone")
        assert output is not None and output.finished
        assert {completion.finish_reason for completion in output.outputs} <= {"abort", "length"}
        assert engine.abort_request("gone") is None and engine.abort_request("never") is None
        engine.scheduler.check_integrity()
        finished = run_to_end(engine)
        assert finished == {} or finished["stays"].outputs[0].token_ids == oracle([2] * 5, GREEDY)[0]


class FailsOnce:
    """Raises on its third call, before or after the cache was written."""

    def __init__(self, inner: PagedHashModel, error: BaseException, after_writing: bool) -> None:
        self.inner, self.error, self.after_writing, self.num_calls = inner, error, after_writing, 0

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        self.num_calls += 1
        if self.num_calls == 3:
            if self.after_writing:
                self.inner(inputs)
            raise self.error
        return self.inner(inputs)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("after_writing", [False, True])
def test_a_failed_model_call_can_be_repeated_or_abandoned(error: BaseException, after_writing: bool) -> None:
    prompts = {f"r{index}": [index + 1] * (3 * index + 1) for index in range(4)}
    for repeat in (True, False):
        engine = make_engine(budget=6, model=FailsOnce(PagedHashModel(12, 4), error, after_writing))
        for request_id, prompt in prompts.items():
            engine.add_request(request_id, prompt, GREEDY)
        finished: dict[str, RequestOutput] = {}
        with pytest.raises(type(error)):
            while True:
                finished.update({output.request_id: output for output in engine.step() if output.finished})
        engine.scheduler.check_integrity()
        if repeat:
            finished.update(run_to_end(engine))
            assert all(finished[r].outputs[0].token_ids == oracle(prompts[r], GREEDY)[0] for r in prompts)
        else:
            engine.abort_all()
            assert engine.scheduler.pool.num_used_blocks == 0 and not engine.has_unfinished_requests()


class InterruptAt:
    """A trace function that raises ``KeyboardInterrupt`` at the n-th line executed in the runtime."""

    def __init__(self, countdown: int) -> None:
        self.countdown = countdown

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        if "infercomp" not in frame.f_code.co_filename or "tests" in frame.f_code.co_filename:
            return None
        if event == "line":
            self.countdown -= 1
            if self.countdown == 0:
                raise KeyboardInterrupt
        return self


def test_an_interrupt_at_any_line_leaves_an_engine_that_can_be_emptied_and_used() -> None:
    num_interrupts = 0
    for countdown in range(1, 4000, 23):
        engine = make_engine(num_blocks=8, budget=6)
        sys.settrace(InterruptAt(countdown))
        try:
            for index in range(3):
                engine.add_request(f"r{index}", [index + 1] * (index + 5), dataclasses.replace(GREEDY, ignore_eos=True))
            while engine.has_unfinished_requests():
                engine.step()
        except KeyboardInterrupt:
            num_interrupts += 1
        finally:
            sys.settrace(None)
        engine.abort_all()
        engine.scheduler.check_integrity()
        assert engine.scheduler.pool.num_used_blocks == 0
        engine.add_request("r0", [9, 8, 7], GREEDY)
        assert run_to_end(engine)["r0"].outputs[0].token_ids == oracle([9, 8, 7], GREEDY)[0]
    assert num_interrupts > 100


def test_a_model_of_the_wrong_shape_is_told_so() -> None:
    engine = make_engine(model=lambda inputs: torch.zeros(len(inputs.input_ids) + 1, VOCAB_SIZE))
    engine.add_request("a", [1], GREEDY)
    with pytest.raises(InfercompError, match="logits of shape"):
        engine.step()


class LetterTokenizer:
    """Token t is the letter t mod 26; token 0 is silent."""

    all_special_ids = (EOS,)

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        return "".join(chr(97 + token % 26) for token in token_ids if token != EOS or not skip_special_tokens)


def test_text_grows_and_stop_strings_cut_it() -> None:
    tokenizer = LetterTokenizer()
    params = dataclasses.replace(GREEDY, ignore_eos=True)
    whole = tokenizer.decode(oracle([7], params)[0], skip_special_tokens=True)
    stop = whole[3:6]
    engine = make_engine(tokenizer=tokenizer)
    engine.add_request("whole", [7], params, prompt="seven")
    engine.add_request("cut", [7], dataclasses.replace(params, stop=["nothing like it", stop]))
    texts: dict[str, list[str]] = {"whole": [], "cut": []}
    last: dict[str, RequestOutput] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            texts[output.request_id].append(output.outputs[0].text)
            last[output.request_id] = output
    assert last["whole"].outputs[0].text == whole and last["whole"].prompt == "seven"
    cut = last["cut"].outputs[0]
    assert (cut.text, cut.finish_reason, cut.stop_reason) == (whole[: whole.find(stop)], "stop", stop)
    for pieces in texts.values():
        assert all(later.startswith(earlier) for earlier, later in pairwise(pieces))
