"""OpenVINO GenAI on a GGUF file, by its paged pipeline with nothing kept from one prompt to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino
import openvino_genai

from infercomp.bench.protocol import Tokens, commands_of, serve, stopwatch

_MOST_BATCHED_TOKENS = 1 << 16
_CACHE_GIGABYTES = 1
_MILLISECOND = 1e-3


class OpenVino:
    """``LLMPipeline``; steps are told apart by the times that it notes for its tokens."""

    def load(self, file: str, threads: int) -> dict[str, Any]:
        scheduler = openvino_genai.SchedulerConfig()
        # A prompt that was seen before would cost nothing, and one that is cut into pieces more.
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = _MOST_BATCHED_TOKENS
        scheduler.cache_size = _CACHE_GIGABYTES
        with stopwatch() as watch:
            self._pipeline = openvino_genai.LLMPipeline(
                file, "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=threads
            )
        return {"seconds": watch.seconds, "versions": {"openvino-genai": openvino_genai.__version__}}

    def prefill(self, tokens: Tokens) -> float:
        with stopwatch() as watch:
            self._generate([tokens], 1)
        return watch.seconds

    def decode(self, prompts: Sequence[Tokens], num_steps: int) -> tuple[float, list[list[int]]]:
        results = self._generate(prompts, num_steps + 1)
        times = results.perf_metrics.raw_metrics.m_new_token_times
        assert len(times) == num_steps + 1, f"{len(times)} times for {num_steps + 1} tokens"
        return (times[-1] - times[0]) * _MILLISECOND, [list(tokens) for tokens in results.tokens]

    def _generate(self, prompts: Sequence[Tokens], num_tokens: int) -> Any:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = num_tokens
        config.ignore_eos, config.do_sample = True, False
        ids = np.array([list(prompt) for prompt in prompts], dtype=np.int64)
        mask = openvino.Tensor(np.ones_like(ids))
        return self._pipeline.generate(openvino_genai.TokenizedInputs(openvino.Tensor(ids), mask), config)


def main() -> None:
    serve(commands_of(OpenVino()))


if __name__ == "__main__":
    main()
