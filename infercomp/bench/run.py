"""The run: reference, checks, then all sides in turn, then the ledger. Nothing here loads a model: workers do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from infercomp.bench.ceilings import Ceilings, measure_ceilings
from infercomp.bench.checks import CHECK_STEPS, Check, check_of, check_work
from infercomp.bench.peers import Peer, python_of
from infercomp.bench.session import Worker
from infercomp.bench.work import Work, blocks_needed, plan_work, require_batches
from infercomp.config import parse_options

OURS = "infercomp"
_WORKERS = "infercomp.bench.workers"
_TEXT_TOKENS = 8192
_LEDGER_STEPS = 16


@dataclass(frozen=True)
class Plan:
    """What was asked for; ``model`` is a path or a hub id, ``dtype`` a name or None."""

    model: str
    options: dict[str, Any]
    dtype: str | None
    decode: Sequence[int]
    prefill: Sequence[int]
    num_steps: int
    repetitions: int
    num_threads: int
    peers: Sequence[Peer]
    peer_python: str


@dataclass
class Measured:
    """One piece of work: the seconds of every repetition by side, in the order in which they were taken."""

    work: Work
    seconds: dict[str, list[float]]


@dataclass
class Outcome:
    """All that a run found. Where a check failed nothing was timed: ``measured`` and ``ledgers`` are empty."""

    ceilings: Ceilings
    sides: dict[str, dict[str, Any]]
    checks: list[Check]
    notes: list[str]
    measured: list[Measured] = field(default_factory=list)
    ledgers: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def is_right(self) -> bool:
        return all(check.is_passed for check in self.checks)


Progress = Callable[[str], None]


class Run:
    """One plan being carried out; ``folder`` holds what is written for peers and is the caller's to delete."""

    def __init__(self, plan: Plan, folder: Path, progress: Progress) -> None:
        self._plan = plan
        self._folder = folder
        self._progress = progress
        self._config = parse_options(plan.options)
        require_batches(plan.decode, self._config.runtime)
        self._sides: dict[str, dict[str, Any]] = {}

    def outcome(self) -> Outcome:
        """Measure. Raises InfercompError where a model, an option or a peer does not do; workers end in any case."""
        text, reference = self._ask_reference()
        self._progress("ceilings of the machine")
        ceilings = measure_ceilings(self._config.codegen, self._plan.num_threads)
        outcome = Outcome(ceilings, self._sides, [], self._notes)
        with ExitStack() as stack:
            ours = stack.enter_context(Worker(OURS, f"{_WORKERS}.infercomp_worker", self._folder))
            outcome.checks.append(self._start_ours(ours, text, reference))
            workers = {OURS: ours}
            for peer in self._plan.peers if outcome.is_right else ():
                workers[peer.name] = stack.enter_context(self._worker(peer))
                outcome.checks.append(self._start_peer(peer, workers[peer.name], text, reference))
            if outcome.is_right:
                outcome.measured = [self._measure(work, workers, text) for work in self._work]
                outcome.ledgers = {work.name: self._ledger(work, ours, text, ceilings) for work in self._work}
            for name, worker in workers.items():
                self._sides[name]["peak_memory_bytes"] = worker.peak_memory_bytes
        return outcome

    def _ask_reference(self) -> tuple[list[int], list[list[int]]]:
        """Text to compute on, the greedy tokens of the checks, and, in a file, logits: from the model in float32."""
        plan = self._plan
        self._progress("reference in float32")
        with Worker("reference", f"{_WORKERS}.eager_worker", self._folder) as worker:
            loaded = worker.ask("load", model=plan.model, dtype="float32", threads=plan.num_threads)
            limit, runtime = loaded["position_limit"], self._config.runtime
            self._work, self._notes = plan_work(plan.decode, plan.prefill, plan.num_steps, limit, runtime)
            self._check = check_work(limit, runtime)
            text = worker.ask("text", num_tokens=_TEXT_TOKENS)
            worker.ask("logits", tokens=self._check.prompts(text)[0], file=str(self._logits_file))
            tokens = worker.ask("decode", prompts=self._check.prompts(text), num_steps=CHECK_STEPS)["tokens"]
        return text, tokens

    @property
    def _logits_file(self) -> Path:
        return self._folder / "reference.npy"

    def _start_ours(self, worker: Worker, text: list[int], reference: list[list[int]]) -> Check:
        plan, runtime = self._plan, self._config.runtime
        self._progress(f"{OURS}: compiling")
        needed = blocks_needed([*self._work, self._check], runtime.max_num_batched_tokens, runtime)
        options = {"num_blocks": needed, **plan.options}
        loaded = worker.ask("load", model=plan.model, dtype=plan.dtype, threads=plan.num_threads, options=options)
        self._sides[OURS] = loaded
        prompts = self._check.prompts(text)
        divergence = worker.ask("compare", tokens=prompts[0], reference=str(self._logits_file))
        tokens = worker.ask("decode", prompts=prompts, num_steps=CHECK_STEPS)["tokens"]
        return check_of(OURS, loaded["weight_bits"], tokens, reference, divergence["mean_nats"])

    def _worker(self, peer: Peer) -> Worker:
        return Worker(peer.name, peer.module, self._folder, python_of(peer, self._plan.peer_python))

    def _start_peer(self, peer: Peer, worker: Worker, text: list[int], reference: list[list[int]]) -> Check:
        bits = self._sides[OURS]["weight_bits"]
        form = peer.forms[bits]
        self._progress(f"{peer.name} as {form}")
        source = {"file": self._gguf_file(form)} if peer.is_gguf else {"model": self._plan.model, "dtype": form}
        loaded = worker.ask("load", **source, threads=self._plan.num_threads)
        self._sides[peer.name] = {"form": form, **loaded}
        tokens = worker.ask("decode", prompts=self._check.prompts(text), num_steps=CHECK_STEPS)["tokens"]
        return check_of(peer.name, min(bits, 16) if form == "F16" else bits, tokens, reference)

    def _gguf_file(self, form: str) -> str:
        file = self._folder / f"{form}.gguf"
        if not file.exists():
            with Worker("gguf", f"{_WORKERS}.gguf_worker", self._folder) as worker:
                worker.ask("export", model=self._plan.model, weight_type=form, file=str(file))
        return str(file)

    def _measure(self, work: Work, workers: dict[str, Worker], text: list[int]) -> Measured:
        """Every side once to warm up, then all sides in turn, so that a machine that drifts drifts for all."""
        for name, worker in workers.items():
            self._progress(f"{work.name}: {name} warms up")
            _run(work, worker, text)
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(self._plan.repetitions):
            for name, worker in workers.items():
                self._progress(f"{work.name}: {name}")
                seconds[name].append(_run(work, worker, text))
        return Measured(work, seconds)

    def _ledger(self, work: Work, ours: Worker, text: list[int], ceilings: Ceilings) -> dict[str, Any]:
        self._progress(f"ledger of {work.name}")
        given = asdict(ceilings) | {"bandwidth": ceilings.bandwidth}
        if work.num_steps:
            steps = min(work.num_steps, _LEDGER_STEPS)
            return ours.ask("decode_ledger", prompts=work.prompts(text), num_steps=steps, ceilings=given)
        return ours.ask("prefill_ledger", tokens=work.prompts(text)[0], ceilings=given)


def _run(work: Work, worker: Worker, text: list[int]) -> float:
    prompts = work.prompts(text)
    if work.num_steps:
        return worker.ask("decode", prompts=prompts, num_steps=work.num_steps)["seconds"]
    return worker.ask("prefill", tokens=prompts[0])["seconds"]


def num_progress_items(plan: Plan) -> int:
    """How often ``progress`` is called at most."""
    num_sides, num_work = 1 + len(plan.peers), len(plan.decode) + len(plan.prefill)
    return 3 + len(plan.peers) + num_work * (num_sides * (1 + plan.repetitions) + 1)
