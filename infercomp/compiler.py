"""From a captured graph to a program: passes, report, dump, lowering. Both front doors go through here."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .codegen.lower import kernel_language, lower
from .codegen.model_graph import ModelGraph
from .config import Config
from .dumps import Dump, open_dump
from .kernel_files import kernel_files
from .passes.calibration import Calibration, Progress, silent
from .passes.config import PassConfig
from .passes.pipeline import run_pipeline
from .passes.record import PassRecord
from .report import Report
from .runtime.errors import FallbackWarning
from .runtime.kv_pools import TILED_TOKENS
from .runtime.program import Program

_SIGNS_OF_A_TRANSFORMER = frozenset({"recognize_attention", "recognize_norm", "fuse_rope", "recognize_gated_mlp"})


@dataclass(frozen=True)
class Rewritten:
    """A graph after the passes, and what each of them did."""

    model_graph: ModelGraph
    records: tuple[PassRecord, ...]
    dump: Dump | None

    @property
    def is_transformer(self) -> bool:
        """Whether anything that infercomp exists for was found, or switched off by the user, in the graph."""
        return any(_found(record) for record in self.records if record.name in _SIGNS_OF_A_TRANSFORMER)


@dataclass(frozen=True)
class Compiled:
    """A program with the graph that it was lowered from and the report of how."""

    program: Program
    model_graph: ModelGraph
    report: Report


def _found(record: PassRecord) -> bool:
    return bool(record.matches or record.skipped)


def _for_kernels(model_graph: ModelGraph, config: Config) -> PassConfig:
    """The passes' options with the cache laid out as the kernels that will run read it."""
    passes = config.passes
    if passes.kv_cache_layout != "auto":
        return passes
    is_tiled = kernel_language(model_graph, config.codegen) == "cpp" and config.runtime.block_size % TILED_TOKENS == 0
    return replace(passes, kv_cache_layout="tiled" if is_tiled else "rows")


def rewrite_graph(
    model_graph: ModelGraph,
    config: Config,
    example_inputs: Mapping[str, Any] | None,
    *,
    serving: bool = False,
    calibration: Calibration | None = None,
    evaluation: Sequence[Mapping[str, Any]] = (),
    progress: Progress = silent,
) -> Rewritten:
    """Run the pipeline on ``model_graph`` (in place); dumps every stage if ``config.dump`` is set."""
    dump = open_dump(config.dump) if config.dump else None
    if dump is not None:
        dump.write_graph(0, "captured", model_graph, example_inputs)
    records = run_pipeline(
        model_graph,
        _for_kernels(model_graph, config) if serving else config.passes,
        serving=serving,
        example_inputs=example_inputs,
        calibration=calibration,
        evaluation=evaluation,
        on_change=dump.write_graph if dump else None,
        progress=progress,
    )
    return Rewritten(model_graph, records, dump)


def lower_graph(rewritten: Rewritten, config: Config) -> Compiled:
    """The program of a rewritten graph, with the report."""
    program = lower(rewritten.model_graph, config.codegen, strict=config.strict)
    for fallback in program.fallbacks:
        warnings.warn(f"infercomp runs definitions in place of kernels: {fallback}", FallbackWarning, stacklevel=2)
    report = Report(rewritten.records, program.ops, program.fallbacks, 1, program.kernel_uses, program.taken_apart)
    if rewritten.dump is not None:
        rewritten.dump.write_kernels(kernel_files(rewritten.model_graph, config.codegen))
        rewritten.dump.write_report(report)
    return Compiled(program, rewritten.model_graph, report)


def compile_graph(
    model_graph: ModelGraph,
    config: Config,
    example_inputs: Mapping[str, Any] | None,
    *,
    serving: bool = False,
    calibration: Calibration | None = None,
) -> Compiled:
    """Rewrite ``model_graph`` (in place) and lower it."""
    rewritten = rewrite_graph(model_graph, config, example_inputs, serving=serving, calibration=calibration)
    return lower_graph(rewritten, config)
