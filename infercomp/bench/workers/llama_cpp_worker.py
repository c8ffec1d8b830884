"""llama.cpp through llama-cpp-python's C functions: whole batches of sequences, logits of the last tokens only."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np

from infercomp.bench.protocol import Tokens, commands_of, serve, stopwatch
from infercomp.runtime.errors import BenchmarkError

# What one call of llama_decode may be given; llama.cpp cuts it into pieces of its default size.
_BATCH_TOKENS = 2048


class LlamaCpp:
    """A GGUF file, and a context that is as large as the work in hand needs."""

    _context: Any = None
    _room: tuple[int, int] = (0, 0)

    def load(self, file: str, threads: int) -> dict[str, Any]:
        self._threads = threads
        llama_cpp.llama_backend_init()
        with stopwatch() as watch:
            self._model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
            if not self._model:
                raise BenchmarkError("llama.cpp does not load the file that was written for it", where=file)
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._batch = llama_cpp.llama_batch_init(_BATCH_TOKENS, 0, 1)
        return {"seconds": watch.seconds, "versions": {"llama-cpp-python": llama_cpp.__version__}}

    def prefill(self, tokens: Tokens) -> float:
        self._start_anew(1, len(tokens))
        with stopwatch() as watch:
            self._first([tokens])
        return watch.seconds

    def decode(self, prompts: Sequence[Tokens], num_steps: int) -> tuple[float, list[list[int]]]:
        self._start_anew(len(prompts), len(prompts[0]) + num_steps)
        generated = [self._first(prompts)]
        position = len(prompts[0])
        with stopwatch() as watch:
            for step in range(num_steps):
                rows = [(token, position + step, sequence, True) for sequence, token in enumerate(generated[-1])]
                generated.append(self._run(rows))
        return watch.seconds, [list(tokens) for tokens in zip(*generated, strict=True)]

    def _start_anew(self, batch: int, num_tokens: int) -> None:
        """An empty cache for so many sequences of so many tokens."""
        if self._room != (batch, num_tokens):
            if self._room != (0, 0):
                llama_cpp.llama_free(self._context)
            params = _context_params(self._threads, batch, num_tokens)
            self._context = llama_cpp.llama_init_from_model(self._model, params)
            self._room = (batch, num_tokens)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def _first(self, prompts: Sequence[Tokens]) -> list[int]:
        """The first new token of each prompt."""
        rows = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        return [
            token
            for start in range(0, len(rows), _BATCH_TOKENS)
            for token in self._run(rows[start : start + _BATCH_TOKENS])
        ]

    def _run(self, rows: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """Compute rows of (token, position, sequence, is it sampled); the likeliest token of each sampled row."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, is_sampled) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, is_sampled
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if llama_cpp.llama_decode(self._context, batch) != 0:
            raise BenchmarkError(f"llama_decode refused {len(rows)} tokens", where="llama.cpp")
        return [self._likeliest(i) for i, row in enumerate(rows) if row[3]]

    def _likeliest(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, row)
        return int(
            np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self._vocab_size,)).argmax()
        )


def _context_params(threads: int, batch: int, num_tokens: int) -> Any:
    params = llama_cpp.llama_context_default_params()
    # Each sequence has an equal part of the cache, in whole pieces of 256.
    params.n_ctx = batch * -(-num_tokens // 256) * 256
    params.n_batch = _BATCH_TOKENS
    params.n_seq_max = batch
    params.n_threads = params.n_threads_batch = threads
    return params


def main() -> None:
    serve(commands_of(LlamaCpp()))


if __name__ == "__main__":
    main()
