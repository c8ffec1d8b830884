"""Progress bars on standard error, shown on a terminal only."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def request_progress(num_requests: int, wanted: bool) -> Iterator[Callable[[], None]]:
    """A bar over finished requests; the yielded function advances it by one. Off for a single request."""
    if not wanted or num_requests < 2 or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("requests", total=num_requests)
        yield lambda: progress.advance(task)
