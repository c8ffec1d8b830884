"""Decoding SmolLM2 with 2:4 weights, compressed against dense: the same masked weights, the same type of value.

All linears but the LM head lose the two of every four consecutive inputs that are smallest in magnitude; nothing is
trained, as speed is what is asked. Both models are saved, where `--models` lacks them, and loaded side by side. Their
steps take turns, a few of the one and a few of the other, so that whatever else the machine does slows both; times are
medians. Their logits must be the same bits. Bytes are those of the ledger (`infercomp bench`), for the whole step and
for the linears in it but the head.

    python benchmarks/sparse_kernels.py --kind bf16 --models FOLDER --output benchmarks/results/sparse_kernels.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from infercomp import LLM
from infercomp.bench.engine_runs import decoding, run_prompt
from infercomp.bench.ledger import decode_ledger
from infercomp.bench.machine import describe_run
from infercomp.demo_model import demo_model_path
from infercomp.loading.loader import load

KINDS: dict[str, str | None] = {"bf16": None, "w8a16": "w8a16", "w8a8": "w8a8", "w4a16": "w4a16-g32"}
FORMS: dict[str, tuple[str, ...]] = {"dense": ("compress_weights",), "compressed": ()}
BATCHES = (1, 8)
PROMPT, CONTEXT, STEPS_AT_A_TIME, WARM_UP_STEPS, PREFILL_ROUNDS = 256, 32, 4, 4, 3
# Bytes are counted, and only times need what the machine can do at best.
NO_CEILINGS = {"bandwidth": 1.0, "operations_per_second": {"float32": 1.0}}


def masked(weight: torch.Tensor) -> torch.Tensor:
    """The weight [N, K] with the two smallest of every four consecutive inputs zero."""
    groups = weight.unflatten(1, (-1, 4))
    kept = groups.abs().argsort(-1, descending=True)[..., :2]
    return torch.zeros_like(groups).scatter(-1, kept, groups.gather(-1, kept)).flatten(1)


def loaded(kind: str, form: str, folder: Path) -> LLM:
    saved = folder / f"{kind}_{form}"
    if not saved.exists():
        save(kind, form, saved)
    return LLM(saved, num_blocks=256)


def save(kind: str, form: str, saved: Path) -> None:
    model = load(demo_model_path(), dtype=torch.bfloat16)
    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data = masked(module.weight.data)
    LLM(model.model, model.tokenizer, quantization=KINDS[kind], disable=FORMS[form]).save(saved)


def draw_prompts(count: int, length: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(100, 40_000, (length,), generator=draw).tolist() for _ in range(count)]


def decode_seconds(models: dict[str, LLM], batch: int, num_rounds: int) -> dict[str, list[float]]:
    """Seconds of each step of ``batch`` sequences, the forms by turns."""
    seconds: dict[str, list[float]] = {form: [] for form in models}
    with ExitStack() as stack:
        num_steps = WARM_UP_STEPS + num_rounds * STEPS_AT_A_TIME
        prompts = draw_prompts(batch, CONTEXT)
        states = {form: stack.enter_context(decoding(llm._engine, prompts, num_steps)) for form, llm in models.items()}
        for state in states.values():
            for _ in range(WARM_UP_STEPS):
                state.step()
        for _ in range(num_rounds):
            for form, state in states.items():
                for _ in range(STEPS_AT_A_TIME):
                    start = time.perf_counter()
                    state.step()
                    seconds[form].append(time.perf_counter() - start)
        tokens = [state.tokens for state in states.values()]
        assert tokens[0] == tokens[1], "the forms say different things"
    return seconds


def prefill_seconds(models: dict[str, LLM]) -> dict[str, list[float]]:
    """Seconds of prompts of ``PROMPT`` tokens, the forms by turns."""
    seconds: dict[str, list[float]] = {form: [] for form in models}
    for prompt in draw_prompts(PREFILL_ROUNDS + 1, PROMPT):
        for form, llm in models.items():
            start = time.perf_counter()
            run_prompt(llm._engine, prompt)
            seconds[form].append(time.perf_counter() - start)
    return {form: taken[1:] for form, taken in seconds.items()}


def summary(seconds: dict[str, list[float]], **facts: Any) -> dict[str, Any]:
    medians = {form: statistics.median(taken) for form, taken in seconds.items()}
    return {
        **facts,
        "count": len(seconds["dense"]),
        "median_milliseconds": {form: 1e3 * median for form, median in medians.items()},
        "times_as_fast": medians["dense"] / medians["compressed"],
    }


def bytes_a_token(llm: LLM) -> dict[str, float]:
    """What a step of one sequence moves, and what its linears but the head do."""
    ledger = decode_ledger(llm, draw_prompts(1, CONTEXT), 4, NO_CEILINGS)
    vocab_size = llm._served.form.vocab_size
    products = [row for row in ledger["rows"] if row["label"].startswith("matmul")]
    in_layers = [row["num_bytes"] for row in products if not row["label"].endswith(f" {vocab_size}")]
    return {"step": ledger["num_bytes"], "linears_but_the_head": sum(in_layers)}


def measured(kind: str, num_rounds: int, folder: Path) -> dict[str, Any]:
    models = {form: loaded(kind, form, folder) for form in FORMS}
    record = next(each for each in models["compressed"].report.passes if each.name == "compress_weights")
    assert record.matches and not record.near_misses
    (prompt,) = draw_prompts(1, CONTEXT)
    logits = [llm.logits(prompt) for llm in models.values()]
    assert torch.equal(*logits), "the forms compute different bits"
    return {
        "kind": kind,
        "compressed_products": record.matches,
        "same_bits_as_dense": True,
        "bytes_a_token": {form: bytes_a_token(llm) for form, llm in models.items()},
        "decoding": [summary(decode_seconds(models, batch, num_rounds), sequences=batch) for batch in BATCHES],
        "prefill": summary(prefill_seconds(models), prompt_tokens=PROMPT),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--models", type=Path, required=True, help="folder of the saved models, made where missing")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    output: Path | None = arguments.output
    found = json.loads(output.read_text()) if output is not None and output.exists() else {"schema": 1, "models": {}}
    run = describe_run(["python", *sys.argv])
    found["models"][arguments.kind] = {"run": run, **measured(arguments.kind, arguments.rounds, arguments.models)}
    text = json.dumps(found, indent=2) + "\n"
    print(text, end="")
    if output is not None:
        output.write_text(text)


if __name__ == "__main__":
    main()
