"""A BERT of four layers, trained here for a few minutes to fill in masked characters of the Python language reference.

The one with outliers goes on learning from there for a third of the steps, while two channels behind the feed-forward
of the first layers grow far larger than others and are held so, as training made some channels of the published BERTs
(Bondarenko et al. 2021, figure 2): it comes to depend on them.
"""

from __future__ import annotations

import math
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from quantization import halves
from rich.progress import track
from safetensors.torch import load_file, save_file

WINDOW, BATCH, STEPS = 64, 32, 1500
MASKED_SHARE, LEARNING_RATE = 0.15, 2e-3
CHANNELS, HEADS, LAYERS = 128, 4, 4
OUTLIER_CHANNELS, OUTLIER_WEIGHT, OUTLIER_LAYERS = (3, 17), 8.0, (0, 1, 2)
ALPHABET = sorted({character for text in topics.values() for character in text})
UNKNOWN, MASK, VOCABULARY = len(ALPHABET), len(ALPHABET) + 1, len(ALPHABET) + 2
_POSITIONS = {character: position for position, character in enumerate(ALPHABET)}


class Batch(NamedTuple):
    """Characters [B, S] of which some are masked, what was there, and where."""

    input_ids: torch.Tensor
    expected: torch.Tensor
    is_masked: torch.Tensor


def built() -> Any:
    """Untrained; equal each time."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=CHANNELS,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * CHANNELS,
        max_position_embeddings=WINDOW,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.BertForMaskedLM(config)
    let_it_see_places(model)
    return model


@torch.no_grad()
def let_it_see_places(model: Any) -> None:
    """Start from sine waves for positions and from attention that is not even: else it learns no more than frequencies
    of characters in the first thousands of steps."""
    embeddings = model.bert.embeddings
    frequencies = torch.exp(-math.log(1000.0) * torch.arange(CHANNELS // 2) / (CHANNELS // 2))
    angles = torch.arange(WINDOW)[:, None] * frequencies
    embeddings.position_embeddings.weight.copy_(0.7 * torch.cat([angles.sin(), angles.cos()], 1))
    embeddings.word_embeddings.weight.normal_(std=0.7)
    for layer in model.bert.encoder.layer:
        layer.attention.self.query.weight.normal_(std=0.08)
        layer.attention.self.key.weight.normal_(std=0.08)


def ids_of(text: str) -> torch.Tensor:
    return torch.tensor([_POSITIONS.get(character, UNKNOWN) for character in text])


def batches(text: str, count: int, seed: int) -> list[Batch]:
    """Windows from places drawn by the seed."""
    ids, generator = ids_of(text), torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        starts = torch.randint(len(ids) - WINDOW, (BATCH, 1), generator=generator)
        expected = ids[starts + torch.arange(WINDOW)]
        is_masked = torch.rand(expected.shape, generator=generator) < MASKED_SHARE
        found.append(Batch(expected.masked_fill(is_masked, MASK), expected, is_masked))
    return found


def train(model: Any, steps: int, has_outliers: bool) -> Any:
    """In place; one pass over ``steps`` batches with a warm-up and a cosine. Outliers grow over the first half."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, steps // 15, steps)
    seed = 4 if has_outliers else 1
    for step, batch in enumerate(track(batches(halves()[0], steps, seed), description="training a small BERT")):
        if has_outliers:
            hold_outliers(model, OUTLIER_WEIGHT ** min(1.0, 2 * step / steps))
        logits = model(input_ids=batch.input_ids).logits
        F.cross_entropy(logits[batch.is_masked], batch.expected[batch.is_masked]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    if has_outliers:
        hold_outliers(model, OUTLIER_WEIGHT)
    return model.eval()


@torch.no_grad()
def hold_outliers(model: Any, weight: float) -> None:
    for number in OUTLIER_LAYERS:
        model.bert.encoder.layer[number].output.LayerNorm.weight[list(OUTLIER_CHANNELS)] = weight


def trained(folder: Path, has_outliers: bool, steps: int = STEPS) -> Any:
    """From the folder if it is there, else trained and kept in it."""
    path = folder / f"small-bert-{'outliers' if has_outliers else 'plain'}-{steps}.safetensors"
    model = built()
    if path.exists():
        model.load_state_dict(load_file(path), strict=False)
        model.tie_weights()
        return model.eval()
    if has_outliers:
        model.load_state_dict(trained(folder, False, steps).state_dict())
        model.train()
    train(model, max(1, steps // 3) if has_outliers else steps, has_outliers)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in dict(model.named_parameters()).items()}, path)
    return model
