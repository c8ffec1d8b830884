"""How a bound weight is put into panels."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .weight_panels import (
    INT8,
    PanelFormat,
    gated_row_order,
    pack_float_panels,
    pack_int4_panels,
    pack_int8_panels,
    plain_row_order,
)

HALF_PANEL = 16
Pack = Callable[..., torch.Tensor]


def pack(panel_format: PanelFormat, half_distance: int, *, is_transposed: bool = False) -> Pack:
    """A function of a weight's parts (values, then scales and zeros of 4-bit formats) to panels, uint8."""

    def packed(values: torch.Tensor, *scales: torch.Tensor) -> torch.Tensor:
        values = values.t() if is_transposed else values
        num_outputs = values.shape[0]
        order = plain_row_order(num_outputs) if half_distance == HALF_PANEL else gated_row_order(num_outputs // 2)
        if panel_format.group is not None:
            return pack_int4_panels(_codes(values), scales[0], scales[1] if len(scales) > 1 else None, order)
        return pack_int8_panels(values, order) if panel_format == INT8 else pack_float_panels(values, order)

    return packed


def _codes(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
