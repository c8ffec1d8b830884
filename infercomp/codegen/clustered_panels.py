"""Panels of weights that are codes of a table, with a few outliers: what ``clustered_weight_linear`` reads on a CPU.

`codegen/cpp/support/clustered_panels.h` says how they are laid out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.weight_memory import Empty, anywhere
from .weight_panels import ALIGNMENT, HALF, PANEL, PanelFormat, clustered

LARGEST_TABLE = 16
_TABLES_BYTES = PANEL * 4


def pack_clustered_panels(
    codes: Tensor,
    table: Tensor,
    counts: Tensor,
    columns: Tensor,
    excess: Tensor,
    room: int,
    row_order: Tensor,
    empty: Empty = anywhere,
) -> Tensor:
    """Pack ``codes`` uint8 [N, K] of ``table`` and the outliers, as ``clustered_weight_linear`` has them.

    ``row_order`` is int64 [P * 32]: the row of each lane of each panel, or -1; 16 lanes are 16 rows of one table row.
    """
    num_inputs = codes.shape[1]
    panel_format = clustered(room)
    panels = empty((row_order.numel() // PANEL, panel_format.panel_bytes(num_inputs)), torch.uint8).zero_()
    rows, present = row_order.clamp(min=0), row_order >= 0
    tables = torch.zeros(row_order.numel() // HALF, LARGEST_TABLE)
    tables[:, : table.shape[1]] = table[rows[::HALF] // HALF]
    panels[:, :_TABLES_BYTES] = tables.view(-1, PANEL).view(torch.uint8)
    values = torch.where(present[:, None], codes[rows], 0).view(-1, PANEL, num_inputs // 8, 2, 4).transpose(1, 2)
    words = (values[..., 1, :] << 4 | values[..., 0, :]).flatten(1)
    panels[:, _TABLES_BYTES : -_counts_at(panel_format)] = words
    numbers, outliers = _outliers(panels, panel_format)
    lanes = torch.empty(len(codes), dtype=torch.int64)
    lanes[row_order[present]] = torch.arange(row_order.numel())[present]
    lane = lanes.repeat_interleave(counts)
    half, order = (lane // HALF).sort(stable=True)
    of_half = half.bincount(minlength=len(tables))
    if int(of_half.max()) > room:
        raise ValueError(f"{int(of_half.max())} outliers in 16 rows, and room for {room}")
    place = torch.arange(len(half)) - (of_half.cumsum(0) - of_half)[half]
    numbers.view(-1, HALF)[:, :2] = of_half.view(-1, 2).int()
    outliers.view(-1, room, 2)[half, place, 0] = (columns[order] * HALF + lane[order] % HALF).int()
    outliers.view(-1, room, 2)[half, place, 1] = excess[order].view(torch.int32)
    panels[:, -_counts_at(panel_format) :] = torch.cat((numbers, outliers), 1).view(torch.uint8)
    return panels


def _counts_at(panel_format: PanelFormat) -> int:
    """Bytes from the end of a panel to its numbers of outliers."""
    return ALIGNMENT + PANEL // HALF * panel_format.outlier_bytes


def _outliers(panels: Tensor, panel_format: PanelFormat) -> tuple[Tensor, Tensor]:
    """Numbers of outliers int32 [P, 16], the first two of them used, and outliers [P, 2 * room * 2], copied."""
    words = panels[:, -_counts_at(panel_format) :].contiguous().view(torch.int32)
    return words[:, :HALF].contiguous(), words[:, HALF:].contiguous()


def unpack_clustered_panels(
    panels: Tensor, panel_format: PanelFormat, row_order: Tensor, num_outputs: int, num_inputs: int, size: int
) -> tuple[Tensor, ...]:
    """The codes uint8 [N, K] and what else ``pack_clustered_panels`` was given, its table of ``size`` columns."""
    present = row_order >= 0
    words = panels[:, _TABLES_BYTES : -_counts_at(panel_format)].reshape(-1, num_inputs // 8, PANEL, 4)
    values = torch.stack((words & 15, words >> 4), 3).transpose(1, 2).reshape(-1, num_inputs)
    codes = torch.empty(num_outputs, num_inputs, dtype=torch.uint8)
    codes[row_order[present]] = values[present]
    table = torch.empty(num_outputs // HALF, size)
    halves = row_order[::HALF]
    tables = panels[:, :_TABLES_BYTES].contiguous().view(torch.float32).view(-1, LARGEST_TABLE)
    table[halves[halves >= 0] // HALF] = tables[halves >= 0, :size]
    numbers, outliers = _outliers(panels, panel_format)
    assert panel_format.outlier_room is not None
    room = panel_format.outlier_room
    entries = outliers.view(-1, room, 2)
    is_used = torch.arange(room) < numbers.view(-1, HALF)[:, :2].reshape(-1, 1)
    half = torch.arange(len(entries)).repeat_interleave(is_used.sum(1))
    place, excess = entries[is_used].unbind(1)
    row = row_order[half * HALF + place % HALF]
    order = (row * num_inputs + place // HALF).argsort()
    counts = row.bincount(minlength=num_outputs).int()
    return codes, table, counts, (place // HALF)[order], excess[order].contiguous().view(torch.float32)
