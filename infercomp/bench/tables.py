"""What ``infercomp bench`` prints, and the same as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from infercomp.bench.ceilings import Ceilings
from infercomp.bench.run import OURS, Measured, Outcome

SCHEMA = 1
_GIGA = 1e9
_MILLI = 1e-3
_MEBIBYTE = 1 << 20


def summary(measured: Measured) -> dict[str, dict[str, float]]:
    """Tokens a second of each side (median, least, most), and the ratio of our median to the side's."""
    ours = statistics.median(measured.seconds[OURS])
    rows = {}
    for side, seconds in measured.seconds.items():
        rates = [measured.work.num_timed_tokens / each for each in seconds]
        rows[side] = {
            "median": measured.work.num_timed_tokens / statistics.median(seconds),
            "least": min(rates),
            "most": max(rates),
            "ratio_of_ours": statistics.median(seconds) / ours,
        }
    return rows


def to_json(outcome: Outcome, description: Mapping[str, Any], configuration: Mapping[str, Any]) -> str:
    """Everything that was measured, every repetition included."""
    measured = [
        {
            **asdict(each.work),
            "name": each.work.name,
            "seconds": each.seconds,
            "tokens_per_second": summary(each),
        }
        for each in outcome.measured
    ]
    parts = {
        "schema": SCHEMA,
        **description,
        "configuration": configuration,
        "notes": outcome.notes,
        "ceilings": asdict(outcome.ceilings),
        "sides": outcome.sides,
        "checks": [{**asdict(check), "is_passed": check.is_passed} for check in outcome.checks],
        "measured": measured,
        "ledgers": outcome.ledgers,
    }
    return json.dumps(parts, indent=2) + "\n"


def print_checks(outcome: Outcome, console: Console) -> None:
    """How near every side is to the model in float32."""
    table = _table("outputs next to the model in float32", "side", "form")
    for heading in ("first tokens", "all tokens", "nats", ""):
        table.add_column(heading, justify="right")
    for check in outcome.checks:
        nats = "" if check.mean_nats is None else f"{check.mean_nats:.2g}"
        verdict = "agrees" if check.is_passed else "[red]wrong[/]"
        shares = (f"{check.first_tokens:.0%}", f"{check.all_tokens:.0%}")
        table.add_row(check.side, outcome.sides[check.side]["form"], *shares, nats, verdict)
    console.print(table)


def print_outcome(outcome: Outcome, console: Console) -> None:
    """Ceilings, speeds of all sides, memory, and the ledger of each piece of work."""
    _print_ceilings(outcome.ceilings, console)
    _print_speeds(outcome, console)
    for name, ledger in outcome.ledgers.items():
        _print_ledger(name, ledger, console)
    for note in outcome.notes:
        console.print(note, style="dim", highlight=False)


def _print_ceilings(ceilings: Ceilings, console: Console) -> None:
    table = _table("what this machine reaches", "", "")
    for threads, rate in ceilings.read_bytes_per_second.items():
        table.add_row(f"streaming reads, {_threads(threads)}", f"{rate / _GIGA:.1f} GB/s")
    for unit, rate in ceilings.operations_per_second.items():
        table.add_row(f"{unit}, {_threads(ceilings.num_threads)}", f"{rate / _GIGA:.0f} Gop/s")
    console.print(table)


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _print_speeds(outcome: Outcome, console: Console) -> None:
    table = _table("tokens per second", "work", "side")
    for heading in ("median", "least", "most", "ours / side", "peak MiB"):
        table.add_column(heading, justify="right")
    for measured in outcome.measured:
        for side, row in summary(measured).items():
            memory = f"{outcome.sides[side]['peak_memory_bytes'] / _MEBIBYTE:.0f}"
            ratio = "" if side == OURS else f"{row['ratio_of_ours']:.2f}"
            rates = (f"{row[name]:.1f}" for name in ("median", "least", "most"))
            table.add_row(measured.work.name, f"{side} {outcome.sides[side]['form']}", *rates, ratio, memory)
    console.print(table)


def _print_ledger(name: str, ledger: Mapping[str, Any], console: Console) -> None:
    unit = "a step" if name.startswith("decode") else "the prompt"
    table = _table(f"ledger of {name}: {unit}", "kernel", "ops")
    for heading in ("calls", "MB", "Mop", "least ms", "ms", "reached"):
        table.add_column(heading, justify="right")
    for row in ledger["rows"]:
        table.add_row(row["label"], _ops(row["ops"]), *_amounts(row))
    for what, seconds in ledger["outside_of_kernels"].items():
        table.add_row(what, "", "", "", "", "", f"{seconds / _MILLI:.3f}", "")
    total = {"least_seconds": ledger["least_seconds"], "seconds": ledger["seconds_timed_by_kernel"]}
    times = (f"{total[name] / _MILLI:.3f}" for name in ("least_seconds", "seconds"))
    table.add_section()
    table.add_row("sum", "", "", f"{ledger['num_bytes'] / 1e6:.2f}", "", *times, _share(**total))
    console.print(table)
    console.print(
        f"{unit} without these clocks: {ledger['seconds'] / _MILLI:.3f} ms, "
        f"{ledger['bandwidth_share']:.0%} of the streaming bandwidth\n",
        highlight=False,
    )


def _amounts(row: Mapping[str, Any]) -> Iterator[str]:
    yield f"{row['calls']:.0f}"
    yield f"{row['num_bytes'] / 1e6:.2f}"
    yield f"{sum(row['operations'].values()) / 1e6:.1f}"
    yield f"{row['least_seconds'] / _MILLI:.3f}"
    yield f"{row['seconds'] / _MILLI:.3f}"
    yield _share(row["least_seconds"], row["seconds"])


def _share(least_seconds: float, seconds: float) -> str:
    return f"{least_seconds / seconds:.0%}" if seconds else ""


def _ops(ops: Sequence[str]) -> str:
    """Ops by their short names, views and tuples left out."""
    names = [op.removesuffix(".default").rpartition(".")[2] if op.count(".") else "" for op in ops]
    parts = [op.split(".")[1] if op.count(".") > 1 else name for op, name in zip(ops, names, strict=True)]
    return ", ".join(dict.fromkeys(part for part in parts if part))


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table
