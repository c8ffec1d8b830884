"""Cold start: from process start to the first token of the demo's answer, and the peak memory on the way.

Every run is a fresh process that loads the model from disk with nothing compiled in advance. The
answer is checked in the same run; a wrong one is an error, and no figure is written.

    python benchmarks/cold_start.py --runs 5 --output benchmarks/results/cold_start.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
PACKAGES = ("torch", "transformers", "infercomp")


def measure_here(start: float) -> dict[str, float | str]:
    """Answer the question in this process; ``start`` is the clock at the process's start."""
    import infercomp
    from infercomp.demo_model import demo_model_path

    llm = infercomp.LLM(demo_model_path())
    ready = time.time()
    messages = [{"role": "user", "content": QUESTION}]
    llm.chat(messages, infercomp.SamplingParams(max_tokens=1, temperature=0.0))
    first_token = time.time()
    answer = llm.chat(messages, infercomp.SamplingParams(max_tokens=32, temperature=0.0)).outputs[0].text
    return {
        "answer": answer,
        "seconds_to_ready": ready - start,
        "seconds_to_first_token": first_token - start,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def measure_fresh() -> dict[str, float | str]:
    """The same in a fresh process, with the time it takes to start Python included."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "INFERCOMP_CACHE_DIR": cache}
        command = [sys.executable, __file__, "--child", repr(time.time())]
        finished = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    result: dict[str, float | str] = json.loads(finished.stdout.splitlines()[-1])
    if result["answer"] != ANSWER:
        raise SystemExit(f"wrong answer: {result['answer']!r}; no figure is written")
    return result


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def current_commit() -> str:
    finished = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return finished.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(measure_here(arguments.child)))
        return
    runs = []
    for number in range(arguments.runs):
        runs.append(measure_fresh())
        print(f"run {number + 1}: {runs[-1]}", flush=True)
    figures = {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for name in ("seconds_to_ready", "seconds_to_first_token", "peak_memory_mib")
        if (values := [float(run[name]) for run in runs])
    }
    result = {
        "command": f"python benchmarks/cold_start.py --runs {arguments.runs}",
        "commit": current_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "answer_checked": ANSWER,
        "figures": figures,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
