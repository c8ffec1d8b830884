"""``infercomp save``: a model compiled once, to be served at once ever after."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from infercomp.runtime.config import MEBIBYTE
from infercomp.shell_arguments import MODEL_PANEL, DebugOption, DtypeOption, ModelArgument, errors_shown
from infercomp.shell_input import checked_options, resolve_model, torch_dtype

EPILOG = """[bold]Examples[/]

infercomp save ./my-model -o my-model-w8a8 --option quantization=w8a8

infercomp generate my-model-w8a8 -p "Once upon a time\""""


def save(
    model: ModelArgument,
    out: Annotated[str, typer.Option("--out", "-o", metavar="DIR", help="Folder for the saved model.")],
    dtype: DtypeOption = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="KEY=VALUE", help="An option. Repeatable.", rich_help_panel=MODEL_PANEL),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Compile a model and write what serves it: weights, tokenizer and program, as data that nothing is run from.

    DIR is a MODEL of the other commands and of LLM. A folder that holds a saved model is replaced.
    """
    with errors_shown(debug):
        options: dict[str, Any] = checked_options(option)
        source = resolve_model(model)
        from infercomp.artifact import require_free
        from infercomp.llm import LLM

        require_free(Path(out))
        LLM(source, dtype=torch_dtype(dtype), **options).save(out)
        num_bytes = sum(path.stat().st_size for path in Path(out).iterdir())
        Console(stderr=True).print(f"{out}: {num_bytes / MEBIBYTE:.0f} MiB", highlight=False)
