"""Which tokens are computed in the next step, and which blocks hold them.

One quantity drives it, as in vLLM's v1 scheduler: each request has tokens it wants computed, a step has
a budget of tokens to spend. Long prompts in chunks, single generated tokens and recomputation after a
preemption are all the same case.

Order is first come, first served. Invariant: ``running`` and then ``waiting`` list the requests by age.
Admission moves the oldest waiting request to the end of running; preemption moves the youngest running
one to the front of waiting. Hence the oldest request is never preempted, it always fits (``add`` saw to
that), and some request advances in every step.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass

from .block_pool import BlockPool
from .config import LARGEST_COUNT, RuntimeConfig, require_int
from .errors import CapacityError, InfercompError, InputError
from .request import FinishReason, Request, RequestStatus


@dataclass(frozen=True)
class ScheduledRequest:
    """The tokens ``start`` to ``stop`` (not included) of one request.

    ``is_sampled``: the last known token is among them, so its logits choose the next one.
    """

    request: Request
    start: int
    stop: int
    is_sampled: bool

    @classmethod
    def within(cls, num_budget: int, request: Request) -> ScheduledRequest:
        """As many of the wanted tokens as the budget allows."""
        stop = min(request.num_tokens, request.num_computed_tokens + num_budget)
        return cls(request, request.num_computed_tokens, stop, stop == request.num_tokens)

    @property
    def num_scheduled_tokens(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Schedule:
    """One step: its requests in packing order, and how many others were preempted to make room."""

    scheduled: tuple[ScheduledRequest, ...]
    num_preemptions: int

    @property
    def num_scheduled_tokens(self) -> int:
        return sum(item.num_scheduled_tokens for item in self.scheduled)

    @property
    def sampled(self) -> tuple[ScheduledRequest, ...]:
        """The requests that get a token from this step, in the order of the rows of logits."""
        return tuple(item for item in self.scheduled if item.is_sampled)


class Scheduler:
    """Owns the queues and, through them, every block taken from ``pool``.

    ``schedule()`` allocates blocks but settles nothing: if the step fails, the next call plans it again.
    """

    def __init__(self, config: RuntimeConfig, pool: BlockPool, max_model_len: int) -> None:
        self.config = config
        self.pool = pool
        self.max_model_len = require_int(max_model_len, "max_model_len", 2, LARGEST_COUNT)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0
        self._num_arrivals = 0
        self._arrivals: dict[str, tuple[int, Request]] = {}

    def __iter__(self) -> Iterator[Request]:
        """Unfinished requests, oldest first."""
        yield from self.running
        yield from self.waiting

    def __len__(self) -> int:
        return len(self.running) + len(self.waiting)

    def add(self, request: Request) -> None:
        """Queue a request; refuse at once one that could never fit, so that it cannot block the queue."""
        if request.request_id in self._arrivals:
            raise InputError(
                f"a request with id {request.request_id!r} is in progress",
                remedy="choose an id that is unique among unfinished requests",
                field="request_id",
            )
        self.require_capacity(request.num_prompt_tokens, request.params.max_tokens)
        self._arrivals[request.request_id] = (self._num_arrivals, request)
        self._num_arrivals += 1
        self.waiting.append(request)

    def require_capacity(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Raise ``CapacityError`` if the whole pool is too small for the longest this request can get."""
        num_tokens = min(num_prompt_tokens + max_tokens, self.max_model_len)
        needed_blocks = self.num_blocks_for(num_tokens)
        if needed_blocks > self.pool.num_blocks:
            raise CapacityError(
                f"{num_prompt_tokens} prompt tokens and up to {num_tokens - num_prompt_tokens} output tokens need "
                f"{needed_blocks} blocks of {self.config.block_size}; the cache has {self.pool.num_blocks}",
                needed_blocks=needed_blocks,
                num_blocks=self.pool.num_blocks,
                remedy="lower max_tokens, shorten the prompt, or raise num_blocks or kv_cache_bytes",
            )

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.block_size)

    def schedule(self) -> Schedule:
        """Spend the token budget: running requests first, then waiting ones, oldest first in both."""
        num_preemptions_before = self.num_preemptions
        scheduled = self._schedule_running(self.config.max_num_batched_tokens)
        if self.num_preemptions == num_preemptions_before:
            num_spent = sum(item.num_scheduled_tokens for item in scheduled)
            scheduled += self._admit_waiting(self.config.max_num_batched_tokens - num_spent)
        return Schedule(tuple(scheduled), self.num_preemptions - num_preemptions_before)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Take an unfinished request out and free its blocks."""
        if self._arrivals.get(request.request_id, (0, None))[1] is not request:
            raise InfercompError(
                f"request {request.request_id!r} is not in progress here", remedy="finish each request once"
            )
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self._release_blocks(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        del self._arrivals[request.request_id]

    def abort(self, request_id: str) -> Request | None:
        """Finish the request with reason ``abort``; an id that is not (or no longer) known is no error."""
        if request_id not in self._arrivals:
            return None
        request = self._arrivals[request_id][1]
        self.finish(request, "abort")
        return request

    def abort_all(self) -> None:
        """Finish every request and free every block, whatever state an interrupted call has left behind."""
        for _, request in list(self._arrivals.values()):
            request.block_ids = []
            request.status = RequestStatus.FINISHED
            request.finish_reason = request.finish_reason or "abort"
        self.running.clear()
        self.waiting.clear()
        self._arrivals.clear()
        self.pool.reset()

    def check_integrity(self) -> None:
        """Recompute queues and block ownership from scratch; raises ``AssertionError`` where they disagree."""
        self.pool.check_integrity()
        ages = [self._arrivals[request.request_id][0] for request in self]
        assert ages == sorted(ages), "the queues are not ordered by age"
        assert len(self) == len(self._arrivals), "a request is in no queue, or in two"
        assert len(self.running) <= self.config.max_num_seqs, "more sequences run than max_num_seqs"
        for request in self.waiting:
            assert request.status is RequestStatus.WAITING, "a waiting request has another status"
            assert not request.block_ids and request.num_computed_tokens == 0, "a waiting request holds blocks"
        for request in self.running:
            assert request.status is RequestStatus.RUNNING, "a running request has another status"
            num_slots = len(request.block_ids) * self.config.block_size
            assert 0 <= request.num_computed_tokens <= min(num_slots, request.num_tokens), "tokens without a slot"
        owners = Counter(block_id for request in self for block_id in request.block_ids)
        counts = {block_id: self.pool.reference_count(block_id) for block_id in range(self.pool.num_blocks)}
        assert all(counts[block_id] == owners[block_id] for block_id in counts), "owners and counts disagree"

    def _schedule_running(self, num_budget: int) -> list[ScheduledRequest]:
        scheduled: list[ScheduledRequest] = []
        index = 0
        # The list may shrink from its end while we walk: victims are younger than what was scheduled before.
        while num_budget > 0 and index < len(self.running):
            request = self.running[index]
            if not self._make_room(request):
                break
            scheduled.append(ScheduledRequest.within(num_budget, request))
            num_budget -= scheduled[-1].num_scheduled_tokens
            index += 1
        return scheduled

    def _admit_waiting(self, num_budget: int) -> list[ScheduledRequest]:
        scheduled: list[ScheduledRequest] = []
        while num_budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            # All known tokens get their blocks now, so that only generated tokens can run out of them later.
            num_blocks = self.num_blocks_for(self.waiting[0].num_tokens)
            if num_blocks > self.pool.num_free_blocks:
                break
            request = self.waiting.popleft()
            request.block_ids = self.pool.allocate(num_blocks)
            request.status = RequestStatus.RUNNING
            self.running.append(request)
            scheduled.append(ScheduledRequest.within(num_budget, request))
            num_budget -= scheduled[-1].num_scheduled_tokens
        return scheduled

    def _make_room(self, request: Request) -> bool:
        """Give ``request`` blocks for all its tokens, preempting from the young end; False if it was the youngest."""
        num_missing = self.num_blocks_for(request.num_tokens) - len(request.block_ids)
        while num_missing > self.pool.num_free_blocks:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        request.block_ids += self.pool.allocate(num_missing)
        return True

    def _preempt(self, victim: Request) -> None:
        self._release_blocks(victim)
        victim.num_computed_tokens = 0
        victim.status = RequestStatus.WAITING
        self.running.pop()
        self.waiting.appendleft(victim)
        self.num_preemptions += 1

    def _release_blocks(self, request: Request) -> None:
        self.pool.free(request.block_ids)
        request.block_ids = []
