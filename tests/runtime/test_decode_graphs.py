"""Buckets and padding of decoding graphs, with a capture that records a call instead of a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infercomp.runtime.decode_graphs import SMALLEST_TABLE_WIDTH, Bucket, DecodeGraphs, Replay, Step, bucket_of, padded
from infercomp.runtime.errors import DeviceMemoryError
from infercomp.runtime.step import StepInputs

BLOCK_SIZE, SPARE_SLOT = 4, 400
CPU = torch.device("cpu")


def decoding(lengths: list[int], first_block: int = 0) -> StepInputs:
    """The newest token of sequences that lie in blocks ``first_block`` and on."""
    widths = [-(-length // BLOCK_SIZE) for length in lengths]
    starts = [first_block + sum(widths[:i]) for i in range(len(lengths))]
    tables = [
        [*range(start, start + width), *[0] * (max(widths) - width)]
        for start, width in zip(starts, widths, strict=True)
    ]
    last = torch.tensor(lengths) - 1
    return StepInputs(
        input_ids=torch.arange(len(lengths)) + 7,
        positions=last,
        slot_mapping=torch.tensor(starts) * BLOCK_SIZE + last,
        block_tables=torch.tensor(tables),
        seq_lens=torch.tensor(lengths),
        query_start_loc=torch.arange(len(lengths) + 1),
        logits_indices=torch.arange(len(lengths)),
    )


def recorded(step: Step, inputs: StepInputs) -> Replay:
    step(inputs)
    return lambda: step(inputs)


class Hashing:
    """A step that writes each token to its slot and returns a row that depends on all that its sequence holds."""

    def __init__(self) -> None:
        self.cache = torch.full((SPARE_SLOT + BLOCK_SIZE,), -1)
        self.sizes: list[tuple[int, int]] = []

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        self.sizes.append(tuple(inputs.block_tables.shape))
        self.cache[inputs.slot_mapping] = inputs.input_ids
        rows = []
        for table, length in zip(inputs.block_tables, inputs.seq_lens.tolist(), strict=True):
            slots = (table[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()[:length]
            rows.append(torch.stack([self.cache[slots].sum(), slots.sum()]))
        return torch.stack(rows)[inputs.logits_indices].float()


def graphs_over(step: Step, most: int = 6) -> DecodeGraphs:
    return DecodeGraphs(step, recorded, max_num_sequences=most, spare_slot=SPARE_SLOT, device=CPU)


@given(st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=6), min_size=1, max_size=5))
def test_replays_compute_what_the_step_computes_and_touch_no_live_slot(batches: list[list[int]]) -> None:
    alone, replayed = Hashing(), Hashing()
    graphs = graphs_over(replayed)
    for lengths in batches:
        inputs = decoding(lengths)
        assert torch.equal(graphs(inputs), alone(inputs))
        assert torch.equal(replayed.cache[:SPARE_SLOT], alone.cache[:SPARE_SLOT])
    assert {Bucket(*size) for size in replayed.sizes} == set(graphs.buckets)
    assert all(bucket.num_sequences in (1, 2, 4, 6) for bucket in graphs.buckets)


def test_padding_that_writes_to_a_live_slot_is_noticed() -> None:
    """The comparison above sees one cell: here padding writes where sequence 0 has its first token."""
    step = Hashing()
    graphs = DecodeGraphs(step, recorded, max_num_sequences=4, spare_slot=0, device=CPU)
    graphs(decoding([3, 2, 2], first_block=1))
    assert int(step.cache[0]) == 0


def test_only_decoding_steps_of_served_batches_are_replayed() -> None:
    inputs = decoding([5, 9])
    assert bucket_of(inputs, 6) == Bucket(2, SMALLEST_TABLE_WIDTH)
    assert bucket_of(decoding([1] * 5), 6) == Bucket(6, SMALLEST_TABLE_WIDTH)
    assert bucket_of(decoding([1] * 7), 6) is None
    assert bucket_of(decoding([SMALLEST_TABLE_WIDTH * BLOCK_SIZE + 1]), 6) == Bucket(1, 2 * SMALLEST_TABLE_WIDTH)
    prefill = StepInputs(
        torch.arange(5), torch.arange(5), torch.arange(5), torch.tensor([[0, 1]]), torch.tensor([5]),
        torch.tensor([0, 5]), torch.tensor([4]),
    )  # fmt: skip
    assert bucket_of(prefill, 6) is None


def test_rows_that_are_not_sampled_get_no_logits() -> None:
    inputs = decoding([3, 4, 5])
    partly = StepInputs(*inputs.tensors()[:-1], logits_indices=torch.tensor([1]))
    assert torch.equal(graphs_over(Hashing())(partly), Hashing()(inputs)[[1]])


def test_padded_sequences_hold_no_keys() -> None:
    step = padded(decoding([6, 2]), Bucket(4, 8), SPARE_SLOT)
    assert step.seq_lens.tolist() == [6, 2, 0, 0]
    assert step.slot_mapping.tolist()[2:] == [SPARE_SLOT] * 2
    assert step.query_start_loc.tolist() == [0, 1, 2, 3, 4]
    assert step.block_tables.shape == (4, 8)


def test_without_memory_the_error_says_what_fits() -> None:
    def capture(step: Step, inputs: StepInputs) -> Replay:
        if len(inputs.input_ids) > 2:
            raise torch.OutOfMemoryError("no memory")
        return recorded(step, inputs)

    graphs = DecodeGraphs(Hashing(), capture, max_num_sequences=8, spare_slot=SPARE_SLOT, device=CPU)
    with pytest.raises(DeviceMemoryError, match="no batch size fits"):
        graphs(decoding([1] * 5))
    expected = graphs(decoding([3, 4]))
    with pytest.raises(DeviceMemoryError, match="batches of up to 2 fit") as caught:
        graphs(decoding([1] * 5))
    assert "max_num_seqs=2" in str(caught.value)
    assert torch.equal(graphs(decoding([3, 4])), expected)
