"""The scales of SmoothQuant (Xiao et al. 2022), and what 8 bits change once they are folded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from ..codegen.ops import quantize_weight_int8
from .calibration import some_tokens

SEARCHED_ALPHAS = tuple(step / 20 for step in range(5, 18))
_SEARCH_TOKENS = 512
_LARGEST_EXPONENT = 16


def smoothing_scales(maxima: torch.Tensor, of_weights: torch.Tensor, alpha: float) -> torch.Tensor:
    """max|x|^alpha / max|w|^(1 - alpha) over its median, to the nearest power of two; 1 where a channel is all zeros.

    ``maxima`` may be means, of any power: what stands for the activations of each channel.
    A factor that all channels share changes nothing but the magnitude of the weights.
    """
    exponent = alpha * maxima.log2() - (1 - alpha) * of_weights.log2()
    exponent = torch.where((maxima > 0) & (of_weights > 0), exponent, torch.nan)
    exponent = (exponent - exponent.nanmedian()).nan_to_num(0.0)
    return torch.exp2(exponent.round().clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT))


def searched_tokens(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """The tokens of values [..., K] that alpha is searched on, float32 [T, K]."""
    return some_tokens(values, _SEARCH_TOKENS).float()


def errors_of_rounding(
    tokens: torch.Tensor, weights: Sequence[torch.Tensor], scales: Mapping[float, torch.Tensor]
) -> dict[float, float]:
    """For each of several ``scales`` [K], what 8 bits change in linears of these tokens [T, K] and weights [N, K].

    Squares of the outputs' errors as parts of the outputs' squares: the mean over tokens, so that the few with the
    largest outputs do not decide alone, summed over the linears.
    """
    matrices = [weight.float() for weight in weights]
    outputs = [F.linear(tokens, matrix) for matrix in matrices]
    errors = dict.fromkeys(scales, 0.0)
    for key, scale in scales.items():
        inputs = on_8_bits(tokens / scale)
        for matrix, output in zip(matrices, outputs, strict=True):
            rounded = F.linear(inputs, on_8_bits(matrix * scale))
            changed, whole = ((rounded - output).square().sum(-1), output.square().sum(-1))
            errors[key] += float((changed / whole.clamp(min=1e-30)).mean())
    return errors


def on_8_bits(rows: torch.Tensor) -> torch.Tensor:
    """The floats that the integers of each row stand for."""
    codes, scale = quantize_weight_int8.definition(rows)
    return codes.float() * scale[:, None]
