"""Decoding steps as CUDA graphs, one for each bucket of batch size and block table width.

A step in which every sequence has one token is padded to its bucket and replayed; other steps run as they
are. Padding computes nothing that lives: its tokens attend to no key and write into a spare block that
the block pool never hands out. Graphs share one memory pool (as vLLM's do), since only one runs at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Protocol

import torch

from .errors import DeviceMemoryError
from .step import StepInputs

Step = Callable[[StepInputs], torch.Tensor]
Replay = Callable[[], torch.Tensor]
SMALLEST_TABLE_WIDTH = 8


@dataclass(frozen=True, order=True)
class Bucket:
    """The sizes that a graph was captured for."""

    num_sequences: int
    table_width: int


class Capture(Protocol):
    """Runs ``step`` on ``inputs`` once and returns what runs it again on whatever those tensors then hold."""

    def __call__(self, step: Step, inputs: StepInputs) -> Replay: ...


def bucket_of(inputs: StepInputs, max_num_sequences: int) -> Bucket | None:
    """The bucket of a step, or None where it is no decoding step of a batch that graphs are for."""
    num_tokens, (num_sequences, table_width) = len(inputs.input_ids), inputs.block_tables.shape
    if num_tokens != num_sequences or num_sequences > max_num_sequences:
        return None
    return Bucket(
        min(_power_of_two(num_sequences), max_num_sequences), max(SMALLEST_TABLE_WIDTH, _power_of_two(table_width))
    )


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


def padded(inputs: StepInputs, bucket: Bucket, spare_slot: int) -> StepInputs:
    """The step with sequences of no keys appended; all rows get logits, the given ones first."""
    num_live, width = inputs.block_tables.shape
    num_added = bucket.num_sequences - num_live

    def extended(values: torch.Tensor, value: int) -> torch.Tensor:
        return torch.nn.functional.pad(values, (0, num_added), value=value)

    return StepInputs(
        input_ids=extended(inputs.input_ids, 0),
        positions=extended(inputs.positions, 0),
        slot_mapping=extended(inputs.slot_mapping, spare_slot),
        block_tables=torch.nn.functional.pad(inputs.block_tables, (0, bucket.table_width - width, 0, num_added)),
        seq_lens=extended(inputs.seq_lens, 0),
        query_start_loc=torch.arange(bucket.num_sequences + 1),
        logits_indices=torch.arange(bucket.num_sequences),
    )


def _nothing_live(bucket: Bucket, spare_slot: int) -> StepInputs:
    empty, tables = torch.zeros(0, dtype=torch.int64), torch.zeros((0, bucket.table_width), dtype=torch.int64)
    return padded(StepInputs(empty, empty, empty, tables, empty, empty, empty), bucket, spare_slot)


class _Captured:
    """One bucket's graph with the tensors that it reads: views of one buffer, filled by one copy."""

    def __init__(self, step: Step, capture: Capture, bucket: Bucket, spare_slot: int, device: torch.device) -> None:
        example = _nothing_live(bucket, spare_slot)
        sizes = [tensor.numel() for tensor in example.tensors()]
        self._host = torch.empty(sum(sizes), dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
        self._device = torch.empty(sum(sizes), dtype=torch.int64, device=device)
        parts = self._device.split(sizes)
        names = [field.name for field in fields(StepInputs)]
        views = {
            name: part.view(tensor.shape) for name, part, tensor in zip(names, parts, example.tensors(), strict=True)
        }
        self._fill(example)
        self._replay = capture(step, StepInputs(**views))

    def _fill(self, inputs: StepInputs) -> None:
        # The copy before has arrived: whoever runs the next step has seen the tokens of the last.
        torch.cat([tensor.reshape(-1) for tensor in inputs.tensors()], out=self._host)
        self._device.copy_(self._host, non_blocking=True)

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        self._fill(inputs)
        return self._replay()


class DecodeGraphs:
    """A step function that replays graphs where it can.

    ``spare_slot`` lies in a block that no request has; ``check`` is called before each step. Raises
    DeviceMemoryError where capturing needs more memory than there is; what was captured before stays usable.
    """

    def __init__(
        self,
        step: Step,
        capture: Capture,
        *,
        max_num_sequences: int,
        spare_slot: int,
        device: torch.device,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._step = step
        self._capture = capture
        self._max_num_sequences = max_num_sequences
        self._spare_slot = spare_slot
        self._device = device
        self._check = check
        self._graphs: dict[Bucket, _Captured] = {}

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The buckets captured so far."""
        return tuple(sorted(self._graphs))

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        self._check()
        bucket = bucket_of(inputs, self._max_num_sequences)
        if bucket is None:
            return self._step(inputs)
        if bucket not in self._graphs:
            self._graphs[bucket] = self._captured(bucket)
        logits = self._graphs[bucket](padded(inputs, bucket, self._spare_slot))
        # The next replay writes over what this one returned.
        return logits[inputs.logits_indices.to(self._device)]

    def _captured(self, bucket: Bucket) -> _Captured:
        try:
            return _Captured(self._step, self._capture, bucket, self._spare_slot, self._device)
        except torch.OutOfMemoryError as error:
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            smaller = [each.num_sequences for each in self._graphs]
            fitting = f"batches of up to {max(smaller)} fit" if smaller else "no batch size fits"
            raise DeviceMemoryError(
                f"there is no memory for a graph of {bucket.num_sequences} sequences and tables of"
                f" {bucket.table_width} blocks; {fitting}",
                field="max_num_seqs",
                remedy=f"lower kv_cache_bytes or num_blocks, set max_num_seqs={max(smaller, default=1)}"
                " or decode_graphs=false",
            ) from error


class CudaCapture:
    """Captures into CUDA graphs of one memory pool."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step, inputs: StepInputs) -> Replay:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(inputs)  # kernels are compiled and loaded outside of the graph
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = step(inputs)

        def replay() -> torch.Tensor:
            graph.replay()
            return logits

        return replay
