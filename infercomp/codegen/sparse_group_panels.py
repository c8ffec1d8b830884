"""Panels of codes in groups of which two in every four are kept: what ``sparse_group_weight_linear`` reads on a CPU.

A group of a panel is blocks of 32 inputs, then 32 float16 scales and 32 zeros, if it has any. A block is 32 words of
places as in sparse_panels.py, one an output, and then the 16 codes of every output in words as in group_panels.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.weight_memory import Empty, anywhere
from .group_panels import codes_of_words, of_lanes, words_of_codes
from .sparse_weights import kept_channels, packed_channels
from .weight_panels import PANEL, SPARSE_BLOCK, SPARSE_STEP, PanelFormat, chunks, gathered, num_panels, scatter

_STEPS, _VALUES = SPARSE_BLOCK // SPARSE_STEP, SPARSE_STEP // 2
_KEPT = _STEPS * _VALUES


def pack_sparse_group_panels(
    panel_format: PanelFormat,
    codes: Tensor,
    indices: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    row_order: Tensor,
    empty: Empty = anywhere,
) -> Tensor:
    """Pack the kept `codes` uint8 [N, K/2] and `indices` uint8 [N, K/8] with the groups' constants as uint8 [P, bytes].

    `scales` is float16 [N, K / g] and `zeros` uint8 [N, K / g] or None. `row_order` is int64 [P * 32]: the row of each
    lane of each panel, or -1.
    """
    num_groups, num_inputs = scales.shape[1], 2 * codes.shape[1]
    group_bytes, scales_at = panel_format.group_bytes, panel_format.code_bytes
    panels = empty((num_panels(row_order), panel_format.panel_bytes(num_inputs)), torch.uint8).zero_()
    for chunk, rows in chunks(row_order):
        groups = panels[chunk, : num_groups * group_bytes].unflatten(1, (num_groups, group_bytes))
        shape = (-1, PANEL, num_groups, num_inputs // num_groups // SPARSE_BLOCK, _KEPT)
        places = gathered(kept_channels(indices), rows).view(shape).unflatten(-1, (_STEPS, _VALUES))
        of_places = sum(places[..., step, :] << 2 * step for step in range(_STEPS))
        words = words_of_codes(gathered(codes, rows).view(shape), panel_format.bits)
        blocks = torch.cat((of_places[..., None, :], words), -2)
        blocks = blocks.permute(0, 2, 3, 4, 1, 5)
        groups[:, :, :scales_at].unflatten(2, blocks.shape[2:]).copy_(blocks)
        ends = scales_at + PANEL * 2
        groups[:, :, scales_at:ends] = of_lanes(scales, rows)
        if zeros is not None:
            groups[:, :, ends:] = of_lanes(zeros, rows)
    return panels


def unpack_sparse_group_panels(
    panels: Tensor, panel_format: PanelFormat, row_order: Tensor, num_outputs: int, num_inputs: int
) -> tuple[Tensor, ...]:
    """The kept codes uint8 [N, K/2], indices, scales and, where there are any, zeros that the panels were packed of."""
    assert panel_format.group is not None
    num_groups, scales_at = num_inputs // panel_format.group, panel_format.code_bytes
    kinds = [torch.float16, torch.uint8][: 1 + (panel_format.zeros == "points")]
    codes, channels = (torch.empty(num_outputs, num_inputs // 2, dtype=torch.uint8) for _ in range(2))
    constants = [torch.empty(num_outputs, num_groups, dtype=dtype) for dtype in kinds]
    for chunk, rows in chunks(row_order):
        groups = panels[chunk, : num_groups * panel_format.group_bytes].unflatten(1, (num_groups, -1))
        shape = (panel_format.group // SPARSE_BLOCK, -1, PANEL, 4)
        blocks = groups[:, :, :scales_at].unflatten(2, shape).permute(0, 4, 1, 2, 3, 5)
        places = torch.stack([blocks[..., 0, :] >> 2 * step & 3 for step in range(_STEPS)], -2)
        scatter(channels, rows, places.flatten(2).flatten(0, 1))
        scatter(codes, rows, codes_of_words(blocks[..., 1:, :], panel_format.bits).flatten(2).flatten(0, 1))
        start = scales_at
        for constant in constants:
            end = start + PANEL * constant.dtype.itemsize
            lanes = groups[:, :, start:end].contiguous().view(constant.dtype)
            scatter(constant, rows, lanes.transpose(1, 2).flatten(0, 1))
            start = end
    return codes, packed_channels(channels), *constants
