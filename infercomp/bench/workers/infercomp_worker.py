"""infercomp itself as a side of the benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from infercomp.bench.agreement import divergence
from infercomp.bench.engine_runs import decoding, run_prompt
from infercomp.bench.ledger import decode_ledger, prefill_ledger
from infercomp.bench.protocol import Tokens, commands_of, serve, stopwatch
from infercomp.llm import LLM


class Infercomp:
    """``LLM`` with its options."""

    llm: LLM

    def load(self, model: str, dtype: str | None, threads: int, options: dict[str, Any]) -> dict[str, Any]:
        torch.set_num_threads(threads)
        with stopwatch() as watch:
            self.llm = LLM(model, dtype=getattr(torch, dtype) if dtype else None, **options)
        activations: torch.dtype = self.llm._served.form.cache_specs[0].dtype
        quantization = self.llm.config.passes.quantization
        name = str(activations).removeprefix("torch.")
        recipe = self.llm.config.passes.recipe
        integers = [each.weight_bits for _, each in recipe.rules if each is not None] if recipe else []
        bits = max(integers, default=min(32, activations.itemsize * 8))
        return {
            "form": f"{quantization}, {name}" if quantization else name,
            "weight_bits": bits,
            "seconds": watch.seconds,
            "versions": {"torch": torch.__version__},
            "calls_outside_of_kernels": {
                each.op: each.calls for each in self.llm.report.executions if each.how != "cpp"
            },
        }

    def prefill(self, tokens: Tokens) -> float:
        with stopwatch() as watch:
            run_prompt(self.llm._engine, tokens)
        return watch.seconds

    def decode(self, prompts: Sequence[Tokens], num_steps: int) -> tuple[float, list[list[int]]]:
        with decoding(self.llm._engine, prompts, num_steps) as state, stopwatch() as watch:
            for _ in range(num_steps):
                state.step()
        return watch.seconds, [tokens[: num_steps + 1] for tokens in state.tokens]

    def compare(self, tokens: Tokens, reference: str) -> dict[str, float]:
        """How far the logits of one text are from those in the file ``reference``, float32 [tokens, vocabulary]."""
        return divergence(self.llm.logits(tokens), torch.from_numpy(np.load(reference)))


def main() -> None:
    side = Infercomp()
    more: dict[str, Callable[..., Any]] = {
        "compare": side.compare,
        "decode_ledger": lambda **given: decode_ledger(side.llm, **given),
        "prefill_ledger": lambda **given: prefill_ledger(side.llm, **given),
    }
    serve(commands_of(side) | more)


if __name__ == "__main__":
    main()
