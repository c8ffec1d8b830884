"""What each recipe costs on SmolLM2: divergence from float32, perplexity, size, speed, seconds and peak memory.

All linears but the LM head are quantised. The text is the language reference that every Python carries: topics in the
order of their names, every second one for calibration, and 4,096 tokens of the others in windows of 512 for evaluation.
Every recipe is applied in a fresh process, whose seconds and peak memory are those of loading, quantising and saving;
what was saved is then measured next to the model in float32.

A recipe named ``planted:w8a8`` is applied to the same model with outliers planted: two channels of each norm's output
are 100 times larger, and the weights that read them 100 times smaller, which changes nothing in floats.

    python benchmarks/quantization.py --recipes bf16,w8a16,w8a8 --output benchmarks/results/quantization.json
    python benchmarks/quantization.py --plot docs/quantization.png    (from what the file holds, measuring nothing)
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from cold_start import cpu_model, current_commit
from rich.progress import track

RESULTS = Path(__file__).parent / "results" / "quantization.json"
PACKAGES = ("torch", "transformers", "infercomp")
EVALUATION_TOKENS = 4096
PLANTED, FACTOR, CHANNELS = "planted:", 100.0, (3, 17)
FLOATS = "bf16"
"""The row of the model that is not quantised, in 16 bits."""


def halves() -> tuple[str, str]:
    """The texts for calibration and for evaluation."""
    names = sorted(topics)
    return tuple("\n\n".join(topics[name] for name in names[start::2]) for start in (0, 1))  # type: ignore[return-value]


def quantize_here(recipe: str, folder: str, calibration_tokens: int) -> dict[str, float]:
    """Quantise the demo model in this process and save it."""
    import torch

    import infercomp
    from infercomp.demo_model import demo_model_path
    from infercomp.process_stats import peak_memory_bytes

    start = time.perf_counter()
    if recipe == FLOATS:
        llm = infercomp.LLM(demo_model_path(), dtype=torch.bfloat16)
    else:
        llm = quantized(recipe, calibration_tokens)
    llm.save(folder)
    return {"seconds": time.perf_counter() - start, "peak_memory_mib": peak_memory_bytes() / (1 << 20)}


def quantized(recipe: str, calibration_tokens: int) -> Any:
    import torch

    import infercomp
    from infercomp.config import parse_options
    from infercomp.demo_model import demo_model_path
    from infercomp.loading.gguf_file import read_gguf_file
    from infercomp.loading.gguf_tokenizer import build_gguf_tokenizer
    from infercomp.loading.loader import load

    options: dict[str, Any] = {"quantization": recipe.removeprefix(PLANTED), "quantize_lm_head": False}
    if parse_options(options).passes.recipe.needs_calibration:  # type: ignore[union-attr]
        tokenizer = build_gguf_tokenizer(read_gguf_file(demo_model_path()))
        ids = tokenizer(halves()[0])["input_ids"][:calibration_tokens]
        options["calibration"] = torch.tensor(ids)
    if not recipe.startswith(PLANTED):
        return infercomp.LLM(demo_model_path(), dtype=torch.float32, **options)
    loaded = load(demo_model_path(), dtype=torch.float32)
    plant_outliers(loaded.model)
    return infercomp.LLM(loaded.model, loaded.tokenizer, **options)


def plant_outliers(model: Any) -> None:
    """In place; an identity up to the rounding of float32."""
    import torch

    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                norm.weight[list(CHANNELS)] *= FACTOR
                for reader in readers:
                    reader.weight[:, list(CHANNELS)] /= FACTOR


def quantize_fresh(recipe: str, folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--recipes", recipe, "--child", str(folder)]
    command += ["--calibration-tokens", str(arguments.calibration_tokens)]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    return result


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """A row a recipe, and one of the reference."""
    from infercomp.comparison import compare
    from infercomp.demo_model import demo_model_path

    recipes = arguments.recipes.split(",")
    with tempfile.TemporaryDirectory() as scratch:
        folders = {recipe: Path(scratch) / recipe.replace(":", "-") for recipe in recipes}
        costs = {
            recipe: quantize_fresh(recipe, folder, arguments)
            for recipe, folder in track(folders.items(), description="quantising")
        }
        text = [halves()[1]]
        accounts = compare(demo_model_path(), folders, text, most_tokens=EVALUATION_TOKENS, times=arguments.speed)
    facts = run_facts()
    return {each.name: {**asdict(each), "quantization": costs.get(each.name), **facts} for each in accounts}


def run_facts() -> dict[str, Any]:
    import torch

    return {
        "command": shlex.join(["python", "benchmarks/quantization.py", *sys.argv[1:]]),
        "commit": current_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in PACKAGES},
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def write(path: Path, rows: Mapping[str, Any]) -> None:
    """What the file holds of other recipes stays."""
    known = json.loads(path.read_text())["models"] if path.exists() else {}
    path.write_text(json.dumps({"schema": 1, "models": {**known, **rows}}, indent=2) + "\n")


def plot(rows: Mapping[str, Any], path: Path) -> None:
    from infercomp.plots import plot_points

    rows = {name: row for name, row in rows.items() if not name.startswith(PLANTED)}
    points = [(name, row["size"]["bits_per_weight"], row["quality"]["mean_nats"]) for name, row in rows.items()]
    path.write_bytes(plot_points([point for point in points if point[2] > 0], path.suffix))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", help=f"names with commas between them; {FLOATS} is the model itself")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--no-speed", dest="speed", action="store_false", help="time no decoding")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path, help="draw quality against size of all that the file holds")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(quantize_here(arguments.recipes, arguments.child, arguments.calibration_tokens)))
        return
    if arguments.recipes:
        write(arguments.output, measure(arguments))
    if arguments.plot:
        plot(json.loads(arguments.output.read_text())["models"], arguments.plot)


if __name__ == "__main__":
    main()
