"""``torch.compile`` of every family against Inductor and eager: hidden size 512, 4 layers, 4 sequences of 512 tokens.

Each family is compiled once by either backend; then the sides take turns, and the ratio of their medians
is reported. Every output is checked against float64 in the same run: a side whose error is more than four
times eager's is an error, and no figure is written. A call during which other processes, or other guests of the
host, had more than 3 % of the processors is timed again.

    python benchmarks/torch_compile.py --families llama,gpt2 --rounds 7 --output benchmarks/results/torch_compile.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import track

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from cold_start import cpu_model, current_commit
from families import FAMILIES, Family
from references import tensors_of

from infercomp.backend import compile_dynamo
from infercomp.report import Report

BATCH_SIZE, NUM_TOKENS = 4, 512
ALLOWED_ERROR = 4.0
ALLOWED_DISTURBANCE = 0.03
MAX_TRIES, SECONDS_BETWEEN_TRIES = 100, 0.5
CLOCK_TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")
PACKAGES = ("torch", "transformers", "infercomp")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim")
_FEED_FORWARD = ("intermediate_size", "ffn_dim", "hidden_dim", "d_ff")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
_SIZES: dict[str, Any] = {
    **dict.fromkeys(_LAYERS, 4),
    **dict.fromkeys(_WIDTHS, 512),
    **dict.fromkeys(_FEED_FORWARD, 2048),
    **dict.fromkeys(_HEADS, 8),
    **dict.fromkeys(_POSITIONS, NUM_TOKENS + 2),
    "num_key_value_heads": 4, "head_dim": 64, "d_kv": 64, "rotary_dim": 32, "vocab_size": 8192, "sliding_window": 256,
    "image_size": 224, "patch_size": 16, "query_pre_attn_scalar": 64,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip

Run = Callable[[], Any]


def widened(family: Family) -> Family:
    """The family with the sizes of this benchmark; what it does not name stays as it is."""
    arguments = {name: _SIZES.get(name, value) for name, value in family.config_arguments.items()}
    return dataclasses.replace(family, config_arguments=arguments)


def inputs_of(family: Family) -> dict[str, torch.Tensor]:
    if family.takes_tokens:
        return family.example_inputs(NUM_TOKENS, BATCH_SIZE)
    return {"pixel_values": torch.randn(BATCH_SIZE, 3, 224, 224, generator=torch.Generator().manual_seed(1))}


def sides(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], reports: list[Report]) -> dict[str, Run]:
    """Each side as a call that is ready to be timed; what infercomp did goes to ``reports``."""

    def infercomp(graph_module: torch.fx.GraphModule, examples: list[Any]) -> Run:
        return compile_dynamo(graph_module, examples, None, reports.append)

    runs: dict[str, Run] = {"eager": lambda: model(**inputs)}
    for name, backend in (("infercomp", infercomp), ("inductor", "inductor")):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend)
        compiled(**inputs)
        runs[name] = lambda compiled=compiled: compiled(**inputs)
    return runs


def left_to_aten(reports: list[Report]) -> dict[str, int]:
    """Calls of a forward that have no kernel, by op."""
    executions = [each for report in reports for each in report.executions]
    return {each.op: each.calls for each in executions if each.how == "aten" and each.op != "aten.sym_size"}


def check(family: Family, runs: Mapping[str, Run], inputs: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The largest error of each side against float64; raises SystemExit where one is wrong."""
    model = build(family).double()
    exact = tensors_of(model(**{name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}))
    errors = {
        side: max(float((a.double() - b).abs().max()) for a, b in zip(tensors_of(run()), exact, strict=True))
        for side, run in runs.items()
    }
    for side, error in errors.items():
        if not error <= ALLOWED_ERROR * errors["eager"]:
            raise SystemExit(f"{family.name}: {side} errs by {error}, eager by {errors['eager']}; no figure is written")
    return errors


def build(family: Family) -> torch.nn.Module:
    """Weights as transformers draws them: lively ones are for tests, and overflow at this width."""
    torch.manual_seed(0)
    config = family.config_class(**family.config_arguments, attn_implementation=family.attn_implementations[0])
    if family.model_class is None:
        return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return family.model_class(config).eval().requires_grad_(False)


def undisturbed_seconds(run: Run) -> float:
    """The time of one call that had the processors to itself; raises SystemExit where there is none in many."""
    for _ in range(MAX_TRIES):
        busy, own, start = busy_seconds(), time.process_time(), time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        others = busy_seconds() - busy - (time.process_time() - own)
        # The kernel counts in hundredths of a second.
        if others <= ALLOWED_DISTURBANCE * seconds * (os.cpu_count() or 1) + 2 * CLOCK_TICK_SECONDS:
            return seconds
        time.sleep(SECONDS_BETWEEN_TRIES)
    raise SystemExit("other processes leave no call undisturbed; measure on a machine that does nothing else")


def busy_seconds() -> float:
    """Processor time of everybody since the machine started, what the host took included (Linux)."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) * CLOCK_TICK_SECONDS


def measure(family: Family, rounds: int) -> dict[str, Any]:
    """Milliseconds of each side and the ratios of their medians."""
    model, inputs, reports = build(family), inputs_of(family), list[Report]()
    with torch.inference_mode():
        runs = sides(model, inputs, reports)
        errors = check(family, runs, inputs)
        seconds: dict[str, list[float]] = {side: [] for side in runs}
        for _ in range(rounds):
            for side, run in runs.items():
                seconds[side].append(undisturbed_seconds(run))
    medians = {side: statistics.median(times) for side, times in seconds.items()}
    return {
        "milliseconds": {side: [round(1e3 * one, 2) for one in times] for side, times in seconds.items()},
        "inductor_over_infercomp": round(medians["inductor"] / medians["infercomp"], 3),
        "eager_over_infercomp": round(medians["eager"] / medians["infercomp"], 3),
        "largest_error": errors,
        "left_to_aten": left_to_aten(reports),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES), help="names, separated by commas (default: all)")
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of each side (default: 7)")
    parser.add_argument("--output", type=Path, help="JSON file; what it holds of other families stays")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    families = [widened(FAMILIES[name]) for name in arguments.families.split(",")]
    figures = {}
    for family in track(families, description="families"):
        figures[family.name] = measure(family, arguments.rounds)
        print(family.name, {key: figures[family.name][key] for key in figures[family.name] if "over" in key})
        if arguments.output:
            write(arguments.output, figures)


def write(path: Path, figures: Mapping[str, Any]) -> None:
    known = json.loads(path.read_text())["families"] if path.exists() else {}
    result = {
        "command": f"python benchmarks/torch_compile.py {' '.join(sys.argv[1:])}",
        "commit": current_commit(),
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in PACKAGES},
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "shape": {"batch": BATCH_SIZE, "tokens": NUM_TOKENS, "hidden": 512, "layers": 4},
        "families": {**known, **figures},
    }
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
