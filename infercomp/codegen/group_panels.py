"""Panels of codes in groups with their scales and zeros: what ``group_linear`` and ``group_weight_linear`` read on a
CPU.

A group of a panel is its codes, 32 float16 scales and 32 zeros, if it has any. Codes lie in steps, of 8 inputs for 4
bits, 4 for 8 bits and 32 for 3 bits; in a step each of the 32 lanes has a 32-bit word after the other:

    8 bits   byte i is code i
    4 bits   byte i is code i in its low and code i + 4 in its high nibble
    3 bits   of four words n0 … n3 of 8 codes, as those of 4 bits: n0 | n1 << 2 without their bits 2 and 3, the same of
             n2 and n3, and their bits 2, one of each nibble from each: n0 >> 2 | n1 >> 1 | n2 | n3 << 1
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.weight_memory import Empty, anywhere
from .weight_panels import PANEL, PanelFormat, Zeros, chunks, gathered, grouped, num_panels, scatter

_LOW_BITS, _HIGH_BIT = 0x33, 0x44
_ZERO_KINDS: dict[torch.dtype, Zeros] = {torch.uint8: "points", torch.float16: "values"}


def pack_group_panels(
    bits: int, codes: Tensor, scales: Tensor, zeros: Tensor | None, row_order: Tensor, empty: Empty = anywhere
) -> Tensor:
    """Pack `codes` uint8 [N, K] of so many bits with its groups' scales and zeros as uint8 [P, panel bytes].

    `scales` is float16 [N, K / g] and `zeros` uint8 or float16 [N, K / g] or None, as group_codes.py has them.
    `row_order` is int64 [P * 32]: the row of each lane of each panel, or -1.
    """
    num_inputs, num_groups = codes.shape[1], scales.shape[1]
    if (
        codes.dtype != torch.uint8
        or scales.dtype != torch.float16
        or (zeros is not None and zeros.dtype not in _ZERO_KINDS)
    ):
        raise ValueError("panels of groups take uint8 codes, float16 scales and uint8 or float16 zeros")
    if num_groups == 0 or num_inputs % num_groups:
        raise ValueError(f"{num_inputs} inputs do not divide into {num_groups} groups")
    panel_format = grouped(bits, num_inputs // num_groups, "middle" if zeros is None else _ZERO_KINDS[zeros.dtype])
    group_bytes, scales_at = panel_format.group_bytes, panel_format.code_bytes
    panels = empty((num_panels(row_order), panel_format.panel_bytes(num_inputs)), torch.uint8).zero_()
    for chunk, rows in chunks(row_order):
        groups = panels[chunk, : num_groups * group_bytes].unflatten(1, (num_groups, group_bytes))
        words = words_of_codes(gathered(codes, rows).view(-1, PANEL, num_groups, panel_format.group), bits)
        groups[:, :, :scales_at].unflatten(2, (-1, PANEL, 4)).copy_(words.permute(0, 2, 3, 1, 4))
        ends = scales_at + PANEL * 2
        groups[:, :, scales_at:ends] = of_lanes(scales, rows)
        if zeros is not None:
            groups[:, :, ends:] = of_lanes(zeros, rows)
    return panels


def unpack_group_panels(
    panels: Tensor, panel_format: PanelFormat, row_order: Tensor, num_outputs: int, num_inputs: int
) -> tuple[Tensor, ...]:
    """The codes uint8 [N, K], scales and, where there are any, zeros that ``pack_group_panels`` was given."""
    assert panel_format.group is not None
    num_groups, scales_at = num_inputs // panel_format.group, panel_format.code_bytes
    kinds = [torch.float16, *(dtype for dtype, zeros in _ZERO_KINDS.items() if zeros == panel_format.zeros)]
    codes = torch.empty(num_outputs, num_inputs, dtype=torch.uint8)
    constants = [torch.empty(num_outputs, num_groups, dtype=dtype) for dtype in kinds]
    for chunk, rows in chunks(row_order):
        groups = panels[chunk, : num_groups * panel_format.group_bytes].unflatten(1, (num_groups, -1))
        words = groups[:, :, :scales_at].unflatten(2, (-1, PANEL, 4)).permute(0, 3, 1, 2, 4)
        scatter(codes, rows, codes_of_words(words, panel_format.bits).flatten(2).flatten(0, 1))
        start = scales_at
        for constant in constants:
            end = start + PANEL * constant.dtype.itemsize
            lanes = groups[:, :, start:end].contiguous().view(constant.dtype)
            scatter(constant, rows, lanes.transpose(1, 2).flatten(0, 1))
            start = end
    return codes, *constants


def of_lanes(constants: Tensor, rows: Tensor) -> Tensor:
    """Scales or zeros [N, G] of these rows as bytes [p, G, 32 of them]."""
    lanes = gathered(constants, rows).view(-1, PANEL, constants.shape[1]).transpose(1, 2)
    return lanes.contiguous().view(torch.uint8)


def words_of_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., k] as words of four bytes [..., words, 4]."""
    if bits == 8:
        return codes.unflatten(-1, (-1, 4))
    nibbles = codes.unflatten(-1, (-1, 2, 4))
    words = nibbles[..., 1, :] << 4 | nibbles[..., 0, :]
    if bits == 4:
        return words
    parts = words.unflatten(-2, (-1, 4)).unbind(-2)
    low, high = ([part & mask for part in parts] for mask in (_LOW_BITS, _HIGH_BIT))
    highs = high[0] >> 2 | high[1] >> 1 | high[2] | high[3] << 1
    return torch.stack((low[0] | low[1] << 2, low[2] | low[3] << 2, highs), -2).flatten(-3, -2)


def codes_of_words(words: Tensor, bits: int) -> Tensor:
    """What ``words_of_codes`` was given."""
    if bits == 8:
        return words.flatten(-2)
    if bits == 3:
        low, other, high = words.unflatten(-2, (-1, 3)).unbind(-2)
        lows = (low & _LOW_BITS, low >> 2 & _LOW_BITS, other & _LOW_BITS, other >> 2 & _LOW_BITS)
        highs = (high << 2 & _HIGH_BIT, high << 1 & _HIGH_BIT, high & _HIGH_BIT, high >> 1 & _HIGH_BIT)
        words = torch.stack([one | another for one, another in zip(lows, highs, strict=True)], -2).flatten(-3, -2)
    return torch.stack((words & 15, words >> 4), -2).flatten(-3)
