"""``infercomp dump``: every stage of a model's graph and every generated kernel as files that run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from infercomp.runtime.errors import ConfigError
from infercomp.shell_arguments import MODEL_PANEL, DebugOption, DtypeOption, ModelArgument, errors_shown, explained
from infercomp.shell_input import checked_options


def dump_kernels(
    model: ModelArgument,
    out: Annotated[str, typer.Option("--out", "-o", metavar="DIR", help="Folder for the files.")],
    dtype: DtypeOption = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An option of the compiler. Repeatable.", rich_help_panel=MODEL_PANEL),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Write the graph after each pass, and each generated kernel as a Python file that checks and times it.

    python DIR/kernels/NAME.py builds NAME.cpp beside it, edited or not, and ends with 1 if a result is wrong; an
    edited text is loaded back by the option kernel_overrides.
    """
    with errors_shown(debug):
        report = explained(model, dtype, {**checked_options(option), "dump": out}, None)
        if not report.kernels:
            raise ConfigError(
                "there are no kernels to dump", remedy="use codegen=cpp on a CPU model", field="codegen", where=out
            )
        for kernel in report.kernels:
            typer.echo(str(Path(out) / "kernels" / f"{kernel.name}.py"))
        Console(stderr=True).print(f"{len(report.kernels)} kernels; run one: python FILE", highlight=False)
