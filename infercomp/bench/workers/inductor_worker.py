"""The model compiled by Inductor: static cache, weights frozen into the graph, kernels autotuned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers

from infercomp.bench.protocol import Tokens, commands_of, serve
from infercomp.bench.workers.eager_worker import Eager


class Inductor(Eager):
    """As eager, with a forward that is compiled anew for each shape; the first run of a piece of work pays for it."""

    def load(self, model: str, dtype: str, threads: int) -> dict[str, Any]:
        from torch._inductor import config

        loaded = super().load(model, dtype, threads)
        config.freezing = True
        self._forward = torch.compile(self.model.forward, dynamic=False, options={"max_autotune": True})
        # One static cache and one graph for each batch and length.
        torch._dynamo.config.recompile_limit = 64
        return loaded

    def _first(self, prompts: Sequence[Tokens], num_steps: int) -> tuple[torch.Tensor, Any]:
        length = len(prompts[0]) + num_steps
        cache = transformers.StaticCache(config=self.model.config, max_cache_len=length)
        self._position = 0
        return self._call(torch.tensor([list(prompt) for prompt in prompts]), cache), cache

    def _call(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        positions = torch.arange(self._position, self._position + ids.shape[1])
        self._position += ids.shape[1]
        output = self._forward(
            input_ids=ids, past_key_values=cache, use_cache=True, position_ids=positions[None], logits_to_keep=1
        )
        return output.logits[:, -1].argmax(-1, keepdim=True)


def main() -> None:
    serve(commands_of(Inductor()))


if __name__ == "__main__":
    main()
