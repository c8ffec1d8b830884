"""What N of M weights cost SmolLM2, by the score and by the order of channels: divergence from float32, untrained.

All linears but the LM head become sparse. The text is the language reference that every Python carries: topics in the
order of their names, every second one for calibration, 4,096 tokens of the others in windows of 512 to measure on.

    python benchmarks/sparsity.py --rows magnitude,wanda,sparsegpt,magnitude+greedy,sparsegpt+regressions
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from attention_conversion import NUM_BLOCKS, WINDOW, demo_model, prose
from cold_start import cpu_model, current_commit
from quantization import PACKAGES

RESULTS = Path(__file__).parent / "results" / "sparsity.json"


def measured(
    name: str, pattern: str, num_regressions: int, windows: list[list[int]], calibration: Any
) -> dict[str, Any]:
    """``name`` is a score, with the search's method behind a plus where channels are put in order."""
    import torch

    import infercomp
    from infercomp.account import size_of
    from infercomp.quality import measure_quality

    model, tokenizer = demo_model()
    reference = infercomp.LLM(model, tokenizer, dtype=torch.float32, num_blocks=NUM_BLOCKS)
    expected = {tuple(window): reference.logits(window) for window in windows}
    del reference
    score, _, method = name.partition("+")
    n, m = map(int, pattern.split(":"))
    sparsity = infercomp.NM(n, m, score, permute=method or False, num_regressions=num_regressions)
    start = time.perf_counter()
    model, tokenizer = demo_model()
    data = calibration if sparsity.needs_calibration else None
    llm = infercomp.LLM(model, tokenizer, num_blocks=NUM_BLOCKS, sparsity=sparsity, calibration=data)
    seconds = time.perf_counter() - start
    quality = measure_quality(llm.logits, lambda window: expected[tuple(window)], windows)
    print(f"{pattern} {name}: KL {quality.mean_nats:.4f}", file=sys.stderr, flush=True)
    return {
        "name": name,
        "sparsity": json.loads(sparsity.to_json()),
        "seconds": seconds,
        "size": asdict(size_of(llm._served)),
        "quality": asdict(quality),
        "command": shlex.join(["python", "benchmarks/sparsity.py", *sys.argv[1:]]),
        "commit": current_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in PACKAGES},
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="magnitude,wanda,sparsegpt", help="names with commas between them")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--regressions", type=int, default=50)
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    calibration, evaluation = prose(arguments.calibration_tokens)(demo_model()[1])
    windows = [window.tolist() for window in evaluation.split(WINDOW)]
    for name in arguments.rows.split(","):
        row = measured(name, arguments.pattern, arguments.regressions, windows, calibration)
        known = json.loads(arguments.output.read_text())["rows"] if arguments.output.exists() else []
        kept = [each for each in known if each["sparsity"] != row["sparsity"]]
        arguments.output.write_text(json.dumps({"schema": 1, "rows": [*kept, row]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
