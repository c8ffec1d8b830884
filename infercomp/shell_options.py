"""What all commands share: their common options, their exit codes, and how they end at a mistake or an interrupt."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console

from infercomp.runtime.errors import InfercompError
from infercomp.shell_input import DtypeName
from infercomp.shell_output import show_error

EXIT_WRONG_ANSWER = 1
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count

_MODEL = "Model"

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder with config.json and safetensors, a .gguf file, a hub id, or the word [bold]demo[/].",
        show_default=False,
    ),
]
OptionsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-o",
        metavar="KEY=VALUE",
        help="An option of the compiler or the runtime, such as disable=fuse_rope or num_blocks=64. Repeatable.",
        rich_help_panel=_MODEL,
    ),
]
DtypeOption = Annotated[
    DtypeName | None,
    typer.Option(
        metavar="TYPE",
        help="Type of the parameters: float32, bfloat16, float16 or float64; the checkpoint's own if not given, "
        "float32 for a quantised GGUF file.",
        show_default=False,
        rich_help_panel=_MODEL,
    ),
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@contextlib.contextmanager
def errors_shown(debug: bool) -> Iterator[None]:
    """Turn a mistake of the user into a panel and exit code 2, and an interrupt into exit code 130."""
    try:
        yield
    except InfercompError as error:
        if debug:
            Console(stderr=True).print_exception()
        show_error(error)
        raise typer.Exit(EXIT_ERROR) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted", style="yellow")
        raise typer.Exit(EXIT_INTERRUPTED) from None
