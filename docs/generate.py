"""Writes ``docs/passes.md`` from the docstrings of the passes, the pipeline tuple and the small model families, and the
measured tables of ``docs/quantization.md`` from ``quantization.json``, ``quantization_tools.json`` and
``quantization_papers.json`` of ``benchmarks/results``.

python docs/generate.py               both; the table of families is kept as it is
python docs/generate.py --families    the table too: compiles every family, takes minutes
python docs/generate.py --check       only says whether the other parts are up to date
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from infercomp.passes.graph_pass import Pass
from infercomp.passes.pipeline import PIPELINE

DOCS = Path(__file__).resolve().parent
TARGET = DOCS / "passes.md"
QUANTIZATION = DOCS / "quantization.md"
MEASURED = DOCS.parent / "benchmarks" / "results" / "quantization.json"
OTHER_TOOLS = MEASURED.with_name("quantization_tools.json")
PAPERS = MEASURED.with_name("quantization_papers.json")
PAPERS_LEGEND = """The BERTs have 4 layers of 128 channels and were trained here for some minutes to fill in masked
characters; one learned with outlier channels, so that it depends on them. KL is that of masked characters from the same
model in float32, top-1 the share of masked characters that are found. *Simulated* are weights rounded in floats by what
a paper compares with and infercomp does not offer. Bits are those of codes and, but for simulated rows, of scales and
tables; what stays in floats is left out."""
PLANTED = "planted:"
MEASURED_HEADING = "## Measured\n"
FAMILIES_FILE = DOCS.parent / "tests" / "families.py"
FAMILIES_HEADING = "## Families\n"

INTRODUCTION = """# Passes

Written by `docs/generate.py` from the docstrings of the passes; change those, not this file.

A pass is a named rewrite of the graph. They run in this order, which is the tuple `PIPELINE` in
`infercomp/passes/pipeline.py`; *after* is the order that a pass declares and the runner checks. The frame around
them refreshes metadata, checks the structure, counts, times, measures and dumps. `serving` passes run for `LLM` only.
How to switch one off, or one match of one, is in [debugging.md](debugging.md).
"""

FAMILIES_INTRODUCTION = """
Matches of each pass on small models with random weights, built from the `transformers` config class of each family
with two attention layers (`tests/families.py`), once with each implementation of attention that the family has.
Decoders are compiled as `LLM` does it, the others through `torch.compile`. A dash is a pass that does not run there.
"""


def passes_part() -> str:
    """All that follows from the source of the passes alone."""
    return "\n".join([INTRODUCTION, *_overview(), "", *(_section(each) for each in PIPELINE), ""])


def docstring_of(graph_pass: Pass) -> str:
    """The docstring of the file that holds the pass."""
    docstring = sys.modules[graph_pass.run.__module__].__doc__
    assert docstring, f"{graph_pass.name} says nothing of itself"
    return docstring.strip()


def _overview() -> Iterator[str]:
    yield "| # | pass | numeric class | after | runs for |"
    yield "|--:|---|---|---|---|"
    for number, each in enumerate(PIPELINE, start=1):
        runs_for = "`LLM`" if each.serving else "all"
        after = ", ".join(f"`{name}`" for name in each.after) or "—"
        yield f"| {number} | [`{each.name}`](#{each.name}) | {each.numeric_class.name} | {after} | {runs_for} |"


def _section(graph_pass: Pass) -> str:
    required = "" if graph_pass.optional else "\nIt cannot be switched off: serving cannot do without it.\n"
    paragraphs = [_markdown(paragraph) for paragraph in docstring_of(graph_pass).split("\n\n")]
    return f"## {graph_pass.name}\n\n" + "\n\n".join(paragraphs) + f"\n{required}"


def _markdown(paragraph: str) -> str:
    """A paragraph with an arrow in it is a before and after, and stays as it is laid out."""
    if "->" in paragraph:
        return f"```text\n{textwrap.dedent(paragraph)}\n```"
    return paragraph.replace("``", "`")


def families_part() -> str:
    """The table of matches; every family is built and compiled for it."""
    columns = [each.name for each in PIPELINE]
    lines = [FAMILIES_HEADING + FAMILIES_INTRODUCTION]
    lines.append("| family | attention | " + " | ".join(_narrow(name) for name in columns) + " |")
    lines.append("|---|---|" + "--:|" * len(columns))
    families = _load_families().FAMILIES.values()
    for family in families:
        for attention in family.attn_implementations:
            print(f"compiling {family.name} with {attention} attention", file=sys.stderr)
            matches = _matches(family, attention)
            cells = [str(matches.get(name, "–")) for name in columns]
            lines.append(f"| {family.name} | {attention} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _narrow(pass_name: str) -> str:
    """A heading that may break between its words."""
    return pass_name.replace("_", " ")


def _matches(family: Any, attention: str) -> dict[str, int]:
    import torch

    import infercomp

    torch._dynamo.reset()
    model = family.build(attention)
    if family.is_decoder:
        report = infercomp.LLM(model).report
    else:
        report = infercomp.explain(model, options={"verify": False}, **family.example_inputs())
    return {record.name: record.matches for record in report.passes}


def _load_families() -> ModuleType:
    spec = importlib.util.spec_from_file_location("families", FAMILIES_FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["families"] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def split(text: str) -> tuple[str, str]:
    """The part about the passes, and the table of families with its heading."""
    passes, heading, families = text.partition(FAMILIES_HEADING)
    return passes, heading + families


def measured_part() -> str:
    """The tables of what was measured: a line a recipe, then with outliers planted, then other tools."""
    rows = json.loads(MEASURED.read_text())["models"]
    plain = {name: row for name, row in rows.items() if not name.startswith(PLANTED)}
    planted = {name.removeprefix(PLANTED): row for name, row in rows.items() if name.startswith(PLANTED)}
    parts = [MEASURED_HEADING, *_measured_table(plain)]
    if planted:
        parts += ["", "With outliers planted, a hundred times the size of other channels, in every norm's output:", ""]
        parts += _measured_table(planted)
    tools = json.loads(OTHER_TOOLS.read_text())["tools"]
    parts += ["", "Other tools on the same model, texts and measure (`benchmarks/quantization_tools.py`):", ""]
    parts += ["| tool | bits | mean KL | p99 KL | top-1 | perplexity |", "|---|" + "--:|" * 5]
    parts += [f"| {name} | " + " | ".join(_quality_cells(row)) + " |" for name, row in _by_bits(tools)]
    claims = json.loads(PAPERS.read_text())["claims"]
    parts += ["", "What the papers claim, in kind (`benchmarks/quantization_papers.py`).", PAPERS_LEGEND, ""]
    parts += ["| claim | of | quantised as | bits | mean KL | top-1 |", "|---|---|---|" + "--:|" * 3]
    parts += [line for claim in claims for line in _claim_lines(claim)]
    return "\n".join(parts) + "\n"


def _measured_table(rows: Mapping[str, Any]) -> Iterator[str]:
    yield "| recipe | bits | linears, MB | all, MB | mean KL | p99 KL | top-1 | perplexity | seconds | peak, MiB |"
    yield "|---|" + "--:|" * 9
    for name, row in _by_bits({name: {**row, **row["size"]} for name, row in rows.items()}):
        yield f"| `{name}` | " + " | ".join(_measured_cells(row)) + " |"


def _claim_lines(claim: Mapping[str, Any]) -> Iterator[str]:
    verdict = "holds" if claim["holds"] else "does not hold here"
    cells = [f"{claim['paper']}: {claim['claim']}. **{verdict}**{_iterations(claim)}", claim["model"]]
    for row in claim["rows"]:
        name = f"{row['name']} (simulated)" if row["is_simulated"] else row["name"]
        share = row["accuracy"] if "accuracy" in row else row["top_1"]
        yield f"| {' | '.join(cells)} | {name} | {row['bits']:.2f} | {row['mean_nats']:.4f} | {share:.1%} |"
        cells = ["", ""]


def _iterations(claim: Mapping[str, Any]) -> str:
    found = claim.get("iterations")
    return "" if found is None else f" ({found['gobo']:.0f} iterations against {found['k_means']:.0f} of K-means)"


def _by_bits(rows: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return sorted(rows.items(), key=lambda item: -item[1]["bits_per_weight"])


def _quality_cells(row: dict[str, Any]) -> Iterator[str]:
    quality = row["quality"]
    yield f"{row['bits_per_weight']:.2f}"
    yield from (f"{quality[name]:.4f}" for name in ("mean_nats", "p99_nats"))
    yield f"{quality['top_1']:.1%}"
    yield f"{quality['perplexity']:.2f}"


def _measured_cells(row: dict[str, Any]) -> Iterator[str]:
    quality, size, cost = row["quality"], row["size"], row["quantization"]
    yield f"{size['bits_per_weight']:.2f}"
    yield from (f"{size[name] / 1e6:.1f}" for name in ("linear_bytes", "model_bytes"))
    yield from (f"{quality[name]:.4f}" for name in ("mean_nats", "p99_nats"))
    yield f"{quality['top_1']:.1%}"
    yield f"{quality['perplexity']:.2f}"
    yield from (f"{cost[name]:.0f}" for name in ("seconds", "peak_memory_mib")) if cost else ("", "")


def with_measured(text: str) -> str:
    """The document with the table as it is now; it is the last part."""
    return text.partition(MEASURED_HEADING)[0] + measured_part()


def is_measured_current() -> bool:
    text = QUANTIZATION.read_text()
    return text == with_measured(text)


def is_current() -> bool:
    return TARGET.exists() and split(TARGET.read_text())[0] == passes_part()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the passes are out of date")
    parser.add_argument("--families", action="store_true", help="compile every family and write their table anew")
    chosen = parser.parse_args(arguments)
    if chosen.check:
        stale = [TARGET] * (not is_current()) + [QUANTIZATION] * (not is_measured_current())
        for each in stale:
            print(f"{each.name} is out of date: run python docs/generate.py", file=sys.stderr)
        return int(bool(stale))
    kept = split(TARGET.read_text())[1] if TARGET.exists() else ""
    TARGET.write_text(passes_part() + (families_part() if chosen.families else kept))
    QUANTIZATION.write_text(with_measured(QUANTIZATION.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
