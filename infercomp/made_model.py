"""What the commands share that make a model of another: it is made, saved, and measured next to where it came from."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from infercomp.compare_command import MOST_EVAL_TOKENS, report_accounts, require_outputs
from infercomp.runtime.config import MEBIBYTE, require_int
from infercomp.shell_input import DtypeName, resolve_model, torch_dtype
from infercomp.texts import Texts

_PANEL = "Texts"

CalibrationOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="Text to learn from, where that is needed.", show_default=False, rich_help_panel=_PANEL
    ),
]
CalibrationFolderOption = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="Keep what that text shows, layer by layer: the command goes on there after it was cut off.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
EvaluationOption = Annotated[
    str | None,
    typer.Option(
        "--eval",
        metavar="FILE",
        help="Text to measure on: print what it cost.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]


def make_and_measure(
    model: str,
    out: str,
    dtype: DtypeName | None,
    options: Mapping[str, Any],
    texts: Texts,
    eval_tokens: int,
    speed: bool,
    json_file: str | None,
    plot: str | None,
) -> None:
    """Compile ``model`` with these options, save it in ``out`` and, with a text for ``evaluation``, print accounts.

    All that can be wrong with the arguments is found before the model is loaded.
    """
    most_tokens = require_int(eval_tokens, "eval_tokens", 128, MOST_EVAL_TOKENS)
    require_outputs(json_file, plot, texts.evaluation)
    from infercomp.calibration_samples import require_calibration, text_of
    from infercomp.config import parse_options

    passes = parse_options(options).passes
    require_calibration(passes, is_given=texts.calibration is not None)
    for field, path in (("calibration", texts.calibration), ("evaluation", texts.evaluation)):
        if path is not None:
            text_of(Path(path), field)
    source = resolve_model(model)
    from infercomp.artifact import require_free
    from infercomp.llm import LLM

    require_free(Path(out))
    llm = LLM(source, dtype=torch_dtype(dtype), **vars(texts), **options)
    llm.save(out)
    num_bytes = sum(path.stat().st_size for path in Path(out).iterdir())
    Console(stderr=True).print(f"{out}: {num_bytes / MEBIBYTE:.0f} MiB", highlight=False)
    if texts.evaluation is not None:
        # What was saved is measured, and its memory is needed for the model in float32.
        del llm
        gc.collect()
        report_accounts(source, [out], texts.evaluation, most_tokens, speed, json_file, plot)
