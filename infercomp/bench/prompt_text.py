"""Prose to compute on: the language reference that every Python carries, in the model's own tokens."""

from __future__ import annotations

import random
from pydoc_data.topics import topics
from typing import Any


def text_tokens(tokenizer: Any, vocab_size: int, num_tokens: int) -> list[int]:
    """As many tokens of prose as asked for, or as there are; without a tokenizer, drawn ids, always the same."""
    if tokenizer is None:
        draw = random.Random(0)
        return [draw.randrange(vocab_size) for _ in range(num_tokens)]
    tokens: list[int] = []
    for topic in sorted(topics):
        if len(tokens) >= num_tokens:
            break
        tokens += tokenizer(topics[topic], add_special_tokens=False)["input_ids"]
    return tokens[:num_tokens]
