"""The ledger: for every kernel what it must move and do, the least time for that, and the time it took."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from infercomp.bench.engine_runs import decoding, run_prompt
from infercomp.bench.protocol import Tokens, stopwatch
from infercomp.codegen.costs import Cost, SequenceLengths, cost_of, label_of
from infercomp.llm import LLM
from infercomp.runtime.native_step import NativeStep, StepTiming
from infercomp.runtime.program import Program
from infercomp.runtime.step import StepInputs

_NANOSECOND = 1e-9


@dataclass
class Row:
    """All calls of one kernel. Seconds are those of all threads, divided by their number."""

    kernel: str
    label: str
    ops: tuple[str, ...]
    calls: float = 0
    num_bytes: float = 0
    operations: dict[str, float] = field(default_factory=dict)
    least_seconds: float = 0.0
    seconds: float = 0.0

    def add(self, cost: Cost, least_seconds: float, seconds: float) -> None:
        self.calls += 1
        self.num_bytes += cost.num_bytes
        for unit, count in cost.operations.items():
            self.operations[unit] = self.operations.get(unit, 0) + count
        self.least_seconds += least_seconds
        self.seconds += seconds

    def divided_by(self, count: int) -> Row:
        return replace(
            self,
            calls=self.calls / count,
            num_bytes=self.num_bytes / count,
            operations={unit: number / count for unit, number in self.operations.items()},
            least_seconds=self.least_seconds / count,
            seconds=self.seconds / count,
        )


@dataclass
class _ModelCall:
    """One step of the engine: how long the compiled model took, and the sequences in it."""

    seconds: float
    sequences: list[SequenceLengths]


@dataclass
class _Recording:
    """Everything that was timed; ``seconds`` is all of it, the engine included."""

    program: Program
    calls: list[_ModelCall]
    timings: list[tuple[NativeStep, list[StepTiming]]]
    seconds: float = 0.0


def decode_ledger(llm: LLM, prompts: Sequence[Tokens], num_steps: int, ceilings: Mapping[str, Any]) -> dict[str, Any]:
    """The ledger of one step of decoding, as the mean of ``num_steps`` (half of them timed kernel by kernel)."""
    count = max(1, num_steps // 2)
    with decoding(llm._engine, prompts, 2 * count) as state:
        untimed = [_seconds_of(state.step) for _ in range(count)]
        with _recorded(llm) as recording:
            for _ in range(count):
                state.step()
    return _ledger(recording, count, statistics.median(untimed), ceilings)


def prefill_ledger(llm: LLM, tokens: Tokens, ceilings: Mapping[str, Any]) -> dict[str, Any]:
    """The ledger of computing one prompt, which may take several steps of the engine."""
    untimed = _seconds_of(lambda: run_prompt(llm._engine, tokens))
    with _recorded(llm) as recording:
        run_prompt(llm._engine, tokens)
    return _ledger(recording, 1, untimed, ceilings)


def _seconds_of(action: Callable[[], None]) -> float:
    with stopwatch() as watch:
        action()
    return watch.seconds


@contextmanager
def _recorded(llm: LLM) -> Iterator[_Recording]:
    """Every step of the engine inside of the block is timed: whole, in the model, and in each kernel."""
    engine, program = llm._engine, llm._served.program
    model, calls = engine.model, []

    def timed_model(inputs: StepInputs) -> torch.Tensor:
        start = time.perf_counter()
        logits = model(inputs)
        calls.append(_ModelCall(time.perf_counter() - start, _sequences(inputs)))
        return logits

    with ExitStack() as stack:
        steps = [step for step in program.steps if isinstance(step, NativeStep)]
        timings = [(step, stack.enter_context(step.timed())) for step in steps]
        recording = _Recording(program, calls, timings)
        engine.model = timed_model
        try:
            with stopwatch() as watch:
                yield recording
        finally:
            engine.model = model
        recording.seconds = watch.seconds


def _sequences(inputs: StepInputs) -> list[SequenceLengths]:
    num_queries = inputs.query_start_loc.diff().tolist()
    return [SequenceLengths(*pair) for pair in zip(num_queries, inputs.seq_lens.tolist(), strict=True)]


def _ledger(recording: _Recording, count: int, untimed: float, ceilings: Mapping[str, Any]) -> dict[str, Any]:
    num_threads = torch.get_num_threads()
    rows, native = _rows(recording, num_threads, ceilings)
    rows = [row.divided_by(count) for row in rows]
    in_kernels, in_model = sum(row.seconds for row in rows), sum(call.seconds for call in recording.calls) / count
    native_seconds, total = native / count, recording.seconds / count
    num_bytes = sum(row.num_bytes for row in rows)
    return {
        "rows": [asdict(row) for row in sorted(rows, key=lambda row: -row.seconds)],
        "outside_of_kernels": {
            "threads waiting for each other": native_seconds - in_kernels,
            "model between native steps": in_model - native_seconds,
            "engine, sampling and text": total - in_model,
        },
        "num_bytes": num_bytes,
        "least_seconds": sum(row.least_seconds for row in rows),
        "seconds_timed_by_kernel": total,
        "seconds": untimed,
        "bandwidth_share": num_bytes / untimed / ceilings["bandwidth"],
    }


def _rows(recording: _Recording, num_threads: int, ceilings: Mapping[str, Any]) -> tuple[list[Row], float]:
    """A row for each kernel, and the seconds of all native steps."""
    rows: dict[str, Row] = {}
    costs: dict[tuple, tuple[Cost, float]] = {}
    native = 0
    for step, timings in recording.timings:
        for call, timing in zip(recording.calls, timings, strict=True):
            native += timing.nanoseconds
            for each, nanoseconds in zip(step.calls, timing.call_nanoseconds, strict=True):
                kernel = recording.program.kernels[each.kernel]
                sizes = tuple(timing.sizes[place] for place in each.symbols)
                key = (each.kernel, sizes, tuple(call.sequences))
                if key not in costs:
                    cost = cost_of(kernel.spec, sizes, call.sequences)
                    costs[key] = cost, cost.seconds(ceilings["bandwidth"], ceilings["operations_per_second"])
                row = rows.setdefault(each.kernel, Row(each.kernel, label_of(kernel.spec), kernel.ops))
                row.add(*costs[key], nanoseconds * _NANOSECOND / num_threads)
    return list(rows.values()), native * _NANOSECOND
