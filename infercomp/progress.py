"""Progress bars on standard error, shown on a terminal only."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def request_progress(num_requests: int, wanted: bool) -> Iterator[Callable[[], None]]:
    """A bar over finished requests; the yielded function advances it by one. Off for a single request."""
    if not wanted or num_requests < 2 or not sys.stderr.isatty():
        yield lambda: None
        return
    with _bar(num_requests) as (progress, task):
        yield lambda: progress.advance(task)


@contextlib.contextmanager
def work_progress(num_items: int) -> Iterator[Callable[[str], None]]:
    """A bar over pieces of work; the yielded function is given the name of the piece that begins."""
    if not sys.stderr.isatty():
        yield lambda name: None
        return
    with _bar(num_items) as (progress, task):

        def begin(name: str) -> None:
            progress.update(task, description=name, advance=1)

        yield begin


@contextlib.contextmanager
def _bar(total: int) -> Iterator[tuple[Any, Any]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield progress, progress.add_task("requests", total=total)
