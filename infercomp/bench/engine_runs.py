"""Prompts and steps of our engine, stepped by hand so that computing prompts and decoding are told apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from infercomp.bench.protocol import Tokens
from infercomp.bench.work import most_new_tokens
from infercomp.runtime.engine import Engine
from infercomp.runtime.request import SamplingParams


def run_prompt(engine: Engine, tokens: Tokens) -> None:
    """Compute a prompt and its first new token."""
    engine.add_request("prompt", tokens, _greedy(1))
    while engine.has_unfinished_requests():
        engine.step()


class Decoding:
    """Sequences that have a token each and wait for more; ``tokens`` has all of theirs, in the order of the prompts."""

    def __init__(self, engine: Engine, num_sequences: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(num_sequences)]
        self._engine = engine

    def step(self) -> None:
        """One more token for every sequence."""
        for output in self._engine.step():
            self.tokens[int(output.request_id)] = output.outputs[0].token_ids


@contextmanager
def decoding(engine: Engine, prompts: Sequence[Tokens], num_steps: int) -> Iterator[Decoding]:
    """The prompts, computed; at least ``num_steps`` steps may follow before a sequence ends."""
    runtime = engine.config
    num_tokens = sum(map(len, prompts))
    params = _greedy(most_new_tokens(num_tokens, num_steps, runtime.max_num_batched_tokens))
    state = Decoding(engine, len(prompts))
    try:
        for number, prompt in enumerate(prompts):
            engine.add_request(str(number), prompt, params)
        while not all(state.tokens):
            state.step()
        yield state
    finally:
        engine.abort_all()


def _greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
