"""``infercomp sparsify``: a model with zeros among its weights, with an account of what that cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from infercomp.compare_command import EvalTokensOption, JsonOption, PlotOption, SpeedOption
from infercomp.made_model import CalibrationFolderOption, CalibrationOption, EvaluationOption, make_and_measure
from infercomp.shell_arguments import MODEL_PANEL, DebugOption, DtypeOption, ModelArgument, errors_shown
from infercomp.shell_input import checked_options
from infercomp.texts import Texts

EPILOG = """[bold]Examples[/]

infercomp sparsify ./my-model -o my-model-24 --pattern 2:4 --eval text.txt

infercomp sparsify demo -o smol-24 --pattern 2:4 --score sparsegpt --permute --calibration text.txt --eval other.txt

infercomp sparsify demo -o smol-70 --score wanda --density 0.7 --calibration text.txt --eval other.txt

infercomp sparsify demo -o smol-24-int8 --score wanda --calibration text.txt --option quantization=w8a8"""


def sparsify(
    model: ModelArgument,
    out: Annotated[str, typer.Option("--out", "-o", metavar="DIR", help="Folder for the sparse model.")],
    pattern: Annotated[
        str, typer.Option(metavar="N:M", help="So many weights are kept of every M consecutive input channels.")
    ] = "2:4",
    score: Annotated[
        str, typer.Option(metavar="NAME", help="Which are kept: by magnitude, wanda or sparsegpt.")
    ] = "magnitude",
    permute: Annotated[
        bool, typer.Option("--permute", help="Search for the order of channels that keeps most.")
    ] = False,
    tail: Annotated[
        str, typer.Option(metavar="NAME", help="Layers whose channels M does not divide: refuse or pad.")
    ] = "refuse",
    layers: Annotated[
        list[str] | None,
        typer.Option("--layers", metavar="PATTERN", help="Layers that may become sparse, all by default. Repeatable."),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="So much of their weights is left: layers that cost more stay dense."),
    ] = None,
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
    """Make weights of linears zeros and save the model; with --eval, say what that cost next to it in float32.

    DIR is a MODEL of the other commands and of LLM. A folder that holds a saved model is replaced.
    """
    with errors_shown(debug):
        from infercomp.passes.n_m_sparsity import nm_of

        wanted = replace(nm_of(pattern), score=score, permute=permute, tail=tail, density=density)
        options = {
            **checked_options(option),
            "sparsity": replace(wanted, layers=tuple(layers)) if layers else wanted,
        }
        texts = Texts(calibration, calibration_folder, evaluation)
        make_and_measure(model, out, dtype, options, texts, eval_tokens, speed, json_file, plot)
