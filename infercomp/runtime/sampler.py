"""Logits to tokens, row by row, so that a row's token never depends on its neighbours.

Order and meaning of the steps are those of Hugging Face's ``TemperatureLogitsWarper``,
``TopKLogitsWarper`` and ``TopPLogitsWarper``; the arithmetic is float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .errors import NumericalError
from .request import SamplingParams

NEGATIVE_INFINITY = float("-inf")
_NEGATIVE_INFINITY_BITS = 0xFF80


def make_generator(seed: int | None) -> torch.Generator:
    """The randomness of one sequence; ``None`` takes a seed from the operating system."""
    generator = torch.Generator(device="cpu")
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def sample(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    generators: Sequence[torch.Generator],
) -> list[int | NumericalError]:
    """One token per row of ``logits`` [R, V] (floating), or the row's ``NumericalError``.

    ``-inf`` marks a token that must not be chosen; NaN, ``+inf`` or a row of only ``-inf`` is an error.
    """
    # The largest logit is NaN if any is, +inf if any is, -inf if all are: one number tells a bad row.
    tokens: list[int | NumericalError] = []
    for row, (largest, greedy_token_id) in enumerate(_largest(logits)):
        if not math.isfinite(largest):
            tokens.append(_numerical_error(largest))
        elif params[row].temperature == 0:
            tokens.append(greedy_token_id)
        else:
            tokens.append(_draw(warp(logits[row], params[row]), generators[row]))
    return tokens


def _largest(logits: torch.Tensor) -> list[tuple[float, int]]:
    """Each row's largest logit, or NaN if it holds one, and the first place where it is."""
    if logits.device.type != "cpu":
        values, places = logits.max(dim=-1)
        return list(zip(values.tolist(), places.tolist(), strict=True))
    # torch would wake its threads, which then spin for a millisecond on the cores that the next step needs.
    if logits.dtype != torch.bfloat16:
        return [_largest_of(row) for row in logits.numpy()]
    return [_largest_bfloat16(row) for row in logits.view(torch.int16).numpy()]


def _largest_of(row: np.ndarray[Any, Any]) -> tuple[float, int]:
    place = int(row.argmax())
    return float(row[place]), place


def _largest_bfloat16(bits: np.ndarray[Any, Any]) -> tuple[float, int]:
    """The same of bfloat16 given as int16, of which positive ones have the order of their bits."""
    place = int(bits.argmax())
    # Above the bits of -inf are negative NaNs. Among zeros and negative ones the order is another.
    if bits[place] <= 0 or bits.view(np.uint16).max() > _NEGATIVE_INFINITY_BITS:
        return _largest_of((bits.astype(np.int32) << 16).view(np.float32))
    return float((bits[place : place + 1].astype(np.int32) << 16).view(np.float32)[0]), place


def warp(row: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Scale one row [V] by temperature, then set what top_k and then top_p remove to ``-inf``; float64 [V]."""
    scores = row.to(torch.float64)
    # Softmax does not see the shift, and a tiny temperature can no longer overflow to +inf.
    scores = (scores - scores.max()) / params.temperature
    if params.top_k > 0:
        scores = _keep_top_k(scores, params.top_k)
    if params.top_p < 1.0:
        scores = _keep_top_p(scores, params.top_p)
    return scores


def _keep_top_k(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    smallest_kept = torch.topk(scores, min(top_k, scores.numel())).values[-1]
    return scores.masked_fill(scores < smallest_kept, NEGATIVE_INFINITY)


def _keep_top_p(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    probabilities = scores.softmax(dim=-1)
    # V tokens of less than (1 - top_p) / V each add up to less than 1 - top_p, so all of them are removed;
    # only the others need sorting. The factor keeps the largest token among them whatever the rounding.
    is_small = probabilities < 0.5 * (1 - top_p) / scores.numel()
    candidates = torch.nonzero(~is_small).squeeze(-1)
    ascending, order = torch.sort(probabilities[candidates], stable=True)
    cumulative = probabilities.masked_fill(~is_small, 0.0).sum() + ascending.cumsum(dim=-1)
    is_kept = cumulative > 1 - top_p
    is_kept[-1] = True
    kept = candidates[order[is_kept]]
    return torch.full_like(scores, NEGATIVE_INFINITY).index_copy(0, kept, scores[kept])


def _draw(scores: torch.Tensor, generator: torch.Generator) -> int:
    """Invert the cumulative distribution at one uniform number drawn on the CPU, on every device the same."""
    cumulative = scores.softmax(dim=-1).cumsum(dim=-1)
    uniform = float(torch.rand((), dtype=torch.float64, generator=generator))
    # With side="right" a token of probability 0 is never met: it adds nothing to the sum.
    token_id = int(torch.searchsorted(cumulative, uniform * float(cumulative[-1]), side="right"))
    return min(token_id, int(torch.nonzero(scores > NEGATIVE_INFINITY)[-1]))


def _numerical_error(largest: float) -> NumericalError:
    return NumericalError(
        f"the model's logits are not usable: their maximum is {largest}",
        remedy="check the model's weights and dtype; in float16 an overflow is the usual cause",
        field="logits",
    )
