"""Grids of 8 bits that all tokens of an activation share."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..codegen.ops import quantize_per_tensor
from ..codegen.ops.quantized import SMALLEST_MAXIMUM
from .calibration import largest_magnitude
from .linear_recipes import W8A8, LinearRecipe
from .smoothing_scales import on_8_bits


def is_static(recipe: LinearRecipe | None) -> bool:
    """Whether activations have one scale for all tokens."""
    return isinstance(recipe, W8A8) and recipe.activation_scale == "tensor"


def step_of(largest: float) -> float:
    """The step of the grid that reaches ``largest``; 1 where all is zero."""
    return largest / 127 if largest >= SMALLEST_MAXIMUM else 1.0


def rounded_activations(tokens: torch.Tensor, values: Sequence[torch.Tensor], recipe: LinearRecipe) -> torch.Tensor:
    """Some of the tokens of ``values``, float32 [T, K], on the grid that the recipe has for them."""
    if not isinstance(recipe, W8A8) or not is_static(recipe):
        return on_8_bits(tokens)
    largest = float(largest_magnitude(values, recipe.activation_percentile))
    codes, scale, _ = quantize_per_tensor.definition(tokens, torch.tensor([step_of(largest)]), tokens.shape[-1])
    return codes * scale
