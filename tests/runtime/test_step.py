"""``StepInputs`` against arithmetic done by hand, and against a cache addressed position by position."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from infercomp.runtime.block_pool import BlockPool
from infercomp.runtime.config import RuntimeConfig
from infercomp.runtime.request import Request, SamplingParams
from infercomp.runtime.scheduler import Schedule, ScheduledRequest, Scheduler
from infercomp.runtime.step import STEP_INPUT_NAMES, StepInputs


def test_names_are_the_fields_in_order() -> None:
    assert STEP_INPUT_NAMES == (
        "input_ids",
        "positions",
        "slot_mapping",
        "block_tables",
        "seq_lens",
        "query_start_loc",
        "logits_indices",
    )


def test_a_chunk_and_a_generated_token_in_one_step() -> None:
    generating = Request(
        "generating", [10, 11, 12], SamplingParams(), output_token_ids=[13], num_computed_tokens=3, block_ids=[7, 2]
    )
    chunk = Request("chunk", list(range(20, 29)), SamplingParams(), num_computed_tokens=2, block_ids=[5, 0, 4, 1, 3])
    schedule = Schedule((ScheduledRequest.within(9, generating), ScheduledRequest.within(5, chunk)), 0)
    inputs = StepInputs.from_schedule(schedule, block_size=2)
    assert inputs.input_ids.tolist() == [13, 22, 23, 24, 25, 26]
    assert inputs.positions.tolist() == [3, 2, 3, 4, 5, 6]
    assert inputs.slot_mapping.tolist() == [5, 0, 1, 8, 9, 2]
    assert inputs.block_tables.tolist() == [[7, 2, 0, 0], [5, 0, 4, 1]]
    assert inputs.seq_lens.tolist() == [4, 7]
    assert inputs.query_start_loc.tolist() == [0, 1, 6]
    assert inputs.logits_indices.tolist() == [0]
    assert all(tensor.dtype is torch.int64 for tensor in inputs.tensors())


def test_a_step_without_sampled_rows_keeps_dtype_and_rank() -> None:
    request = Request("chunk", [1, 2, 3], SamplingParams(), block_ids=[0])
    inputs = StepInputs.from_schedule(Schedule((ScheduledRequest.within(2, request),), 0), block_size=4)
    assert inputs.logits_indices.shape == (0,) and inputs.logits_indices.dtype is torch.int64


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    block_size=st.integers(1, 5),
    budget=st.integers(1, 15),
)
def test_what_is_written_by_slot_is_read_by_block_table(lengths: list[int], block_size: int, budget: int) -> None:
    config = RuntimeConfig(block_size=block_size, max_num_batched_tokens=budget)
    scheduler = Scheduler(config, BlockPool(80), max_model_len=14)
    for index, length in enumerate(lengths):
        prompt = [100 * index + position for position in range(length)]
        scheduler.add(Request(str(index), prompt, SamplingParams(max_tokens=2)))
    cache = torch.full((80 * block_size,), -1)
    while len(scheduler):
        schedule = scheduler.schedule()
        inputs = StepInputs.from_schedule(schedule, block_size)
        cache[inputs.slot_mapping] = inputs.input_ids
        for row, item in enumerate(schedule.scheduled):
            slots = (inputs.block_tables[row, :, None] * block_size + torch.arange(block_size)).flatten()
            cached = cache[slots[: int(inputs.seq_lens[row])]].tolist()
            assert cached == item.request.token_ids(0, item.stop)
            first, last = inputs.query_start_loc[row : row + 2].tolist()
            assert inputs.positions[first:last].tolist() == list(range(item.start, item.stop))
            assert ((last - 1) in inputs.logits_indices.tolist()) == item.is_sampled
        for item in schedule.scheduled:
            item.request.advance(item.num_scheduled_tokens, 7 if item.is_sampled else None)
            if item.request.num_output_tokens == 2:
                scheduler.finish(item.request, "length")
