"""``infercomp quantize``: a model quantised by a recipe and saved, with an account of what that cost."""

from __future__ import annotations

from typing import Annotated

import typer

from infercomp.compare_command import EvalTokensOption, JsonOption, PlotOption, SpeedOption
from infercomp.made_model import CalibrationFolderOption, CalibrationOption, EvaluationOption, make_and_measure
from infercomp.shell_arguments import MODEL_PANEL, DebugOption, DtypeOption, ModelArgument, errors_shown
from infercomp.shell_input import checked_options
from infercomp.texts import Texts

EPILOG = """[bold]Examples[/]

infercomp quantize ./my-model -o my-model-w8a16 --recipe w8a16

infercomp quantize ./my-model -o my-model-w4 --recipe w4a16-gptq --calibration text.txt --eval other.txt --plot w4.png

infercomp quantize demo -o smol-w8a8 --recipe '{"recipe": "w8a8", "smooth_alpha": 0.6}' --calibration text.txt"""


def quantize(
    model: ModelArgument,
    out: Annotated[str, typer.Option("--out", "-o", metavar="DIR", help="Folder for the quantised model.")],
    recipe: Annotated[
        str, typer.Option(metavar="NAME|JSON", help="How to quantise: w8a8, w4a16-g64 …, or a recipe's JSON.")
    ],
    calibration: CalibrationOption = None,
    calibration_folder: CalibrationFolderOption = None,
    evaluation: EvaluationOption = None,
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
        texts = Texts(calibration, calibration_folder, evaluation)
        make_and_measure(model, out, dtype, options, texts, eval_tokens, speed, json_file, plot)
