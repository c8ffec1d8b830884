"""Caches that the caller brings: ``model.compile(backend="infercomp")``, then ``model.generate`` as ever."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES
from references import Float64Model, assert_same_tokens, greedy_tokens, watched_compilations

NUM_TOKENS = 20
PROMPT_LENGTH = 15  # longer than the window from the start, and the window slides on from there
FAMILY_NAMES = ("llama", "mistral", "gemma3", "gpt2", "falcon")
CACHES = ("dynamic", "static")
# One graph for the prompt, one for a single token; a cache that grows by the token adds one with a symbolic length.
MOST_COMPILATIONS = {"dynamic": 3, "static": 2}


# Every family and every cache in each run, all pairs when asked for.
PAIRS = [
    pytest.param(name, cache, id=f"{name}-{cache}", marks=[] if number % 2 == place else [pytest.mark.slow])
    for number, name in enumerate(FAMILY_NAMES)
    for place, cache in enumerate(CACHES)
]


@pytest.mark.parametrize(("name", "cache"), PAIRS)
def test_generate_with_the_callers_cache(name: str, cache: str) -> None:
    family = FAMILIES[name]
    options: dict[str, Any] = {"cache_implementation": "static"} if cache == "static" else {}
    options["disable_compile"] = True  # generate would compile the decoding step by Inductor, over ours
    prompt = family.example_inputs(PROMPT_LENGTH)["input_ids"][0].tolist()
    model = family.build("sdpa")
    expected = greedy_tokens(model, prompt, NUM_TOKENS, **options)
    with watched_compilations() as watch:
        model.compile(backend="infercomp")
        found = greedy_tokens(model, prompt, NUM_TOKENS, **options)
        again = greedy_tokens(model, prompt, NUM_TOKENS, **options)
    assert_same_tokens(family.build("sdpa"), lambda: Float64Model(family.build("sdpa")), prompt, expected, found)
    assert found == again
    assert 1 <= watch.num_calls <= MOST_COMPILATIONS[cache]
    for report in watch.reports:
        assert not report.fallbacks
        assert report.matches_of("recognize_attention") == family.num_attention_layers


def test_static_cache_is_written_in_place() -> None:
    """The compiled forward leaves in the caller's cache what the eager one does."""
    from transformers import StaticCache

    family = FAMILIES["llama"]
    ids = family.example_inputs(PROMPT_LENGTH)["input_ids"]
    eager, compiled = family.build("sdpa"), family.build("sdpa")
    caches = [StaticCache(config=eager.config, max_cache_len=32) for _ in range(2)]
    with watched_compilations(), torch.inference_mode():
        compiled.compile(backend="infercomp")
        for model, cache in zip((eager, compiled), caches, strict=True):
            model(input_ids=ids, past_key_values=cache)
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        assert float(one.keys.abs().max()) > 0
        torch.testing.assert_close(other.keys, one.keys)
        torch.testing.assert_close(other.values, one.values)
