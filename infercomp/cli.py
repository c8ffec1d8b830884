"""The command line: ``infercomp generate``, ``explain``, ``save``, ``quantize``, ``compare``, ``bench`` and others.

torch is imported inside of the commands, after their options were checked: ``--help`` and a mistake
in an option cost no seconds. An `InfercompError` is shown as a panel and ends with exit code 2.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from infercomp.bench.command import EPILOG as BENCH_EPILOG
from infercomp.bench.command import bench
from infercomp.bench.invariance_command import EPILOG as INVARIANCE_EPILOG
from infercomp.bench.invariance_command import invariance
from infercomp.compare_command import EPILOG as COMPARE_EPILOG
from infercomp.compare_command import compare
from infercomp.convert_attention_command import EPILOG as CONVERT_EPILOG
from infercomp.convert_attention_command import convert_attention
from infercomp.dump_command import dump_kernels
from infercomp.quantize_command import EPILOG as QUANTIZE_EPILOG
from infercomp.quantize_command import quantize
from infercomp.runtime.errors import InfercompError
from infercomp.runtime.request import SamplingParams
from infercomp.save_command import EPILOG as SAVE_EPILOG
from infercomp.save_command import save
from infercomp.shell_arguments import (
    EXIT_WRONG_ANSWER,
    DebugOption,
    DtypeOption,
    ModelArgument,
    OptionsOption,
    errors_shown,
    explained,
)
from infercomp.shell_input import (
    DEMO_MODEL,
    DtypeName,
    chat_prompt,
    checked_options,
    read_prompt,
    resolve_model,
    torch_dtype,
)
from infercomp.shell_output import passes_in_words, print_stats, print_stream, show_error, write_atomically
from infercomp.sparsify_command import EPILOG as SPARSIFY_EPILOG
from infercomp.sparsify_command import sparsify

if TYPE_CHECKING:
    from infercomp.llm import LLM

DEMO_QUESTION = "What is the capital of France?"
DEMO_ANSWER_CONTAINS = "Paris"
_DEMO_PARAMS = SamplingParams(max_tokens=64, temperature=0.0)

app = typer.Typer(
    name="infercomp",
    help="Compiles PyTorch transformers for inference, pass by visible pass.",
    epilog="Start with [bold]infercomp demo[/]; see also [bold]infercomp generate --help[/]",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


_SAMPLING = "Sampling"


def _print_version(wanted: bool) -> None:
    if wanted:
        import infercomp

        typer.echo(f"infercomp {infercomp.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


@app.command(
    epilog="""[bold]Examples[/]

infercomp generate demo --chat --prompt "What is a compiler?"

infercomp generate ./my-model -p "Once upon a time" --temperature 0.8 --seed 1

cat notes.txt | infercomp generate org/name -p - --stop "###" --stats"""
)
def generate(
    model: ModelArgument,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", metavar="TEXT", help="Text to continue; - reads it from standard input.")
    ],
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.", rich_help_panel=_SAMPLING)] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", rich_help_panel=_SAMPLING)] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 is off.", rich_help_panel=_SAMPLING)] = 0,
    top_p: Annotated[float, typer.Option(help="1 is off.", rich_help_panel=_SAMPLING)] = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="Same seed, same text.", show_default=False, rich_help_panel=_SAMPLING)
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Text that ends the output. Repeatable.", rich_help_panel=_SAMPLING),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the model's chat template.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print times and memory to standard error.")] = False,
    dtype: DtypeOption = None,
    option: OptionsOption = None,
    debug: DebugOption = False,
) -> None:
    """Continue a text, or answer a question, printing it as it is generated."""
    with errors_shown(debug):
        text = read_prompt(prompt)
        params = SamplingParams(
            max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=stop
        )
        llm = _load_llm(model, dtype, checked_options(option))
        timing = print_stream(llm, chat_prompt(llm, text) if chat else text, params)
        if stats:
            print_stats(timing, Console(stderr=True))


@app.command(
    epilog="""[bold]Examples[/]

infercomp explain demo

infercomp explain ./my-model --no-verify -o disable=fuse_rope --json out.json

infercomp explain ./my-model --dump stages"""
)
def explain(
    model: ModelArgument,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="Verify on this text.", show_default=False),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify", help="Run the graph before and after each pass in float64 and compare them."
        ),
    ] = True,
    json_file: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE", help="Write the report as JSON; - prints it.", show_default=False),
    ] = None,
    dump: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Write the graph after each pass.", show_default=False),
    ] = None,
    dtype: DtypeOption = None,
    option: OptionsOption = None,
    debug: DebugOption = False,
) -> None:
    """Say what each pass did to the model, why it did no more, and how every op is executed."""
    with errors_shown(debug):
        text = None if prompt is None else read_prompt(prompt)
        options = {"verify": verify, **checked_options(option)}
        if dump is not None:
            options["dump"] = dump
        report = explained(model, dtype, options, text)
        if json_file == "-":
            typer.echo(report.to_json())
            return
        from infercomp.report import print_report

        print_report(report, Console())
        if json_file is not None:
            write_atomically(json_file, report.to_json())


@app.command(
    epilog="""[bold]Example[/]

infercomp build ./my-model --target cuda:90 -o kernels --dtype bfloat16"""
)
def build(
    model: ModelArgument,
    output: Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="Folder for the kernels.")],
    target: Annotated[
        str, typer.Option(metavar="TARGET", help="cuda:80, cuda:90, cuda:100, hip:gfx942 or another that Triton knows.")
    ] = "cuda:90",
    dtype: DtypeOption = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="KEY=VALUE", help="An option of the compiler. Repeatable."),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Compile the Triton kernels that would serve a model on a GPU that need not be here."""
    with errors_shown(debug):
        options = checked_options(option)
        source = resolve_model(model)
        from infercomp.build import build_kernels
        from infercomp.config import parse_options
        from infercomp.loading.loader import load
        from infercomp.shell_output import print_build

        config = parse_options(options)
        loaded = load(source, dtype=torch_dtype(dtype))
        print_build(build_kernels(loaded.model, target, Path(output), config), Console())


@app.command(epilog="[bold]Example[/]\n\ninfercomp demo")
def demo(debug: DebugOption = False) -> None:
    """Ask a small real model for the capital of France; show the answer, what it cost, and every pass.

    Ends with exit code 1 if the answer is wrong.
    """
    with errors_shown(debug):
        console = Console()
        source = resolve_model(DEMO_MODEL)
        console.print(f"{Path(source).name} on {os.cpu_count()} CPU cores", style="dim", highlight=False)
        llm = _load_llm(source, None, {})
        console.print(f"[bold]Question[/]  {DEMO_QUESTION}")
        console.print("[bold]Answer[/]    ", end="")
        timing = print_stream(llm, chat_prompt(llm, DEMO_QUESTION), _DEMO_PARAMS)
        console.print()
        print_stats(timing, console)
        console.print()
        console.print(passes_in_words(llm.report))
        from infercomp.report import print_kernels

        print_kernels(llm.report, console)
        if DEMO_ANSWER_CONTAINS not in timing.text:
            show_error(InfercompError(f"the answer does not contain {DEMO_ANSWER_CONTAINS!r}: {timing.text!r}"))
            raise typer.Exit(EXIT_WRONG_ANSWER)


app.command("dump", epilog="[bold]Example[/]\n\ninfercomp dump demo -o stages")(dump_kernels)
app.command(epilog=BENCH_EPILOG)(bench)
app.command(epilog=INVARIANCE_EPILOG)(invariance)
app.command(epilog=SAVE_EPILOG)(save)
app.command(epilog=QUANTIZE_EPILOG)(quantize)
app.command(epilog=CONVERT_EPILOG)(convert_attention)
app.command(epilog=SPARSIFY_EPILOG)(sparsify)
app.command(epilog=COMPARE_EPILOG)(compare)


def _load_llm(model: str, dtype: DtypeName | None, options: Mapping[str, Any]) -> LLM:
    source = resolve_model(model)
    from infercomp.llm import LLM

    return LLM(source, dtype=torch_dtype(dtype), **options)


def main() -> None:
    """The ``infercomp`` command."""
    for stream in (sys.stdout, sys.stderr):
        # A model may write any character; a terminal that cannot show one must not end the program.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app()
