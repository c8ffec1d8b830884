"""``infercomp invariance``: whether results depend on what else is in the batch, tried out on this machine."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from infercomp.runtime.config import require_int
from infercomp.shell_arguments import (
    EXIT_WRONG_ANSWER,
    DebugOption,
    DtypeOption,
    ModelArgument,
    OptionsOption,
    errors_shown,
)
from infercomp.shell_input import checked_options, resolve_model, torch_dtype
from infercomp.shell_output import require_writable, write_atomically

if TYPE_CHECKING:
    from infercomp.bench.batch_invariance import Invariance

EPILOG = """[bold]Examples[/]

infercomp invariance demo

infercomp invariance ./my-model --dtype bfloat16 --option quantization=w8a8 --workloads 1000 --json out.json"""

_MOST_WORKLOADS = 1 << 20
_MOST_SHOWN = 10


def invariance(
    model: ModelArgument,
    workloads: Annotated[int, typer.Option(metavar="N", help="Random workloads that are tried.")] = 200,
    seed: Annotated[int, typer.Option(help="Same seed, same workloads.")] = 0,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write all that was found.", show_default=False)
    ] = None,
    dtype: DtypeOption = None,
    option: OptionsOption = None,
    debug: DebugOption = False,
) -> None:
    """Compare each token's logits, bit for bit, alone and in random batches, chunks and cache blocks.

    The exit code is 1 if a bit differs.
    """
    with errors_shown(debug):
        num_workloads = require_int(workloads, "workloads", 1, _MOST_WORKLOADS)
        require_writable(json_file)
        source = resolve_model(model)
        options: dict[str, Any] = checked_options(option)
        from infercomp.bench.batch_invariance import measure_invariance
        from infercomp.bench.machine import describe_run, without_folder
        from infercomp.llm import LLM

        llm = LLM(source, dtype=torch_dtype(dtype), **options)
        found = measure_invariance(llm, num_workloads, seed=seed)
        _print(found, Console())
        if json_file is not None:
            configuration = {"model": without_folder(source), "options": options, "seed": seed}
            configuration["dtype"] = dtype.value if dtype else None
            facts = {"schema": 1, **describe_run(sys.argv), **configuration, **asdict(found)}
            write_atomically(json_file, json.dumps(facts, indent=2) + "\n")
        if found.differences:
            raise typer.Exit(EXIT_WRONG_ANSWER)


def _print(found: Invariance, console: Console) -> None:
    what = f"{found.num_tokens:,} tokens in {found.num_workloads} workloads"
    if not found.differences:
        console.print(f"{what}: every bit of their logits is what it is alone", highlight=False)
        return
    console.print(f"{what}: {len(found.differences):,} have other logits than alone", style="red", highlight=False)
    table = Table("workload", "tokens of the sequence", "token", "largest difference")
    for each in found.differences[:_MOST_SHOWN]:
        table.add_row(str(each.workload), str(each.length), str(each.position), f"{each.largest:.3g}")
    console.print(table)
