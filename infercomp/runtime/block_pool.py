"""Fixed-size cache blocks, handed out by number and counted by owner.

The method is vLLM's PagedAttention ledger (Kwon et al., 2023): the pool knows numbers only; what is
in a block is the business of the tensors in ``kv_pools``.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

from .config import LARGEST_COUNT, require_int
from .errors import CapacityError, InfercompError, InputError


class BlockOwnershipError(InfercompError):
    """A block was freed or shared by someone who does not hold it."""


class BlockPool:
    """``num_blocks`` blocks, each with a reference count; a block with count 0 is free.

    Every method checks before it changes anything: after an error the pool is as it was.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = require_int(num_blocks, "num_blocks", 1, LARGEST_COUNT)
        self.reset()

    def reset(self) -> None:
        """Forget every owner: all blocks are free, in ascending order."""
        self._reference_counts = [0] * self.num_blocks
        self._free_block_ids = deque(range(self.num_blocks))

    @property
    def num_free_blocks(self) -> int:
        return len(self._free_block_ids)

    @property
    def num_used_blocks(self) -> int:
        return self.num_blocks - len(self._free_block_ids)

    def reference_count(self, block_id: int) -> int:
        """Owners of the block; 0 when it is free."""
        self._require_known([block_id])
        return self._reference_counts[block_id]

    def allocate(self, num_wanted: int) -> list[int]:
        """Take the ``num_wanted`` blocks that have been free for longest; each gets one owner."""
        require_int(num_wanted, "num_wanted", 0, LARGEST_COUNT, InputError)
        if num_wanted > self.num_free_blocks:
            raise CapacityError(
                f"{num_wanted} blocks wanted, {self.num_free_blocks} of {self.num_blocks} are free",
                needed_blocks=num_wanted,
                num_blocks=self.num_blocks,
                remedy="wait for a request to finish, preempt one, or raise num_blocks",
                field="num_blocks",
            )
        block_ids = [self._free_block_ids.popleft() for _ in range(num_wanted)]
        for block_id in block_ids:
            self._reference_counts[block_id] = 1
        return block_ids

    def share(self, block_ids: Iterable[int]) -> None:
        """Add one owner to each of the blocks, all of which must be in use."""
        block_ids = list(block_ids)
        self._require_owned(Counter(dict.fromkeys(self._require_known(block_ids), 1)))
        for block_id in block_ids:
            self._reference_counts[block_id] += 1

    def free(self, block_ids: Iterable[int]) -> None:
        """Take one owner from each of the blocks; those left without become free."""
        block_ids = list(block_ids)
        self._require_owned(Counter(self._require_known(block_ids)))
        for block_id in block_ids:
            self._reference_counts[block_id] -= 1
            if self._reference_counts[block_id] == 0:
                self._free_block_ids.append(block_id)

    def check_integrity(self) -> None:
        """Recompute the free list from the counts; raises ``AssertionError`` where they disagree."""
        assert len(self._reference_counts) == self.num_blocks, "the pool changed its size"
        assert all(count >= 0 for count in self._reference_counts), "a reference count is negative"
        unowned = [block_id for block_id, count in enumerate(self._reference_counts) if count == 0]
        assert sorted(self._free_block_ids) == unowned, "free list and reference counts disagree"

    def _require_known(self, block_ids: list[int]) -> list[int]:
        for block_id in block_ids:
            require_int(block_id, "block_ids", 0, self.num_blocks - 1, InputError)
        return block_ids

    def _require_owned(self, num_owners_by_block: Counter[int]) -> None:
        for block_id, num_owners in num_owners_by_block.items():
            if self._reference_counts[block_id] < num_owners:
                raise BlockOwnershipError(
                    f"block {block_id} has {self._reference_counts[block_id]} owners, the call assumes {num_owners}",
                    remedy="free each block once per allocate or share, and do not use it afterwards",
                    field="block_ids",
                )
