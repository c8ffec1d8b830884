"""Cold start: from process start to the first token of the demo's answer, and the peak memory on the way.

Every run is a fresh process that loads the model from disk with nothing compiled in advance. The
answer is checked in the same run; a wrong one is an error, and no figure is written. With ``--saved`` the model
is compiled and saved first, and every run starts from the saved one, its kernels in the cache.

    python benchmarks/cold_start.py --runs 5 --output benchmarks/results/cold_start.json
    python benchmarks/cold_start.py --saved --dtype bfloat16 --quantization w8a8

With ``--compile`` the clock runs from loaded weights to an LLM that can be asked, with an empty cache of kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from infercomp import LLM

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
PACKAGES = ("torch", "transformers", "infercomp")


def compile_here(model: str) -> dict[str, float | str]:
    """Compile loaded weights in this process, and answer the question."""
    import infercomp
    from infercomp.loading.loader import load

    loaded = load(model)
    start = time.time()
    llm = infercomp.LLM(loaded.model, loaded.tokenizer)
    return {"seconds_to_compile": time.time() - start, "answer": answer_of(llm, 32)}


def measure_here(start: float, model: str) -> dict[str, float | str]:
    """Answer the question in this process; ``start`` is the clock at the process's start."""
    import infercomp
    from infercomp.process_stats import peak_memory_bytes

    llm = infercomp.LLM(model)
    ready = time.time()
    answer_of(llm, 1)
    first_token = time.time()
    answer = answer_of(llm, 32)
    return {
        "answer": answer,
        "seconds_to_ready": ready - start,
        "seconds_to_first_token": first_token - start,
        "peak_memory_mib": peak_memory_bytes() / (1 << 20),
    }


def measure_fresh(model: str, cache: str, expected: str, compiles: bool = False) -> dict[str, float | str]:
    """The same in a fresh process, with the time it takes to start Python included."""
    environment = {**os.environ, "INFERCOMP_CACHE_DIR": cache}
    command = [sys.executable, __file__, "--child", repr(time.time()), "--model", model]
    command += ["--compile"] if compiles else []
    finished = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    result: dict[str, float | str] = json.loads(finished.stdout.splitlines()[-1])
    if result["answer"] != expected:
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


def answer_of(llm: LLM, max_tokens: int) -> str:
    import infercomp

    params = infercomp.SamplingParams(max_tokens=max_tokens, temperature=0.0)
    text: str = llm.chat([{"role": "user", "content": QUESTION}], params).outputs[0].text
    return text


def save_model(folder: str, cache: str, dtype: str | None, quantization: str | None) -> tuple[int, str]:
    """Save the compiled demo model; returns the bytes of its weights and what it answers, which names Paris."""
    import torch

    import infercomp
    from infercomp.demo_model import demo_model_path

    options = {"cache_dir": cache, "quantization": quantization}
    llm = infercomp.LLM(demo_model_path(), dtype=getattr(torch, dtype) if dtype else None, **options)
    llm.save(folder)
    answer = answer_of(llm, 32)
    if "Paris" not in answer:
        raise SystemExit(f"wrong answer: {answer!r}; no figure is written")
    return (Path(folder) / "model.safetensors").stat().st_size, answer


def measured_runs(arguments: argparse.Namespace) -> tuple[list[dict[str, float | str]], dict[str, float | str]]:
    """The runs, the answer that each of them gave, and the size of a saved model."""
    from infercomp.demo_model import demo_model_path

    runs: list[dict[str, float | str]] = []
    with tempfile.TemporaryDirectory() as scratch:
        model, kept = str(demo_model_path()), f"{scratch}/cache"
        facts: dict[str, float | str] = {"answer_checked": ANSWER}
        if arguments.saved:
            model = f"{scratch}/saved"
            num_bytes, answer = save_model(model, kept, arguments.dtype, arguments.quantization)
            facts = {"answer_checked": answer, "weights_mib": num_bytes / (1 << 20)}
        for number in range(arguments.runs):
            # A run from the original model finds no kernels.
            cache = kept if arguments.saved else f"{scratch}/cache{number}"
            runs.append(measure_fresh(model, cache, str(facts["answer_checked"]), arguments.compile))
            print(f"run {number + 1}: {runs[-1]}", flush=True)
    return runs, facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--saved", action="store_true", help="start from a saved model")
    parser.add_argument("--compile", action="store_true", help="time compiling loaded weights alone")
    parser.add_argument("--dtype", help="of the saved model: bfloat16, float32")
    parser.add_argument("--quantization", help="of the saved model")
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        measured = compile_here if arguments.compile else partial(measure_here, arguments.child)
        print(json.dumps(measured(arguments.model)))
        return
    runs, facts = measured_runs(arguments)
    figures = {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for name in runs[0]
        if name != "answer" and (values := [float(run[name]) for run in runs])
    }
    result = {
        "command": shlex.join(["python", "benchmarks/cold_start.py", *sys.argv[1:]]),
        "commit": current_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        **facts,
        "figures": figures,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
