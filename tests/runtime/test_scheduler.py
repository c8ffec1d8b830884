"""The scheduler driven by random arrivals, aborts and endings, with its books recomputed after each rule."""

from __future__ import annotations

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from infercomp.runtime.block_pool import BlockPool
from infercomp.runtime.config import RuntimeConfig
from infercomp.runtime.errors import CapacityError, InfercompError, InputError
from infercomp.runtime.request import Request, SamplingParams
from infercomp.runtime.scheduler import Schedule, Scheduler

BLOCK_SIZE, NUM_BLOCKS, BUDGET, MAX_NUM_SEQS, MAX_MODEL_LEN = 4, 6, 7, 3, 40


def make_scheduler(
    scheduler_class: type[Scheduler] = Scheduler, num_blocks: int = NUM_BLOCKS, budget: int = BUDGET
) -> Scheduler:
    config = RuntimeConfig(block_size=BLOCK_SIZE, max_num_batched_tokens=budget, max_num_seqs=MAX_NUM_SEQS)
    return scheduler_class(config, BlockPool(num_blocks), MAX_MODEL_LEN)


def make_request(request_id: str, num_prompt_tokens: int, max_tokens: int = 8) -> Request:
    return Request(request_id, list(range(num_prompt_tokens)), SamplingParams(max_tokens=max_tokens))


def settle(scheduler: Scheduler, schedule: Schedule, ending: int | None = None) -> None:
    """What the engine does after the model has run; ``ending`` ends requests at lengths that end in that digit."""
    for item in schedule.scheduled:
        item.request.advance(item.num_scheduled_tokens, 1 if item.is_sampled else None)
        is_full = item.request.num_output_tokens >= item.request.params.max_tokens
        if item.is_sampled and (is_full or item.request.num_tokens % 10 == ending):
            scheduler.finish(item.request, "length")


def check_schedule(scheduler: Scheduler, schedule: Schedule) -> None:
    """What every schedule must fulfil, whatever the policy."""
    assert 1 <= schedule.num_scheduled_tokens <= scheduler.config.max_num_batched_tokens
    requests = [item.request for item in schedule.scheduled]
    assert len(set(map(id, requests))) == len(requests) <= scheduler.config.max_num_seqs
    for item in schedule.scheduled:
        assert item.start == item.request.num_computed_tokens < item.stop <= item.request.num_tokens
        assert item.stop <= len(item.request.block_ids) * BLOCK_SIZE, "a token has no slot"
        assert item.is_sampled == (item.stop == item.request.num_tokens)


class SchedulerMachine(RuleBasedStateMachine):
    """Every step makes progress; the oldest request is never preempted; blocks are owned once."""

    scheduler_class = Scheduler

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = make_scheduler(self.scheduler_class)
        self.num_added = 0

    @rule(num_prompt_tokens=st.integers(1, 20), max_tokens=st.integers(1, 14))
    def add(self, num_prompt_tokens: int, max_tokens: int) -> None:
        self.num_added += 1
        request = make_request(f"r{self.num_added}", num_prompt_tokens, max_tokens)
        needed_blocks = -(-(num_prompt_tokens + max_tokens) // BLOCK_SIZE)
        if needed_blocks <= NUM_BLOCKS:
            self.scheduler.add(request)
        else:
            with pytest.raises(CapacityError) as caught:
                self.scheduler.add(request)
            assert caught.value.needed_blocks == needed_blocks

    @precondition(lambda self: len(self.scheduler))
    @rule(ending=st.integers(0, 9), num_steps=st.integers(1, 4))
    def step(self, ending: int, num_steps: int) -> None:
        for _ in range(num_steps):
            if not len(self.scheduler):
                break
            oldest = next(iter(self.scheduler))
            num_computed_before = oldest.num_computed_tokens
            schedule = self.scheduler.schedule()
            self.scheduler.check_integrity()
            check_schedule(self.scheduler, schedule)
            settle(self.scheduler, schedule, ending)
            assert oldest.num_computed_tokens > num_computed_before, "the oldest request made no progress"

    @precondition(lambda self: len(self.scheduler))
    @rule()
    def step_that_fails(self) -> None:
        """The model raised: nothing is settled, and the books still balance."""
        self.scheduler.schedule()

    @rule(number=st.integers(0, 12))
    def abort(self, number: int) -> None:
        request_id = f"r{number}"
        is_known = any(request.request_id == request_id for request in self.scheduler)
        aborted = self.scheduler.abort(request_id)
        assert (aborted is not None) == is_known
        if aborted is not None:
            assert aborted.finish_reason == "abort" and not aborted.block_ids

    @invariant()
    def books_balance(self) -> None:
        self.scheduler.check_integrity()

    def teardown(self) -> None:
        """Whatever state the rules ended in, everything finishes in a bounded number of steps."""
        for _ in range(200 + 60 * self.num_added):
            if not len(self.scheduler):
                break
            settle(self.scheduler, self.scheduler.schedule())
        assert len(self.scheduler) == 0, "requests never finish"
        assert self.scheduler.pool.num_free_blocks == NUM_BLOCKS


MACHINE_SETTINGS = settings(max_examples=60, stateful_step_count=30, deadline=None)
SchedulerMachine.TestCase.settings = MACHINE_SETTINGS
TestScheduler = SchedulerMachine.TestCase


class LeaksOnPreemption(Scheduler):
    """Planted bug: the victim's blocks are forgotten, not freed."""

    def _preempt(self, victim: Request) -> None:
        victim.block_ids = []
        super()._preempt(victim)


class PreemptsTheOldest(Scheduler):
    """Planted bug: the wrong end of the running list gives way."""

    def _preempt(self, victim: Request) -> None:
        self.running.insert(len(self.running), self.running.pop(0))
        super()._preempt(self.running[-1])


class KeepsComputedTokens(Scheduler):
    """Planted bug: a preempted request believes its tokens are still cached."""

    def _preempt(self, victim: Request) -> None:
        num_computed_tokens = victim.num_computed_tokens
        super()._preempt(victim)
        victim.num_computed_tokens = num_computed_tokens


class ForgetsToReserve(Scheduler):
    """Planted bug: one block too few for the tokens that are scheduled."""

    def num_blocks_for(self, num_tokens: int) -> int:
        return num_tokens // self.config.block_size


@pytest.mark.parametrize(
    "scheduler_class", [LeaksOnPreemption, PreemptsTheOldest, KeepsComputedTokens, ForgetsToReserve]
)
def test_the_machine_finds_planted_bugs(scheduler_class: type[Scheduler]) -> None:
    machine = type("Planted", (SchedulerMachine,), {"scheduler_class": scheduler_class})
    derandomized = settings(
        MACHINE_SETTINGS, max_examples=300, derandomize=True, database=None, phases=(Phase.generate,)
    )
    with pytest.raises((AssertionError, InfercompError, pytest.fail.Exception)):
        run_state_machine_as_test(machine, settings=derandomized)


def test_a_long_prompt_is_computed_in_chunks() -> None:
    scheduler = make_scheduler(budget=7)
    scheduler.add(make_request("long", 17, 2))
    chunks = []
    while len(scheduler):
        schedule = scheduler.schedule()
        chunks += [(item.start, item.stop, item.is_sampled) for item in schedule.scheduled]
        settle(scheduler, schedule)
    assert chunks == [(0, 7, False), (7, 14, False), (14, 17, True), (17, 18, True)]


def test_generation_and_a_new_prompt_share_a_step() -> None:
    scheduler = make_scheduler(budget=7)
    scheduler.add(make_request("first", 4))
    settle(scheduler, scheduler.schedule())
    scheduler.add(make_request("second", 9, 2))
    schedule = scheduler.schedule()
    assert [(item.request.request_id, item.num_scheduled_tokens) for item in schedule.scheduled] == [
        ("first", 1),
        ("second", 6),
    ]
    assert [item.request.request_id for item in schedule.sampled] == ["first"]


def test_the_youngest_gives_way_and_comes_back_first() -> None:
    scheduler = make_scheduler(num_blocks=4, budget=50)
    old, young, later = make_request("old", 8), make_request("young", 7, 5), make_request("later", 1)
    for request in (old, young, later):
        scheduler.add(request)
    settle(scheduler, scheduler.schedule())
    assert scheduler.running == [old, young]
    settle(scheduler, scheduler.schedule())
    assert scheduler.running == [old] and list(scheduler.waiting) == [young, later]
    assert scheduler.num_preemptions == 1 and young.num_computed_tokens == 0 and young.num_output_tokens == 1
    while len(scheduler):
        settle(scheduler, scheduler.schedule())
        scheduler.check_integrity()
    assert young.num_output_tokens == 5 and old.num_output_tokens == 8


def test_a_request_that_can_never_fit_does_not_block_the_queue() -> None:
    scheduler = make_scheduler(num_blocks=4)
    with pytest.raises(CapacityError) as caught:
        scheduler.add(make_request("huge", 12, 5))
    assert (caught.value.needed_blocks, caught.value.num_blocks) == (5, 4)
    assert caught.value.field == "prompt" and "max_tokens" in str(caught.value)
    scheduler.add(make_request("exact", 12, 4))
    assert len(scheduler) == 1


def test_capacity_is_capped_by_max_model_len() -> None:
    scheduler = make_scheduler(num_blocks=MAX_MODEL_LEN // BLOCK_SIZE)
    scheduler.add(make_request("unbounded", 3, 1_000_000))


def test_ids_are_unique_and_finishing_twice_is_an_error() -> None:
    scheduler = make_scheduler()
    request = make_request("a", 3)
    scheduler.add(request)
    with pytest.raises(InputError) as caught:
        scheduler.add(make_request("a", 3))
    assert caught.value.field == "request_id"
    scheduler.finish(request, "stop")
    with pytest.raises(InfercompError):
        scheduler.finish(request, "stop")
    assert scheduler.abort("a") is None and scheduler.abort("never") is None
    scheduler.check_integrity()
