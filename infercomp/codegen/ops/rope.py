"""Rotary position embedding."""

from __future__ import annotations

import torch

from .op import compute_dtype, like_first, op


@op("rotary_embedding(Tensor input, Tensor cos, Tensor sin, bool interleaved=False) -> Tensor", fake=like_first)
def rotary_embedding(
    input: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> torch.Tensor:
    """Rotate pairs of channels by an angle of the position (Su et al. 2021).

    input [..., D]; cos, sin [..., R] broadcast against input's leading dimensions; the first R <= D
    channels are rotated, the others pass (partial rotary). Pairs are (i, i + R/2) or, ``interleaved``,
    (2i, 2i + 1) as in GPT-J. Computed in float32 (float64 for float64 inputs), rounded once.
    """
    rotary_dim = cos.shape[-1]
    x = input[..., :rotary_dim].to(compute_dtype(input))
    if interleaved:
        pairs = x.unflatten(-1, (-1, 2))
        turned = torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)
    else:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    rotated = (x * cos.to(x.dtype) + turned * sin.to(x.dtype)).to(input.dtype)
    if rotary_dim == input.shape[-1]:
        return rotated
    return torch.cat((rotated, input[..., rotary_dim:]), dim=-1)
