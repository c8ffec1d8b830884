"""Arguments that several commands take, how their errors are shown, and the report that two of them make."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from infercomp.runtime.errors import InfercompError
from infercomp.shell_input import DtypeName, example_inputs, resolve_model, torch_dtype
from infercomp.shell_output import show_error

if TYPE_CHECKING:
    from infercomp.report import Report

EXIT_WRONG_ANSWER = 1
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count

MODEL_PANEL = "Model"

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
        rich_help_panel=MODEL_PANEL,
    ),
]
DtypeOption = Annotated[
    DtypeName | None,
    typer.Option(
        metavar="TYPE",
        help="Type of the parameters: float32, bfloat16, float16 or float64; the checkpoint's own if not given, "
        "float32 for a quantised GGUF file.",
        show_default=False,
        rich_help_panel=MODEL_PANEL,
    ),
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def explained(model: str, dtype: DtypeName | None, options: Mapping[str, Any], text: str | None) -> Report:
    """The report of the graph that ``LLM`` would serve; no cache is allocated."""
    source = resolve_model(model)
    from infercomp.compiler import compile_graph
    from infercomp.config import parse_options
    from infercomp.loading.loader import load
    from infercomp.serving import capture_for_serving, position_limit

    config = parse_options(options)
    loaded = load(source, dtype=torch_dtype(dtype))
    captured, examples = capture_for_serving(loaded.model, position_limit(loaded.model))
    if text is not None:
        examples = example_inputs(loaded, text, examples)
    return compile_graph(captured, config, examples, serving=True).report


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
