"""The report: what every pass did and why not, and how every op is executed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .passes.graph_pass import NearMiss, PassRecord, Site
from .runtime.program import OpExecution


@dataclass(frozen=True)
class Report:
    """One compilation. ``passes`` in pipeline order; ``ops`` maps an op to how it is executed.

    ``fallbacks`` says what ran outside of infercomp's own pipeline and why; ``num_graphs`` counts the
    graphs behind the report (more than one where Dynamo broke the model into several).
    """

    passes: tuple[PassRecord, ...] = ()
    executions: tuple[OpExecution, ...] = ()
    fallbacks: tuple[str, ...] = ()
    num_graphs: int = 1

    @property
    def ops(self) -> dict[str, str]:
        """For instance ``{"infercomp.attention": "definition", "aten.embedding": "aten"}``."""
        return {execution.op: execution.how for execution in self.executions}

    def matches_of(self, pass_name: str) -> int:
        return sum(record.matches for record in self.passes if record.name == pass_name)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, color_system=None)
        with console.capture() as capture:
            print_report(self, console)
        return capture.get()


def merged_report(reports: Sequence[Report]) -> Report:
    """The reports of several graphs as one: counts and times added, sites and near misses joined."""
    if len(reports) == 1:
        return reports[0]
    by_name: dict[str, list[PassRecord]] = {}
    for report in reports:
        for record in report.passes:
            by_name.setdefault(record.name, []).append(record)
    executions: dict[tuple[str, str, str | None], int] = {}
    for report in reports:
        for execution in report.executions:
            key = (execution.op, execution.how, execution.reason)
            executions[key] = executions.get(key, 0) + execution.calls
    return Report(
        passes=tuple(_merged_record(records) for records in by_name.values()),
        executions=tuple(OpExecution(op, how, calls, reason) for (op, how, reason), calls in executions.items()),
        fallbacks=tuple(fallback for report in reports for fallback in report.fallbacks),
        num_graphs=len(reports),
    )


def _merged_record(records: list[PassRecord]) -> PassRecord:
    errors = [record.max_error for record in records if record.max_error is not None]
    sites: tuple[Site, ...] = sum((record.sites for record in records), ())
    misses: tuple[NearMiss, ...] = sum((record.near_misses for record in records), ())
    return PassRecord(
        name=records[0].name,
        numeric_class=records[0].numeric_class,
        matches=sum(record.matches for record in records),
        skipped=sum(record.skipped for record in records),
        sites=sites,
        near_misses=misses,
        milliseconds=sum(record.milliseconds for record in records),
        max_error=max(errors) if errors else None,
    )


def print_report(report: Report, console: Any) -> None:
    """The report as tables: passes, near misses with their reasons, and how ops are executed."""
    from rich.table import Table

    passes = Table("pass", "class", "matches", "near misses", "ms", "float64 error", title="passes")
    for record in report.passes:
        error = "" if record.max_error is None else f"{record.max_error:.1e}"
        skipped = f" (+{record.skipped} switched off)" if record.skipped else ""
        passes.add_row(
            record.name,
            record.numeric_class,
            f"{record.matches}{skipped}",
            str(len(record.near_misses)),
            f"{record.milliseconds:.1f}",
            error,
        )
    console.print(passes)
    _print_near_misses(report, console)
    ops = Table("op", "executed as", "calls", title="ops")
    for execution in report.executions:
        ops.add_row(execution.op, execution.how, str(execution.calls))
    console.print(ops)
    for fallback in report.fallbacks:
        console.print(f"fallback: {fallback}")


def _print_near_misses(report: Report, console: Any) -> None:
    from rich.table import Table

    reasons: dict[tuple[str, str, str], int] = {}
    for record in report.passes:
        for miss in record.near_misses:
            key = (record.name, miss.reason, miss.where or "")
            reasons[key] = reasons.get(key, 0) + 1
    if not reasons:
        return
    table = Table("pass", "why it did not match", "where", "times", title="near misses")
    for (name, reason, where), times in reasons.items():
        table.add_row(name, reason, where, str(times))
    console.print(table)
