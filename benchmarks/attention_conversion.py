"""What fewer heads of keys and values cost, by how they are merged: divergence from the model as it was, untrained.

SmolLM2 goes from 3 heads of keys and values to 1. Its text is the language reference that every Python carries: topics
in the order of their names, every second one for calibration, 4,096 tokens of the others in windows of 512 to measure
on. The other model is a Llama of 2 layers and 8 heads with random weights, on random tokens: no two heads are alike.

    python benchmarks/attention_conversion.py
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cold_start import cpu_model, current_commit
from quantization import EVALUATION_TOKENS, PACKAGES, halves

RESULTS = Path(__file__).parent / "results" / "attention_conversion.json"
WINDOW, NUM_BLOCKS = 512, 64
RANDOM_HEADS, RANDOM_VOCABULARY, RANDOM_TOKENS = 8, 512, 2048
Source = Callable[[], tuple[Any, Any]]


def random_model() -> tuple[Any, Any]:
    """A multi-head Llama whose weights are large enough that its attention looks at some tokens more than at others."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=RANDOM_VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=RANDOM_HEADS,
        num_key_value_heads=RANDOM_HEADS,
        max_position_embeddings=1024,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model.eval(), None


def demo_model() -> tuple[Any, Any]:
    from infercomp.demo_model import demo_model_path
    from infercomp.loading.loader import load

    loaded = load(demo_model_path())
    return loaded.model, loaded.tokenizer


def rows(name: str, source: Source, groups: list[int], tokens: Callable[[Any], tuple[Any, Any]]) -> Iterator[Any]:
    """A row of the model as it is, and one for each number of groups and merge."""
    import torch

    import infercomp
    from infercomp.account import size_of
    from infercomp.passes.grouped_query import MERGES
    from infercomp.quality import measure_quality

    model, tokenizer = source()
    calibration, evaluation = tokens(tokenizer)
    windows = [window.tolist() for window in evaluation.split(WINDOW)]
    reference = infercomp.LLM(model, tokenizer, dtype=torch.float32, num_blocks=NUM_BLOCKS)
    logits = {tuple(window): reference.logits(window) for window in windows}
    yield {"model": name, "groups": None, "merge": None, "size": asdict(size_of(reference._served)), "quality": None}
    for count in groups:
        for merge in MERGES:
            start = time.perf_counter()
            needed = calibration if merge == "aligned" else None
            wanted = infercomp.GroupedQuery(count, merge)
            model, tokenizer = source()
            options: dict[str, Any] = {"kv_heads": wanted, "calibration": needed, "evaluation": evaluation}
            llm = infercomp.LLM(model, tokenizer, dtype=torch.float32, num_blocks=NUM_BLOCKS, **options)
            seconds = time.perf_counter() - start
            quality = measure_quality(llm.logits, lambda window: logits[tuple(window)], windows)
            print(f"{name}, {count} groups, {merge}: KL {quality.mean_nats:.4f}", file=sys.stderr, flush=True)
            yield {
                "model": name,
                "merge": merge,
                "groups": count,
                "seconds": seconds,
                "size": asdict(size_of(llm._served)),
                "quality": asdict(quality),
                "layer_errors": llm.report.layer_errors,
            }


def prose(num_tokens: int) -> Callable[[Any], tuple[Any, Any]]:
    import torch

    def tokens(tokenizer: Any) -> tuple[Any, Any]:
        learned, measured = (torch.tensor(tokenizer(text)["input_ids"]) for text in halves())
        return learned[:num_tokens], measured[:EVALUATION_TOKENS]

    return tokens


def random_tokens(tokenizer: Any) -> tuple[Any, Any]:
    import torch

    generator = torch.Generator().manual_seed(1)
    found = torch.randint(RANDOM_VOCABULARY, (2, RANDOM_TOKENS), generator=generator)
    return found[0], found[1]


def run_facts() -> dict[str, Any]:
    import torch

    return {
        "command": shlex.join(["python", "benchmarks/attention_conversion.py", *sys.argv[1:]]),
        "commit": current_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in PACKAGES},
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def write(path: Path, row: dict[str, Any]) -> None:
    """Rows are kept as they come; one of the same model, merge and number of groups is replaced."""

    def key(each: dict[str, Any]) -> tuple[Any, ...]:
        return each["model"], each["groups"], each["merge"]

    known = json.loads(path.read_text())["rows"] if path.exists() else []
    found = [each for each in known if key(each) != key(row)] + [{**row, **run_facts()}]
    path.write_text(json.dumps({"schema": 1, "rows": found}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="random,smollm2", help="names with commas between them")
    parser.add_argument("--calibration-tokens", type=int, default=4096)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    measured = {
        "random": ("random Llama, 8 heads", random_model, [1, 2, 4], random_tokens),
        "smollm2": ("SmolLM2-135M-Instruct, 3 heads", demo_model, [1], prose(arguments.calibration_tokens)),
    }
    for name in arguments.models.split(","):
        for row in rows(*measured[name]):
            write(arguments.output, row)


if __name__ == "__main__":
    main()
