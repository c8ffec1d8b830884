"""Panels of weights of which two in every four are kept: what the sparse linears read on a CPU.

`codegen/cpp/support/sparse_panels.h` says how they are laid out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..runtime.weight_memory import Empty, anywhere
from .sparse_weights import kept_channels, packed_channels
from .weight_panels import PANEL, PANELS_AT_ONCE, SPARSE_BLOCK, SPARSE_STEP, PanelFormat

_STEPS = SPARSE_BLOCK // SPARSE_STEP
_VALUES = SPARSE_STEP // 2
_INDEX_BYTES = PANEL * 4
_DTYPES = {8: torch.int8, 16: torch.bfloat16, 32: torch.float32}


def pack_sparse_panels(
    values: Tensor, indices: Tensor, panel_format: PanelFormat, row_order: Tensor, empty: Empty = anywhere
) -> Tensor:
    """Pack ``values`` [N, K/2] and ``indices`` uint8 [N, K/8], as the sparse linears have them, as uint8 [P, bytes].

    ``row_order`` is int64 [P * 32]: the row of each lane of each panel, or -1.
    """
    dtype = _DTYPES[panel_format.bits]
    if values.dtype != dtype:
        raise ValueError(f"{panel_format.name} panels hold {dtype}, not {values.dtype}")
    num_bytes = panel_format.panel_bytes(2 * values.shape[1])
    panels = empty((row_order.numel() // PANEL, num_bytes), torch.uint8)
    chunk_lanes = PANELS_AT_ONCE * PANEL
    for chunk, order in zip(panels.split(PANELS_AT_ONCE), row_order.split(chunk_lanes), strict=True):
        rows, is_absent = order.clamp(min=0), order < 0
        lanes, places = values.index_select(0, rows), kept_channels(indices.index_select(0, rows))
        lanes[is_absent], places[is_absent] = 0, 0
        chunk.copy_(_blocks(lanes, places)[:, :num_bytes])
    return panels


def _blocks(lanes: Tensor, places: Tensor) -> Tensor:
    """Panels of whole blocks, uint8 [P, bytes], of the values [P * 32, K/2] of their lanes and the places of these."""
    size, num_values = lanes.dtype.itemsize, lanes.shape[1]
    blocks = -(-2 * num_values // SPARSE_BLOCK)
    room = blocks * SPARSE_BLOCK // 2 - num_values
    lanes = pad(lanes.view(torch.uint8), (0, room * size)).view(-1, PANEL, blocks, _VALUES * size, 4)
    places = pad(places, (0, room)).view(-1, PANEL, blocks, _STEPS, _VALUES)
    words = sum(places[:, :, :, step] << 2 * step for step in range(_STEPS))
    parts = (words.transpose(1, 2).flatten(2), lanes.permute(0, 2, 3, 1, 4).flatten(2))
    return torch.cat(parts, 2).flatten(1)


def unpack_sparse_panels(
    panels: Tensor, panel_format: PanelFormat, row_order: Tensor, num_outputs: int, num_values: int
) -> tuple[Tensor, Tensor]:
    """The values [N, ``num_values``] and indices that ``pack_sparse_panels`` made ``panels`` of."""
    dtype, present = _DTYPES[panel_format.bits], row_order >= 0
    blocks = -(-2 * num_values // SPARSE_BLOCK)
    block_bytes = _INDEX_BYTES + _STEPS * panel_format.step_bytes
    whole = pad(panels, (0, blocks * block_bytes - panels.shape[1])).view(-1, blocks, block_bytes)
    words = whole[..., :_INDEX_BYTES].unflatten(2, (PANEL, _VALUES)).transpose(1, 2)
    places = torch.stack([words >> 2 * step & 3 for step in range(_STEPS)], 3).flatten(2).flatten(0, 1)
    lanes = whole[..., _INDEX_BYTES:].unflatten(2, (-1, PANEL, 4)).permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1)
    values = torch.empty(num_outputs, num_values, dtype=dtype)
    values[row_order[present]] = lanes.contiguous().view(dtype)[present, :num_values]
    channels = torch.empty(num_outputs, num_values, dtype=torch.uint8)
    channels[row_order[present]] = places[present, :num_values]
    return values, packed_channels(channels)
