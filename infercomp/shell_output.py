"""What the commands print: the text as it comes, times and memory, the passes in words, an error as a panel."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from infercomp.process_stats import peak_memory_bytes, seconds_since_start
from infercomp.runtime.config import MEBIBYTE
from infercomp.runtime.errors import ConfigError, InfercompError
from infercomp.runtime.request import SamplingParams

if TYPE_CHECKING:
    from infercomp.build import Build
    from infercomp.llm import LLM
    from infercomp.report import Report


@dataclass(frozen=True)
class Timing:
    """One generation: its text, and when its first token and its last came, in seconds since process start."""

    text: str
    num_tokens: int
    num_tokens_at_first: int
    first_seconds: float
    last_seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens that came after the first piece of text; None if there are none."""
        num_tokens, seconds = self.num_tokens - self.num_tokens_at_first, self.last_seconds - self.first_seconds
        return num_tokens / seconds if num_tokens > 0 and seconds > 0 else None


def print_build(build: Build, console: Console) -> None:
    """One line a kernel, and what runs without one."""
    table = Table(title=f"kernels for {build.target}", title_justify="left")
    for heading in ("kernel", "ops"):
        table.add_column(heading, overflow="fold")
    for heading in ("registers", "spilled bytes", "shared bytes", "warps"):
        table.add_column(heading, justify="right")
    for kernel in build.kernels:
        ops = ", ".join(op.removeprefix("infercomp.").removesuffix(".default") for op in kernel.ops)
        numbers = (kernel.registers, kernel.spill_bytes, kernel.shared_bytes, kernel.num_warps)
        style = "yellow" if kernel.spill_bytes else None
        table.add_row(kernel.name, ops, *map(str, numbers), style=style)
    console.print(table)
    for op, reason in build.elsewhere.items():
        console.print(f"{op} has no kernel: {reason}", highlight=False)
    console.print(f"{len(build.kernels)} kernels and manifest.json in {build.folder}", highlight=False)


def print_stream(llm: LLM, prompt: Any, params: SamplingParams) -> Timing:
    """Print the completion as it comes; an interrupt leaves the cursor on a line of its own."""
    pieces: list[str] = []
    num_tokens_at_first, first_seconds = 0, 0.0
    try:
        for piece in llm.stream(prompt, params):
            if not pieces:
                num_tokens_at_first, first_seconds = llm.stats.num_generated_tokens, seconds_since_start()
            pieces.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()
    finally:
        if pieces:
            sys.stdout.write("\n")
            sys.stdout.flush()
    last_seconds = seconds_since_start()
    num_tokens = llm.stats.num_generated_tokens
    if not pieces:
        num_tokens_at_first, first_seconds = num_tokens, last_seconds
    return Timing("".join(pieces), num_tokens, num_tokens_at_first, first_seconds, last_seconds)


def print_stats(timing: Timing, console: Console) -> None:
    rate = timing.tokens_per_second
    table = Table.grid(padding=(0, 2))
    table.add_row("tokens", str(timing.num_tokens), "generated, the end of the text included")
    table.add_row("speed", "-" if rate is None else f"{rate:.1f} tokens/s", "after the first token")
    table.add_row("cold start", f"{timing.first_seconds:.1f} s", "from process start to the first token")
    table.add_row("peak memory", f"{peak_memory_bytes() / MEBIBYTE:.0f} MiB", "resident, everything included")
    table.columns[2].style = "dim"
    console.print(table)


def passes_in_words(report: Report) -> Table:
    from infercomp.passes.pipeline import PIPELINE

    sentences = {each.name: _first_sentence(sys.modules[each.run.__module__].__doc__) for each in PIPELINE}
    table = Table(title="What the compiler did", title_justify="left")
    table.add_column("pass", no_wrap=True)
    table.add_column("matches", justify="right")
    table.add_column("ms", justify="right")
    table.add_column("in words")
    for record in report.passes:
        table.add_row(record.name, str(record.matches), f"{record.milliseconds:.0f}", sentences[record.name])
    return table


def _first_sentence(docstring: str | None) -> str:
    return (docstring or "").strip().partition("\n\n")[0].replace("\n", " ").replace("``", "")


def show_error(error: InfercompError) -> None:
    body = Text(error.what)
    for label, value in (("where", error.where), ("remedy", error.remedy)):
        if value:
            body.append(f"\n{label + ':':<8}", style="bold").append(value)
    panel = Panel(body, title=type(error).__name__, title_align="left", border_style="red")
    Console(stderr=True).print(panel)


def require_writable(path: str | None) -> None:
    """Raise ConfigError for a file that could not be written in the end; None is none."""
    if path is None:
        return
    folder = Path(path).resolve().parent
    if Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        remedy = "name a file in a folder that exists and can be written to"
        raise ConfigError("the file cannot be written", where=path, remedy=remedy)


def write_atomically(path: str, content: str | bytes) -> None:
    """A file that is either as it was or whole."""
    temporary = f"{path}.part"
    try:
        Path(temporary).write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(
            f"the report cannot be written: {error.strerror}", where=path, remedy="name a file that can be written"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
