"""The pool against a model of it: a plain count of owners per block."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from infercomp.runtime.block_pool import BlockOwnershipError, BlockPool
from infercomp.runtime.errors import CapacityError, ConfigError, InfercompError, InputError

NUM_BLOCKS = 8


class PoolMachine(RuleBasedStateMachine):
    """``owners`` holds what every block's reference count must be."""

    pool_class = BlockPool

    def __init__(self) -> None:
        super().__init__()
        self.pool = self.pool_class(NUM_BLOCKS)
        self.owners: Counter[int] = Counter()

    @rule(num_wanted=st.integers(0, NUM_BLOCKS + 2))
    def allocate(self, num_wanted: int) -> None:
        num_free = NUM_BLOCKS - len(self.owners)
        if num_wanted > num_free:
            with pytest.raises(CapacityError) as caught:
                self.pool.allocate(num_wanted)
            assert caught.value.needed_blocks == num_wanted
            return
        block_ids = self.pool.allocate(num_wanted)
        assert len(set(block_ids)) == num_wanted
        assert not set(block_ids) & set(self.owners), "an owned block was handed out"
        self.owners.update(block_ids)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        block_ids = data.draw(st.lists(st.sampled_from(sorted(self.owners)), max_size=4))
        self.pool.share(block_ids)
        self.owners.update(block_ids)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        block_ids = data.draw(st.lists(st.sampled_from(sorted(self.owners.elements())), max_size=4))
        if Counter(block_ids) <= self.owners:
            self.pool.free(block_ids)
            self.owners -= Counter(block_ids)
        else:
            with pytest.raises(BlockOwnershipError):
                self.pool.free(block_ids)

    @rule(
        block_ids=st.lists(st.one_of(st.integers(-2, NUM_BLOCKS + 2), st.booleans()), min_size=1),
        verb=st.sampled_from(["free", "share"]),
    )
    def misuse(self, block_ids: list[int], verb: str) -> None:
        is_owned = all(type(b) is int and self.owners[b] > 0 for b in block_ids)
        if not is_owned:
            with pytest.raises(InfercompError):
                getattr(self.pool, verb)(block_ids)

    @invariant()
    def counts_agree(self) -> None:
        self.pool.check_integrity()
        assert self.pool.num_used_blocks == len(self.owners)
        assert self.pool.num_free_blocks == NUM_BLOCKS - len(self.owners)
        assert all(self.pool.reference_count(b) == self.owners.get(b, 0) for b in range(NUM_BLOCKS))


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


class FreesSharedBlocks(BlockPool):
    """Planted bug: one owner letting go frees the block for everybody."""

    def free(self, block_ids: list[int]) -> None:  # type: ignore[override]
        super().free(block_ids)
        for block_id in set(block_ids):
            if self._reference_counts[block_id] > 0:
                self._reference_counts[block_id] = 0
                self._free_block_ids.append(block_id)


class FreesBeforeItChecks(BlockPool):
    """Planted bug: a free that is refused has already changed the pool."""

    def free(self, block_ids: list[int]) -> None:  # type: ignore[override]
        for block_id in block_ids:
            super().free([block_id])


@pytest.mark.parametrize("pool_class", [FreesSharedBlocks, FreesBeforeItChecks])
def test_the_machine_finds_planted_bugs(pool_class: type[BlockPool]) -> None:
    machine = type("Planted", (PoolMachine,), {"pool_class": pool_class})
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=200,
                stateful_step_count=40,
                deadline=None,
                derandomize=True,
                database=None,
                phases=(Phase.generate,),
            ),
        )


@pytest.mark.parametrize("num_wanted", [-1, True, 1.0, None, "2"])
def test_a_count_that_is_none_is_refused(num_wanted: object) -> None:
    pool = BlockPool(4)
    with pytest.raises(InputError) as caught:
        pool.allocate(num_wanted)  # type: ignore[arg-type]
    assert caught.value.field == "num_wanted"
    assert pool.num_free_blocks == 4


def test_a_pool_needs_blocks() -> None:
    with pytest.raises(ConfigError):
        BlockPool(0)


def test_reset_forgets_every_owner() -> None:
    pool = BlockPool(4)
    pool.share(pool.allocate(3))
    pool.reset()
    pool.check_integrity()
    assert pool.num_free_blocks == 4
