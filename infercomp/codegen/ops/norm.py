"""Normalisations over the last dimension."""

from __future__ import annotations

import torch

from .op import compute_dtype, like_first, op


@op("rms_norm(Tensor input, Tensor? weight, float eps, bool unit_offset=False) -> Tensor", fake=like_first)
def rms_norm(input: torch.Tensor, weight: torch.Tensor | None, eps: float, unit_offset: bool = False) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) * weight (Zhang & Sennrich 2019); ``unit_offset`` scales by 1 + weight (Gemma).

    input [..., D], weight [D]; computed in float32 (float64 for float64 inputs), rounded once.
    """
    x = input.to(compute_dtype(input))
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        x = x * (1.0 + weight.to(x.dtype) if unit_offset else weight.to(x.dtype))
    return x.to(input.dtype)


@op("layer_norm(Tensor input, Tensor? weight, Tensor? bias, float eps) -> Tensor", fake=like_first)
def layer_norm(input: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias (Ba et al. 2016); input [..., D], weight and bias [D]."""
    return torch.nn.functional.layer_norm(input, input.shape[-1:], weight, bias, eps)
