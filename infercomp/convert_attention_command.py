"""``infercomp convert-attention``: a model with fewer heads of keys and values, with an account of what that cost."""

from __future__ import annotations

from typing import Annotated

import typer

from infercomp.compare_command import EvalTokensOption, JsonOption, PlotOption, SpeedOption
from infercomp.made_model import CalibrationFolderOption, CalibrationOption, EvaluationOption, make_and_measure
from infercomp.shell_arguments import MODEL_PANEL, DebugOption, DtypeOption, ModelArgument, errors_shown
from infercomp.shell_input import checked_options
from infercomp.texts import Texts

EPILOG = """[bold]Examples[/]

infercomp convert-attention ./my-model -o my-model-gqa --kv-heads 2 --eval text.txt

infercomp convert-attention demo -o smol-mqa --kv-heads 1 --merge aligned --calibration text.txt --eval other.txt"""


def convert_attention(
    model: ModelArgument,
    out: Annotated[str, typer.Option("--out", "-o", metavar="DIR", help="Folder for the converted model.")],
    kv_heads: Annotated[int, typer.Option("--kv-heads", metavar="N", help="Heads of keys and values that are left.")],
    merge: Annotated[
        str, typer.Option(metavar="NAME", help="How the heads of a group become one: mean, first, random or aligned.")
    ] = "mean",
    seed: Annotated[int, typer.Option(help="What random heads are drawn by.")] = 0,
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
    """Merge heads of keys and values and save the model; with --eval, say what that cost next to it in float32.

    DIR is a MODEL of the other commands and of LLM. A folder that holds a saved model is replaced.
    """
    with errors_shown(debug):
        from infercomp.passes.grouped_query import GroupedQuery

        options = {**checked_options(option), "kv_heads": GroupedQuery(kv_heads, merge, seed)}
        texts = Texts(calibration, calibration_folder, evaluation)
        make_and_measure(model, out, dtype, options, texts, eval_tokens, speed, json_file, plot)
