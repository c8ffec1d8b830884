"""What a KV cache in int8 costs and brings on SmolLM2: divergence from float32, bytes a token, decoding speed.

Quality is measured as `quantization.py` does it, on 4,096 tokens in windows of 512; weights are not quantised. For
speed both models are loaded side by side, and their decoding steps at a long context take turns, a few of the one and
a few of the other, so that whatever else the machine does slows both; times are medians.

    python benchmarks/kv_cache.py --quality --output benchmarks/results/kv_cache.json
    python benchmarks/kv_cache.py --speed --output benchmarks/results/kv_cache.json    (keeps what the file holds)
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from quantization import EVALUATION_TOKENS, halves

from infercomp import LLM
from infercomp.bench.engine_runs import decoding
from infercomp.bench.machine import describe_run
from infercomp.demo_model import demo_model_path
from infercomp.quality import measure_quality

KINDS = ("auto", "int8")
WINDOW, SEQUENCES, CONTEXT, STEPS_AT_A_TIME, WARM_UP_STEPS = 512, 8, 1024, 4, 4


def bytes_per_token(llm: LLM) -> int:
    return sum(spec.bytes_per_token for spec in llm._served.form.cache_specs)


def quality() -> Iterator[dict[str, Any]]:
    reference = LLM(demo_model_path(), dtype=torch.float32)
    ids = reference.tokenizer(halves()[1])["input_ids"][:EVALUATION_TOKENS]
    windows = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
    for dtype in (torch.float32, torch.bfloat16):
        for kind in KINDS:
            llm = LLM(demo_model_path(), dtype=dtype, kv_cache_dtype=kind)
            measured = asdict(measure_quality(llm.logits, reference.logits, windows))
            yield {
                "dtype": str(dtype).removeprefix("torch."),
                "kv_cache_dtype": kind,
                "kv_bytes_per_token": bytes_per_token(llm),
                **measured,
            }


def speed(num_rounds: int) -> list[dict[str, Any]]:
    """Decoding in bfloat16 at a context of ``CONTEXT`` tokens, sequences of drawn ids."""
    num_steps = WARM_UP_STEPS + num_rounds * STEPS_AT_A_TIME
    num_blocks = SEQUENCES * (-(-(CONTEXT + num_steps) // 16) + 4)
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(100, 40_000, (CONTEXT,), generator=draw).tolist() for _ in range(SEQUENCES)]
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with ExitStack() as stack:
        states = {}
        for kind in KINDS:
            llm = LLM(demo_model_path(), dtype=torch.bfloat16, kv_cache_dtype=kind, num_blocks=num_blocks)
            states[kind] = stack.enter_context(decoding(llm._engine, prompts, num_steps))
            for _ in range(WARM_UP_STEPS):
                states[kind].step()
        for _ in range(num_rounds):
            for kind, state in states.items():
                for _ in range(STEPS_AT_A_TIME):
                    start = time.perf_counter()
                    state.step()
                    seconds[kind].append(time.perf_counter() - start)
    return [
        {
            "kv_cache_dtype": kind,
            "sequences": SEQUENCES,
            "context": CONTEXT,
            "num_steps": len(taken),
            "median_milliseconds": 1e3 * statistics.median(taken),
            "least_milliseconds": 1e3 * min(taken),
            "tokens_per_second": SEQUENCES / statistics.median(taken),
        }
        for kind, taken in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    output: Path | None = arguments.output
    found = json.loads(output.read_text()) if output is not None and output.exists() else {"schema": 1}
    run = describe_run(["python", *sys.argv])
    if arguments.quality:
        found["quality"] = {"run": run, "models": list(quality())}
    if arguments.speed:
        found["speed"] = {"run": run, "models": speed(arguments.rounds)}
    text = json.dumps(found, indent=2) + "\n"
    print(text, end="")
    if output is not None:
        output.write_text(text)


if __name__ == "__main__":
    main()
