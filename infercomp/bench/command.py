"""``infercomp bench``: tokens a second, a roofline ledger, and peers side by side."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from infercomp.runtime.config import require_int
from infercomp.runtime.errors import InfercompError
from infercomp.shell_arguments import (
    EXIT_WRONG_ANSWER,
    DebugOption,
    DtypeOption,
    ModelArgument,
    OptionsOption,
    errors_shown,
)
from infercomp.shell_input import checked_options, resolve_model
from infercomp.shell_output import show_error, write_atomically

if TYPE_CHECKING:
    from infercomp.bench.run import Outcome, Plan

EPILOG = """[bold]Examples[/]

infercomp bench demo --option quantization=w4a8-g32

infercomp bench ./my-model --decode 1,8 --prefill 1024 --json out.json

infercomp bench demo --dtype bfloat16 --vs llama.cpp,inductor --peer-python ./peers/bin/python"""

_MOST_STEPS = 4096
_WORK = "Work"
_PEERS = "Peers"


def bench(
    model: ModelArgument,
    decode: Annotated[
        str, typer.Option(metavar="N,N", help="Sequences decoded together.", rich_help_panel=_WORK)
    ] = "1,8,32",
    prefill: Annotated[
        str, typer.Option(metavar="N,N", help="Tokens of the prompts computed.", rich_help_panel=_WORK)
    ] = "128,1024,4096",
    steps: Annotated[int, typer.Option(help="Steps of decoding in one repetition.", rich_help_panel=_WORK)] = 64,
    repetitions: Annotated[int, typer.Option(help="Repetitions of everything.", rich_help_panel=_WORK)] = 5,
    threads: Annotated[
        int | None, typer.Option(help="Threads of every side; all cores if not given.", show_default=False)
    ] = None,
    vs: Annotated[
        str,
        typer.Option(
            metavar="PEER,PEER",
            help="Peers measured in turn with infercomp: eager, inductor, llama.cpp, openvino.",
            rich_help_panel=_PEERS,
        ),
    ] = "",
    peer_python: Annotated[
        str,
        typer.Option(
            metavar="PATH",
            help="The Python that has llama-cpp-python or openvino-genai; this one if not given.",
            show_default=False,
            rich_help_panel=_PEERS,
        ),
    ] = sys.executable,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write all that was measured.", show_default=False)
    ] = None,
    dtype: DtypeOption = None,
    option: OptionsOption = None,
    debug: DebugOption = False,
) -> None:
    """Measure tokens a second, and for every kernel how near it comes to what the machine can do.

    Outputs are checked first, infercomp's and every peer's: if one is wrong, no speed is printed and the
    exit code is 1.
    """
    from infercomp.bench.peers import chosen_peers
    from infercomp.bench.run import Plan, Run, num_progress_items
    from infercomp.bench.work import parse_counts
    from infercomp.progress import work_progress

    with errors_shown(debug):
        plan = Plan(
            model=resolve_model(model),
            options=checked_options(option),
            dtype=dtype.value if dtype else None,
            decode=parse_counts(decode, "decode"),
            prefill=parse_counts(prefill, "prefill"),
            num_steps=require_int(steps, "steps", 1, _MOST_STEPS),
            repetitions=require_int(repetitions, "repetitions", 1, 1000),
            num_threads=require_int(threads or os.cpu_count() or 1, "threads", 1, 1024),
            peers=chosen_peers(vs, peer_python),
            peer_python=peer_python,
        )
        with (
            tempfile.TemporaryDirectory(prefix="infercomp_bench_") as folder,
            work_progress(num_progress_items(plan)) as progress,
        ):
            outcome = Run(plan, Path(folder), progress).outcome()
        _report(plan, outcome, json_file)


def _report(plan: Plan, outcome: Outcome, json_file: str | None) -> None:
    from infercomp.bench.machine import describe_run, without_folder
    from infercomp.bench.tables import print_checks, print_outcome, to_json

    console = Console()
    print_checks(outcome, console)
    if not outcome.is_right:
        wrong = ", ".join(check.side for check in outcome.checks if not check.is_passed)
        what = f"the outputs of {wrong} are not those of the model, so nothing was timed"
        show_error(
            InfercompError(what, remedy="see docs/benchmarks.md for what is compared, docs/debugging.md for why")
        )
        raise typer.Exit(EXIT_WRONG_ANSWER)
    print_outcome(outcome, console)
    if json_file is not None:
        configuration = {
            "model": without_folder(plan.model),
            "options": plan.options,
            "dtype": plan.dtype,
            "num_threads": plan.num_threads,
            "repetitions": plan.repetitions,
        }
        write_atomically(json_file, to_json(outcome, describe_run(sys.argv), configuration))
