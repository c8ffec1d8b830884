"""Whether a token's logits are the same bits whatever the batch, the chunks and the cache blocks are.

A sequence computed alone is compared with itself among others: in steps of some of them, cut into chunks anywhere, its
blocks scattered over a cache that holds no numbers elsewhere.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..passes.calibration import Progress
from ..progress import work_progress
from ..runtime.kv_pools import allocate_pools
from ..runtime.step import StepInputs

if TYPE_CHECKING:
    from ..llm import LLM
    from ..served_model import ServedModel

LENGTHS = (1, 5, 17, 40, 77, 300)
_BLOCK_SIZES = (16, 32, 48)
_LONGEST_CHUNK = 20
_NO_NUMBER_OF_INT8 = -128


@dataclass(frozen=True)
class Difference:
    """A token whose logits were others in company: which workload, the length of its sequence, and its place there."""

    workload: int
    length: int
    position: int
    largest: float
    """The largest |difference| of its logits."""


@dataclass(frozen=True)
class Invariance:
    """What was compared, and where bits were not the same."""

    num_workloads: int
    num_tokens: int
    differences: tuple[Difference, ...]


def measure_invariance(
    llm: LLM,
    num_workloads: int,
    *,
    seed: int = 0,
    lengths: Sequence[int] = LENGTHS,
    progress: Progress = work_progress,
) -> Invariance:
    """Random workloads over sequences of random tokens, as long as the model takes them."""
    draw = random.Random(seed)
    vocab_size = llm._served.form.vocab_size
    sequences = [[draw.randrange(vocab_size) for _ in range(n)] for n in lengths if n <= llm.max_model_len]
    alone = [llm.logits(sequence) for sequence in sequences]
    num_tokens, differences = 0, []
    with progress(num_workloads) as begin:
        for workload in range(num_workloads):
            begin(f"workload {workload + 1}")
            chosen = draw.sample(range(len(sequences)), draw.randint(1, len(sequences)))
            for i, position, row in logits_in_company(llm._served, [sequences[i] for i in chosen], draw):
                num_tokens += 1
                expected = alone[chosen[i]][position]
                if not torch.equal(row, expected):
                    largest = float((row - expected).abs().max())
                    differences.append(Difference(workload, len(sequences[chosen[i]]), position, largest))
    return Invariance(num_workloads, num_tokens, tuple(differences))


def logits_in_company(
    served: ServedModel, sequences: Sequence[Sequence[int]], draw: random.Random
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Each token's logits [vocabulary], with the number of its sequence and its position, as steps compute them."""
    chunks = [_chunks(len(sequence), draw) for sequence in sequences]
    block_size = draw.choice(_BLOCK_SIZES)
    num_blocks = [-(-len(sequence) // block_size) for sequence in sequences]
    free = list(range(2 * sum(num_blocks)))
    draw.shuffle(free)
    pools = allocate_pools(served.form.cache_specs, len(free), block_size, served.device)
    for pool in pools.values():
        pool.fill_(float("nan") if pool.is_floating_point() else _NO_NUMBER_OF_INT8)
    tables = [[free.pop() for _ in range(count)] for count in num_blocks]
    step, done = served.with_pools(pools), [0] * len(sequences)
    while any(chunks):
        waiting = [i for i, left in enumerate(chunks) if left]
        active = draw.sample(waiting, draw.randint(1, len(waiting)))
        spans = [(i, done[i], done[i] + chunks[i].pop(0)) for i in active]
        inputs = _step_inputs(sequences, spans, tables, block_size)
        rows = [(i, position) for i, start, stop in spans for position in range(start, stop)]
        yield from ((i, position, row) for (i, position), row in zip(rows, step(inputs), strict=True))
        for i, _, stop in spans:
            done[i] = stop


def _chunks(length: int, draw: random.Random) -> list[int]:
    """Single tokens, a few, and all that is left."""
    chunks: list[int] = []
    while length:
        chunks.append(draw.choice([1, min(length, draw.randint(1, _LONGEST_CHUNK)), length]))
        length -= chunks[-1]
    return chunks


def _step_inputs(
    sequences: Sequence[Sequence[int]],
    spans: Sequence[tuple[int, int, int]],
    tables: Sequence[Sequence[int]],
    block_size: int,
) -> StepInputs:
    """A step over tokens start…stop of some sequences, with logits for every token."""
    rows = [(i, position) for i, start, stop in spans for position in range(start, stop)]
    slots = [tables[i][position // block_size] * block_size + position % block_size for i, position in rows]
    width = max(len(tables[i]) for i, _, _ in spans)
    return StepInputs(
        input_ids=torch.tensor([sequences[i][position] for i, position in rows]),
        positions=torch.tensor([position for _, position in rows]),
        slot_mapping=torch.tensor(slots),
        block_tables=torch.tensor([[*tables[i], *[0] * (width - len(tables[i]))] for i, _, _ in spans]),
        seq_lens=torch.tensor([stop for _, _, stop in spans]),
        query_start_loc=torch.tensor([0, *(stop - start for _, start, stop in spans)]).cumsum(0),
        logits_indices=torch.arange(len(rows)),
    )
