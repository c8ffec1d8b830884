"""From a captured graph to a program: passes, report, dump, lowering. Both front doors go through here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .codegen.lower import lower
from .codegen.model_graph import ModelGraph
from .config import Config
from .dumps import open_dump
from .passes.graph_pass import PassRecord
from .passes.pipeline import run_pipeline
from .report import Report
from .runtime.program import Program

_SIGNS_OF_A_TRANSFORMER = frozenset({"recognize_attention", "recognize_norm", "fuse_rope", "recognize_gated_mlp"})


@dataclass(frozen=True)
class Compiled:
    """A program with the graph that it was lowered from and the report of how."""

    program: Program
    model_graph: ModelGraph
    report: Report

    @property
    def is_transformer(self) -> bool:
        """Whether anything that infercomp exists for was found, or switched off by the user, in the graph."""
        return any(_found(record) for record in self.report.passes if record.name in _SIGNS_OF_A_TRANSFORMER)


def _found(record: PassRecord) -> bool:
    return bool(record.matches or record.skipped)


def compile_graph(
    model_graph: ModelGraph, config: Config, example_inputs: Mapping[str, Any] | None, *, serving: bool = False
) -> Compiled:
    """Run the pipeline on ``model_graph`` (in place) and lower it; dumps every stage if ``config.dump`` is set."""
    dump = open_dump(config.dump) if config.dump else None
    if dump is not None:
        dump.write_graph(0, "captured", model_graph, example_inputs)
    records = run_pipeline(
        model_graph,
        config.passes,
        serving=serving,
        example_inputs=example_inputs,
        on_change=dump.write_graph if dump else None,
    )
    program = lower(model_graph)
    report = Report(records, program.ops)
    if dump is not None:
        dump.write_report(report)
    return Compiled(program, model_graph, report)
