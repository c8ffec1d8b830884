"""``infercomp compare``: saved models next to the one that they were made from, in one table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from infercomp.runtime.config import require_int
from infercomp.runtime.errors import ConfigError, ModelLoadError
from infercomp.shell_arguments import DebugOption, ModelArgument, errors_shown
from infercomp.shell_input import resolve_model
from infercomp.shell_output import require_writable, write_atomically

EPILOG = """[bold]Examples[/]

infercomp compare ./my-model my-model-w8a8 --eval text.txt

infercomp compare ./my-model my-model-w8a8 my-model-w4 --eval text.txt --json all.json --plot all.png --no-speed"""

MOST_EVAL_TOKENS = 1 << 20

EvalTokensOption = Annotated[
    int, typer.Option("--eval-tokens", metavar="N", help="How much of the text is measured on, from its beginning.")
]
JsonOption = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Write all that was measured.", show_default=False)
]
PlotOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Draw the error of each layer, or quality against size of several models: .png, .svg or .pdf.",
        show_default=False,
    ),
]
SpeedOption = Annotated[bool, typer.Option("--speed/--no-speed", help="Time the decoding of one sequence.")]


def compare(
    model: ModelArgument,
    saved: Annotated[list[str], typer.Argument(metavar="OUT...", help="Models made from it.", show_default=False)],
    evaluation: Annotated[str, typer.Option("--eval", metavar="FILE", help="Text to measure on.")],
    eval_tokens: EvalTokensOption = 4096,
    speed: SpeedOption = True,
    json_file: JsonOption = None,
    plot: PlotOption = None,
    debug: DebugOption = False,
) -> None:
    """Measure models next to the one that they were made from: divergence, perplexity, top-1, size and speed.

    MODEL is served in float32 and is the reference.
    """
    with errors_shown(debug):
        most_tokens = require_int(eval_tokens, "eval_tokens", 128, MOST_EVAL_TOKENS)
        require_outputs(json_file, plot, evaluation)
        for path in saved:
            if not Path(path).exists():
                raise ModelLoadError("There is no such model.", where=path, remedy="name what quantize or save wrote")
        from infercomp.calibration_samples import text_of

        text_of(Path(evaluation), "evaluation")
        report_accounts(resolve_model(model), saved, evaluation, most_tokens, speed, json_file, plot)


def require_outputs(json_file: str | None, plot: str | None, evaluation: str | None) -> None:
    """Raise ConfigError for files that cannot be written, or that nothing is measured for."""
    from infercomp.plots import require_plotting

    for name, path in (("json", json_file), ("plot", plot)):
        if path is not None and evaluation is None:
            what = f"--{name} holds what was measured, and nothing is measured without --eval"
            raise ConfigError(what, remedy="name a text with --eval", field=name)
        require_writable(path)
    require_plotting(plot)


def report_accounts(
    model: str,
    saved: Sequence[str],
    evaluation: str,
    most_tokens: int,
    speed: bool,
    json_file: str | None,
    plot: str | None,
) -> None:
    """Measure, print the table, and write the files that are asked for."""
    from infercomp.account import accounts_json
    from infercomp.bench.machine import describe_run, without_folder
    from infercomp.comparison import compare as compare_models
    from infercomp.comparison import print_accounts
    from infercomp.plots import plot_of

    names = [without_folder(path) for path in saved]
    named = dict(zip(names if len(set(names)) == len(names) else saved, saved, strict=True))
    accounts = compare_models(model, named, evaluation, most_tokens=most_tokens, times=speed)
    print_accounts(accounts, Console())
    if json_file is not None:
        write_atomically(json_file, accounts_json(accounts, **describe_run(sys.argv), model=without_folder(model)))
    if plot is not None:
        write_atomically(plot, plot_of(accounts, Path(plot).suffix))
