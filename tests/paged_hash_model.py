"""The whole loop with a model that is a pure function of its prefix, which it reads from its own paged cache.

The next token is a hash of all tokens and positions found through block tables and lengths, so the right
output is known without the engine, and any mix-up of blocks, slots, rows or requests changes it.
"""

from __future__ import annotations

import random
from typing import Any

import torch

from infercomp.runtime.config import RuntimeConfig
from infercomp.runtime.engine import Engine
from infercomp.runtime.errors import CapacityError
from infercomp.runtime.request import RequestOutput, SamplingParams
from infercomp.runtime.step import StepInputs

VOCAB_SIZE = 97
EOS = 0
MAX_MODEL_LEN = 48
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


def next_token(token_ids: list[int]) -> int:
    """The oracle: a hash in which order and position matter."""
    state = 17
    for position, token in enumerate(token_ids):
        state = (state * 1_000_003 + token * 31 + position) % ((1 << 61) - 1)
    return state % VOCAB_SIZE


class PagedHashModel:
    """Writes tokens and positions to slots, then hashes what it reads back; garbage gives garbage, not an error."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.tokens = torch.full((num_blocks * block_size,), -7)
        self.positions = torch.full((num_blocks * block_size,), -7)
        self.poisoned_token: int | None = None

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        self.tokens[inputs.slot_mapping] = inputs.input_ids
        self.positions[inputs.slot_mapping] = inputs.positions
        logits = torch.zeros(len(inputs.logits_indices), VOCAB_SIZE)
        for row, packed_row in enumerate(inputs.logits_indices.tolist()):
            owner = int(torch.searchsorted(inputs.query_start_loc, packed_row, side="right")) - 1
            position = int(inputs.positions[packed_row])
            visible = min(position + 1, int(inputs.seq_lens[owner]))
            slots = (inputs.block_tables[owner, :, None] * self.block_size + torch.arange(self.block_size)).flatten()
            logits[row, self.hash(slots[:visible])] = 40.0
            if self.poisoned_token is not None and self.poisoned_token in self.tokens[slots[:visible]].tolist():
                logits[row] = float("nan")
        return logits

    def hash(self, slots: torch.Tensor) -> int:
        state = 17
        for token, position in zip(self.tokens[slots].tolist(), self.positions[slots].tolist(), strict=True):
            state = (state * 1_000_003 + token * 31 + position) % ((1 << 61) - 1)
        return state % VOCAB_SIZE


def oracle(prompt: list[int], params: SamplingParams) -> tuple[list[int], str]:
    """Greedy output tokens and finish reason, with no engine in sight."""
    tokens: list[int] = []
    while True:
        tokens.append(next_token(prompt + tokens))
        if tokens[-1] == EOS and not params.ignore_eos:
            return tokens, "stop"
        if tokens[-1] in (params.stop_token_ids or ()):
            return tokens, "stop"
        if len(tokens) == params.max_tokens or len(prompt) + len(tokens) == MAX_MODEL_LEN:
            return tokens, "length"


def make_engine(num_blocks: int = 12, block_size: int = 4, budget: int = 16, **options: Any) -> Engine:
    config = RuntimeConfig(block_size=block_size, max_num_batched_tokens=budget, max_num_seqs=options.pop("seqs", 8))
    return Engine(
        options.pop("model", None) or PagedHashModel(num_blocks, block_size),
        config,
        num_blocks=num_blocks,
        max_model_len=MAX_MODEL_LEN,
        eos_token_ids=frozenset({EOS}),
        **options,
    )


def run_to_end(engine: Engine) -> dict[str, RequestOutput]:
    finished: dict[str, RequestOutput] = {}
    for _ in range(10_000):
        if not engine.has_unfinished_requests():
            break
        finished.update({output.request_id: output for output in engine.step() if output.finished})
        engine.scheduler.check_integrity()
    assert not engine.has_unfinished_requests(), "requests never finish"
    assert engine.scheduler.pool.num_used_blocks == 0, "blocks are lost"
    return finished


def simulate(seed: int) -> Engine:
    """Random arrivals, sizes and aborts against a small cache; every output is compared with the oracle."""
    dice = random.Random(seed)
    engine = make_engine(
        num_blocks=dice.randint(12, 24), block_size=dice.choice([1, 2, 4, 5]), budget=dice.choice([1, 3, 7, 40])
    )
    requests: dict[str, tuple[list[int], SamplingParams]] = {}
    finished: dict[str, RequestOutput] = {}
    aborted: set[str] = set()
    num_left = 14
    while num_left or engine.has_unfinished_requests():
        if num_left and dice.random() < 0.4:
            num_left -= 1
            request_id = f"r{num_left}"
            prompt = [dice.randrange(VOCAB_SIZE) for _ in range(dice.randint(1, 14))]
            max_tokens, ignore_eos = dice.randint(1, 16), dice.random() < 0.8
            params = SamplingParams(
                n=dice.choice([1, 1, 2]), temperature=0.0, max_tokens=max_tokens, ignore_eos=ignore_eos
            )
            try:
                engine.add_request(request_id, prompt, params)
                requests[request_id] = (prompt, params)
            except CapacityError as error:
                assert error.needed_blocks > engine.scheduler.pool.num_blocks
        if requests and dice.random() < 0.02:
            request_id = dice.choice(sorted(requests))
            if engine.abort_request(request_id) is not None:
                aborted.add(request_id)
        for output in engine.step():
            check_against_oracle(output, *requests[output.request_id])
            if output.finished:
                finished[output.request_id] = output
        engine.scheduler.check_integrity()
    assert set(finished) == set(requests) - aborted, f"seed {seed}: a request got lost"
    assert engine.scheduler.pool.num_used_blocks == 0, f"seed {seed}: blocks are lost"
    return engine


def check_against_oracle(output: RequestOutput, prompt: list[int], params: SamplingParams) -> None:
    tokens, reason = oracle(prompt, params)
    for completion in output.outputs:
        assert completion.token_ids == tokens[: len(completion.token_ids)], "the tokens are not the oracle's"
        assert completion.finish_reason in (None, reason)
        assert (completion.finish_reason is None) == (len(completion.token_ids) < len(tokens))
