"""Every decoder through ``LLM``: a ragged batch, greedy, against ``model.generate`` one prompt at a time."""

from __future__ import annotations

import functools

import pytest
import torch
from families import DECODERS, SLIDING_WINDOW, VOCAB_SIZE, Family
from references import Float64Model, assert_errs_like_eager, assert_same_tokens, greedy_tokens
from torch import nn

from infercomp import LLM, SamplingParams

NUM_TOKENS = 64
PROMPT_LENGTHS = (1, 23, 7, 40, 12)
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
VARIANTS = [(family, name) for family in DECODERS.values() for name in family.attn_implementations]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


@pytest.mark.parametrize(("family", "implementation"), VARIANTS, ids=[f"{f.name}-{name}" for f, name in VARIANTS])
def test_family_is_served(family: Family, implementation: str) -> None:
    """64 greedy tokens for each of five prompts served together, with a cache in blocks of 8 and chunks of 32."""
    model = family.build(implementation)
    expected = [greedy_tokens(model, prompt, NUM_TOKENS) for prompt in prompts()]
    assert max(map(len, map(set, expected))) > 4, "the text stands still: it would hide a wrong number"
    exact = functools.cache(lambda: Float64Model(model))
    llm = LLM(model, block_size=8, max_num_batched_tokens=32)
    assert llm.report.matches_of("page_attention") == family.num_attention_layers
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts()], GREEDY)
    for prompt, tokens, output in zip(prompts(), expected, outputs, strict=True):
        assert output.outputs[0].finish_reason == "length"
        assert_same_tokens(model, exact, prompt, tokens, output.outputs[0].token_ids)
    assert_logits_agree(model, exact(), llm, [*prompts()[3], *expected[3]])


def assert_logits_agree(model: nn.Module, exact: Float64Model, llm: LLM, tokens: list[int]) -> None:
    ids = torch.tensor([tokens])
    with torch.inference_mode():
        eager = model(input_ids=ids).logits[0]
    assert_errs_like_eager(exact(input_ids=ids).logits[0], eager, llm.logits(tokens))


def test_windows_are_shorter_than_the_sequences() -> None:
    """Else a window ignored would go unseen; and a window that is off by one moves these logits."""
    assert max(PROMPT_LENGTHS) > SLIDING_WINDOW
    family = DECODERS["mistral"]
    model = family.build("sdpa")
    ids = torch.tensor([prompts()[3]])
    with torch.inference_mode():
        windowed = model(input_ids=ids).logits
        model.config.sliding_window = SLIDING_WINDOW + 1
        wider = model(input_ids=ids).logits
    assert float((windowed - wider).abs().max()) > 1e-2
