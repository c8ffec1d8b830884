"""``StepInputs``: the tensors of one model step, and nothing else joins scheduler and model.

The tokens of all requests lie in one row without padding. The field names are the names of the graph
inputs of a compiled model, so the model is a function of what it is given.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import accumulate, chain

import torch

from .scheduler import Schedule, ScheduledRequest


@dataclass(frozen=True, eq=False)
class StepInputs:
    """T tokens of B requests, R of which (those that reach their last known token) get a row of logits.

    All int64. The key and value of packed token t go to ``slot_mapping[t]``; the token of request b at
    position p is found in slot ``block_tables[b, p // block_size] * block_size + p % block_size``.
    """

    input_ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T], place of the token in its own sequence
    slot_mapping: torch.Tensor  # [T], block_id * block_size + offset
    block_tables: torch.Tensor  # [B, most blocks of a request in this step], padded with 0
    seq_lens: torch.Tensor  # [B], cached tokens once this step is done
    query_start_loc: torch.Tensor  # [B + 1], request b has the packed rows [b] to [b + 1]
    logits_indices: torch.Tensor  # [R], packed rows to compute logits for, ascending

    @classmethod
    def from_schedule(cls, schedule: Schedule, block_size: int) -> StepInputs:
        """Write a schedule of at least one request as tensors on the CPU."""
        items = schedule.scheduled
        row_starts = [0, *accumulate(item.num_scheduled_tokens for item in items)]
        tables = _padded([_block_table(item, block_size) for item in items])
        parts = [
            [token for item in items for token in item.request.token_ids(item.start, item.stop)],
            [position for item in items for position in range(item.start, item.stop)],
            [slot for item in items for slot in _slots(item, block_size)],
            [block_id for table in tables for block_id in table],
            [item.stop for item in items],
            row_starts,
            [stop - 1 for item, stop in zip(items, row_starts[1:], strict=True) if item.is_sampled],
        ]
        # One tensor, of which the fields are parts: making a tensor takes longer than its numbers.
        numbers = torch.tensor(list(chain.from_iterable(parts)), dtype=torch.int64)
        tensors = list(numbers.split([len(part) for part in parts]))
        tensors[3] = tensors[3].view(len(items), -1)
        return cls(*tensors)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The fields in the order of ``STEP_INPUT_NAMES``."""
        return tuple(getattr(self, name) for name in STEP_INPUT_NAMES)


STEP_INPUT_NAMES: tuple[str, ...] = tuple(field.name for field in fields(StepInputs))


def _slots(item: ScheduledRequest, block_size: int) -> list[int]:
    block_ids = item.request.block_ids
    return [
        block_ids[position // block_size] * block_size + position % block_size
        for position in range(item.start, item.stop)
    ]


def _block_table(item: ScheduledRequest, block_size: int) -> list[int]:
    return item.request.block_ids[: -(-item.stop // block_size)]


def _padded(rows: list[list[int]]) -> list[list[int]]:
    width = max(len(row) for row in rows)
    return [row + [0] * (width - len(row)) for row in rows]
