"""``infercomp quantize``: a model quantised by a recipe and saved, with an account of what that cost."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from infercomp.compare_command import (
    MOST_EVAL_TOKENS,
    EvalTokensOption,
    JsonOption,
    PlotOption,
    SpeedOption,
    report_accounts,
    require_outputs,
)
from infercomp.runtime.config import MEBIBYTE, require_int
from infercomp.shell_arguments import MODEL_PANEL, DebugOption, DtypeOption, ModelArgument, errors_shown
from infercomp.shell_input import checked_options, resolve_model, torch_dtype

EPILOG = """[bold]Examples[/]

infercomp quantize ./my-model -o my-model-w8a16 --recipe w8a16

infercomp quantize ./my-model -o my-model-w4 --recipe w4a16-gptq --calibration text.txt --eval other.txt --plot w4.png

infercomp quantize demo -o smol-w8a8 --recipe '{"recipe": "w8a8", "smooth_alpha": 0.6}' --calibration text.txt"""

_TEXTS = "Texts"


def quantize(
    model: ModelArgument,
    out: Annotated[str, typer.Option("--out", "-o", metavar="DIR", help="Folder for the quantised model.")],
    recipe: Annotated[
        str, typer.Option(metavar="NAME|JSON", help="How to quantise: w8a8, w4a16-g64 …, or a recipe's JSON.")
    ],
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Text that the recipe learns from, if it needs any.",
            show_default=False,
            rich_help_panel=_TEXTS,
        ),
    ] = None,
    calibration_folder: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Keep what that text shows, layer by layer: the command goes on there after it was cut off.",
            show_default=False,
            rich_help_panel=_TEXTS,
        ),
    ] = None,
    evaluation: Annotated[
        str | None,
        typer.Option(
            "--eval",
            metavar="FILE",
            help="Text to measure on: print what quantising cost.",
            show_default=False,
            rich_help_panel=_TEXTS,
        ),
    ] = None,
    eval_tokens: EvalTokensOption = 4096,
    speed: SpeedOption = True,
    json_file: JsonOption = None,
    plot: PlotOption = None,
    dtype: DtypeOption = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="KEY=VALUE", help="An option. Repeatable.", rich_help_panel=MODEL_PANEL),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Quantise a model by a recipe and save it; with --eval, say what that cost next to the model in float32.

    DIR is a MODEL of the other commands and of LLM. A folder that holds a saved model is replaced.
    """
    with errors_shown(debug):
        options = {**checked_options(option), "quantization": recipe}
        most_tokens = require_int(eval_tokens, "eval_tokens", 128, MOST_EVAL_TOKENS)
        require_outputs(json_file, plot, evaluation)
        from infercomp.calibration_samples import require_calibration, text_of
        from infercomp.config import parse_options

        require_calibration(parse_options(options).passes.recipe, is_given=calibration is not None)
        for field, path in (("calibration", calibration), ("evaluation", evaluation)):
            if path is not None:
                text_of(Path(path), field)
        source = resolve_model(model)
        from infercomp.artifact import require_free
        from infercomp.llm import LLM

        require_free(Path(out))
        llm = LLM(
            source,
            dtype=torch_dtype(dtype),
            calibration=calibration,
            calibration_folder=calibration_folder,
            evaluation=evaluation,
            **options,
        )
        llm.save(out)
        num_bytes = sum(path.stat().st_size for path in Path(out).iterdir())
        Console(stderr=True).print(f"{out}: {num_bytes / MEBIBYTE:.0f} MiB", highlight=False)
        if evaluation is not None:
            # What was saved is measured, and its memory is needed for the model in float32.
            del llm
            gc.collect()
            report_accounts(source, [out], evaluation, most_tokens, speed, json_file, plot)
