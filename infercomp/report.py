"""The report: what every pass did and why not, and how every op is executed."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

from .passes.record import NearMiss, PassRecord, Site
from .runtime.program import KernelUse, OpExecution, TakenApart

_NUM_WORST_LAYERS = 5


@dataclass(frozen=True)
class Report:
    """One compilation. ``passes`` in pipeline order; ``ops`` maps an op to how it is executed.

    ``fallbacks`` says what ran outside of infercomp's own pipeline and why; ``num_graphs`` counts the
    graphs behind the report (more than one where Dynamo broke the model into several). ``kernels`` are
    the generated ones; ``taken_apart`` the fused groups that no kernel takes, with reasons.
    """

    passes: tuple[PassRecord, ...] = ()
    executions: tuple[OpExecution, ...] = ()
    fallbacks: tuple[str, ...] = ()
    num_graphs: int = 1
    kernels: tuple[KernelUse, ...] = ()
    taken_apart: tuple[TakenApart, ...] = ()

    @property
    def ops(self) -> dict[str, str]:
        """For instance ``{"infercomp.attention": "definition", "aten.embedding": "aten"}``."""
        return {execution.op: execution.how for execution in self.executions}

    @property
    def layer_errors(self) -> dict[str, float]:
        """The relative error of each quantised layer's output, by its name; empty unless it was measured."""
        return {each.layer: each.relative_error for record in self.passes for each in record.layer_errors}

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
        num_graphs=sum(report.num_graphs for report in reports),
        kernels=_counted([kernel for report in reports for kernel in report.kernels], "calls"),
        taken_apart=_counted([group for report in reports for group in report.taken_apart], "count"),
    )


_Counted = TypeVar("_Counted", KernelUse, TakenApart)


def _counted(entries: Sequence[_Counted], field: str) -> tuple[_Counted, ...]:
    """Entries that differ in the count ``field`` alone as one."""
    totals: Counter[_Counted] = Counter()
    for entry in entries:
        totals[_with(entry, field, 0)] += getattr(entry, field)
    return tuple(_with(entry, field, total) for entry, total in totals.items())


def _with(entry: _Counted, field: str, value: int) -> _Counted:
    changes: dict[str, Any] = {field: value}
    return dataclasses.replace(entry, **changes)


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
        layer_errors=sum((record.layer_errors for record in records), ()),
    )


def print_report(report: Report, console: Any) -> None:
    """The report as tables that fit 80 columns: passes (matches applied, switched off, missed; float64
    error where measured), near misses with their reasons, and how ops are executed."""
    passes = _table("passes", "pass", "class", "matches", "off", "missed", "ms", "error")
    for record in report.passes:
        error = "" if record.max_error is None else f"{record.max_error:.1e}"
        counts = (record.matches, record.skipped or "", len(record.near_misses))
        milliseconds = f"{record.milliseconds:.0f}"
        passes.add_row(record.name, record.numeric_class, *map(str, counts), milliseconds, error)
    console.print(passes)
    print_layer_errors(report.layer_errors, console)
    _print_near_misses(report, console)
    ops = _table("ops", "op", "executed as", "calls")
    for execution in report.executions:
        ops.add_row(execution.op, execution.how, str(execution.calls))
    console.print(ops)
    print_kernels(report, console)
    for fallback in report.fallbacks:
        console.print(f"fallback: {fallback}")


def print_layer_errors(errors: Mapping[str, float], console: Any) -> None:
    """The quantised layers whose outputs err most, and the median of all; nothing where none was measured."""
    if not errors:
        return
    table = _table("relative errors of outputs", "layer", "", "error")
    ranked = sorted(errors.items(), key=lambda item: item[1], reverse=True)
    for layer, error in ranked[:_NUM_WORST_LAYERS]:
        table.add_row(layer, "", f"{error:.2%}")
    table.add_row(f"median of {len(errors)} layers", "", f"{statistics.median(errors.values()):.2%}")
    console.print(table)


def _table(title: str, *headings: str) -> Any:
    """A light table whose first two columns are text and never cut, and whose others are numbers."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    for position, heading in enumerate(headings):
        table.add_column(heading, no_wrap=True, justify="left" if position < 2 else "right")
    return table


def print_kernels(report: Report, console: Any) -> None:
    """The generated kernels, the calls that have none, and the fused groups that were taken apart, with reasons."""
    if report.kernels:
        kernels = _table("kernels", "kernel", "computes", "calls")
        kernels.columns[1].no_wrap = False
        for kernel in report.kernels:
            name = f"{kernel.name} (overridden)" if kernel.is_overridden else kernel.name
            kernels.add_row(name, _in_words(kernel.ops), str(kernel.calls))
        console.print(kernels)
    without = [(e.op, e.how, e.reason, e.calls) for e in report.executions if e.reason is not None]
    reasons = {reason for _, _, reason, _ in without}
    if report.kernels or len(reasons) > 1:
        _print_reasons("calls without a kernel", ("op", "runs as", "why", "calls"), without, console)
    else:
        for reason in reasons:
            console.print(f"no kernels: {reason}", markup=False, highlight=False)
    apart = [(_in_words(group.ops), group.reason, group.where or "", group.count) for group in report.taken_apart]
    _print_reasons("groups taken apart", ("group", "why", "where", "times"), apart, console)


def _in_words(ops: Sequence[str]) -> str:
    """Ops without their namespaces, equal neighbours counted."""
    names = [(op.split(".")[-1], len(list(alike))) for op, alike in groupby(ops)]
    return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in names)


def _print_near_misses(report: Report, console: Any) -> None:
    reasons: dict[tuple[str, str, str], int] = {}
    for record in report.passes:
        for miss in record.near_misses:
            key = (record.name, miss.reason, miss.where or "")
            reasons[key] = reasons.get(key, 0) + 1
    rows = [(*key, times) for key, times in reasons.items()]
    _print_reasons("near misses", ("pass", "why it did not match", "where", "times"), rows, console)


def _print_reasons(title: str, headings: Sequence[str], rows: Sequence[Sequence[Any]], console: Any) -> None:
    from rich import box
    from rich.table import Table

    if not rows:
        return
    table = Table(*headings, title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table)
