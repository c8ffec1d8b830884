"""The model as transformers runs it, with its own cache; in float32 it is the reference of all others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers

from infercomp.bench.prompt_text import text_tokens
from infercomp.bench.protocol import Tokens, commands_of, serve, stopwatch
from infercomp.loading.loader import load
from infercomp.serving import position_limit


class Eager:
    """``model(input_ids, past_key_values)``, greedy, one call a step."""

    model: torch.nn.Module
    tokenizer: Any

    def load(self, model: str, dtype: str, threads: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        with stopwatch() as watch:
            loaded = load(model, dtype=getattr(torch, dtype))
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        return {
            "form": dtype,
            "seconds": watch.seconds,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "position_limit": position_limit(self.model),
        }

    def prefill(self, tokens: Tokens) -> float:
        with torch.inference_mode(), stopwatch() as watch:
            self._first([tokens], 0)
        return watch.seconds

    def decode(self, prompts: Sequence[Tokens], num_steps: int) -> tuple[float, list[list[int]]]:
        with torch.inference_mode():
            newest, cache = self._first(prompts, num_steps)
            generated = [newest]
            with stopwatch() as watch:
                for _ in range(num_steps):
                    newest = self._next(newest, cache)
                    generated.append(newest)
        return watch.seconds, torch.cat(generated, 1).tolist()

    def text(self, num_tokens: int) -> list[int]:
        """Prose in the model's own tokens, as long as asked for or as there is."""
        return text_tokens(self.tokenizer, self.model.get_input_embeddings().num_embeddings, num_tokens)  # type: ignore[operator]

    def logits(self, tokens: Tokens, file: str) -> None:
        """Write the logits of every token, float32 [tokens, vocabulary]."""
        with torch.inference_mode():
            np.save(file, self.model(torch.tensor([list(tokens)])).logits[0].float().numpy())

    def _first(self, prompts: Sequence[Tokens], num_steps: int) -> tuple[torch.Tensor, Any]:
        """The first new token of each prompt [B, 1], and the cache."""
        cache = transformers.DynamicCache(config=self.model.config)
        return self._call(torch.tensor([list(prompt) for prompt in prompts]), cache), cache

    def _next(self, newest: torch.Tensor, cache: Any) -> torch.Tensor:
        return self._call(newest, cache)

    def _call(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        output = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].argmax(-1, keepdim=True)


def main() -> None:
    side = Eager()
    serve(commands_of(side) | {"text": side.text, "logits": side.logits})


if __name__ == "__main__":
    main()
