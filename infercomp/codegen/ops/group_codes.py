"""Unsigned codes of 3, 4 or 8 bits in groups that share a scale: how they lie in bytes, what they stand for, and the
grid that rounds to nearest.

Letters: K input channels, N output channels, b bits, g channels of a group, G = K / g groups. A row of codes is one
little-endian stream of bits without gaps: code k takes the bits from b k on, so that 8 codes fill b bytes (4 bits: the
low nibble first). With a float16 scale [N, G] and a zero [N, G], a code stands for

    scale * (code - zero)     with zeros in uint8, or the middle of the codes, 2^(b - 1), for all
    scale * code + zero       with zeros in float16: what code 0 stands for (Q4_1 of llama.cpp)
"""

from __future__ import annotations

import torch

CODE_BITS = (3, 4, 8)
_CODES_AT_ONCE = 8


def middle_code(bits: int) -> int:
    """The zero of a symmetric grid."""
    return 1 << (bits - 1)


def highest_code(bits: int) -> int:
    return (1 << bits) - 1


def packed_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of any dtype [..., K], K a multiple of 8, as bytes uint8 [..., b K / 8]."""
    if bits == 8:
        return codes.to(torch.uint8)
    word = torch.zeros(*codes.shape[:-1], codes.shape[-1] // _CODES_AT_ONCE, dtype=torch.int64, device=codes.device)
    for position in range(_CODES_AT_ONCE):
        word |= codes[..., position::_CODES_AT_ONCE].to(torch.int64) << (bits * position)
    return torch.stack([(word >> (8 * byte) & 255).to(torch.uint8) for byte in range(bits)], -1).flatten(-2)


def unpacked_codes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes uint8 [..., K] of bytes [..., b K / 8]."""
    if bits == 8:
        return packed
    if bits == 4:
        return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    parts = packed.unflatten(-1, (-1, bits)).to(torch.int32).unbind(-1)
    word = sum((part << (8 * byte) for byte, part in enumerate(parts)), start=torch.zeros_like(parts[0]))
    codes = [(word >> (bits * position) & highest_code(bits)).to(torch.uint8) for position in range(_CODES_AT_ONCE)]
    return torch.stack(codes, -1).flatten(-2)


def num_codes(packed: torch.Tensor, bits: int) -> int:
    """K of bytes [..., b K / 8]."""
    return packed.shape[-1] * 8 // bits


def restored(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int, dtype: torch.dtype
) -> torch.Tensor:
    """What codes [N, K] stand for, computed in ``dtype``."""
    groups = codes.unflatten(-1, (scale.shape[-1], -1)).to(dtype)
    steps = scale.to(dtype)[..., None]
    if zero is not None and zero.is_floating_point():
        return (groups * steps + zero.to(dtype)[..., None]).flatten(-2)
    shift = middle_code(bits) if zero is None else zero.to(dtype)[..., None]
    return ((groups - shift) * steps).flatten(-2)


def nearest_grid(
    weight: torch.Tensor, bits: int, group_size: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """weight [N, K] -> its nearest codes [N, K], the scales and the zeros [N, G], float32 numbers as they are stored.

    ``symmetric`` maps the value of the largest magnitude of a group to the lowest code (llama.cpp's Q4_0) or to one as
    far from the middle as the highest, whichever errs less. Otherwise the grid goes from the smallest value, or 0, to
    the largest, or 0, and meets 0.
    """
    groups = weight.to(torch.float32).unflatten(-1, (-1, group_size))
    codes, scale, zero = (_symmetric if symmetric else _asymmetric)(groups, bits)
    return codes.flatten(-2), scale.squeeze(-1), zero.squeeze(-1)


def _nearest(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | float, bits: int) -> torch.Tensor:
    steps = torch.where(scale == 0, 0.0, groups / scale)
    return torch.round(steps + zero).clamp(0, highest_code(bits))


def _symmetric(groups: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    middle = float(middle_code(bits))
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    wide, narrow = ((extreme / step).half().float() for step in (-middle, middle - 1))
    codes = [_nearest(groups, scale, middle, bits) for scale in (wide, narrow)]
    errors = [
        ((code - middle) * scale - groups).square().sum(-1, keepdim=True)
        for code, scale in zip(codes, (wide, narrow), strict=True)
    ]
    is_wide = errors[0] <= errors[1]
    scale = torch.where(is_wide, wide, narrow)
    return torch.where(is_wide, codes[0], codes[1]), scale, torch.full_like(scale, middle)


def _asymmetric(groups: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / highest_code(bits)).half().float()
    zero = torch.round(torch.where(scale == 0, 0.0, -low / scale).clamp(max=highest_code(bits)))
    return _nearest(groups, scale, zero, bits), scale, zero
