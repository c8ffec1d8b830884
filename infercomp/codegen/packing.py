"""How a bound weight is put into panels, and read out of them again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..runtime.weight_memory import Empty, anywhere
from .clustered_panels import pack_clustered_panels, unpack_clustered_panels
from .group_panels import pack_group_panels, unpack_group_panels
from .ops.group_codes import packed_codes, unpacked_codes
from .sparse_group_panels import pack_sparse_group_panels, unpack_sparse_group_panels
from .sparse_panels import pack_sparse_panels, unpack_sparse_panels
from .weight_panels import (
    INT8,
    PanelFormat,
    gated_row_order,
    pack_float_panels,
    pack_int8_panels,
    plain_row_order,
    unpack_float_panels,
    unpack_int8_panels,
)

HALF_PANEL = 16
Shape = tuple[int, ...]


@dataclass(frozen=True)
class PanelPacking:
    """Parts of a weight to panels of ``panel_format``, and back: values, then the indices of sparse ones, then scales
    and zeros of groups or a table and outliers.

    ``half_distance`` is 16, or the width of the gate for gated activations. ``is_transposed`` says that the
    values lie [K, N].
    """

    panel_format: PanelFormat
    half_distance: int
    is_transposed: bool = False

    def pack(self, *parts: torch.Tensor, empty: Empty = anywhere) -> torch.Tensor:
        values, *scales = parts
        values = values.t() if self.is_transposed else values
        order = self._row_order(values.shape[0])
        if self.panel_format.is_sparse and self.panel_format.group is not None:
            indices, *constants = scales
            codes, zeros = unpacked_codes(values, self.panel_format.bits), constants[1] if constants[1:] else None
            return pack_sparse_group_panels(self.panel_format, codes, indices, constants[0], zeros, order, empty)
        if self.panel_format.is_sparse:
            return pack_sparse_panels(values, scales[0], self.panel_format, order, empty)
        room = self.panel_format.outlier_room
        if room is not None:
            table, counts, columns, excess = scales
            return pack_clustered_panels(unpacked_codes(values, 4), table, counts, columns, excess, room, order, empty)
        if self.panel_format.group is not None:
            bits, zeros = self.panel_format.bits, scales[1] if len(scales) > 1 else None
            return pack_group_panels(bits, unpacked_codes(values, bits), scales[0], zeros, order, empty)
        pack = pack_int8_panels if self.panel_format == INT8 else pack_float_panels
        return pack(values, order, empty)

    def unpack(self, panels: torch.Tensor, shapes: Sequence[Shape]) -> tuple[torch.Tensor, ...]:
        """The parts, of these shapes, that ``pack`` made the panels of, bit for bit."""
        num_outputs, num_inputs = reversed(shapes[0]) if self.is_transposed else shapes[0]
        order = self._row_order(num_outputs)
        if self.panel_format.is_sparse and self.panel_format.group is not None:
            bits = self.panel_format.bits
            num_inputs = 2 * num_inputs * 8 // bits
            codes, *rest = unpack_sparse_group_panels(panels, self.panel_format, order, num_outputs, num_inputs)
            return (packed_codes(codes, bits), *rest)
        if self.panel_format.is_sparse:
            return unpack_sparse_panels(panels, self.panel_format, order, num_outputs, num_inputs)
        if self.panel_format.outlier_room is not None:
            sizes = (num_outputs, 2 * num_inputs, shapes[1][1])
            codes, *rest = unpack_clustered_panels(panels, self.panel_format, order, *sizes)
            return (packed_codes(codes, 4), *rest)
        if self.panel_format.group is not None:
            bits = self.panel_format.bits
            num_inputs = num_inputs * 8 // bits
            codes, *scales = unpack_group_panels(panels, self.panel_format, order, num_outputs, num_inputs)
            return (packed_codes(codes, bits), *scales)
        unpacked = unpack_int8_panels if self.panel_format == INT8 else unpack_float_panels
        values = unpacked(panels, order, num_outputs, num_inputs)
        return (values.t().contiguous() if self.is_transposed else values,)

    def _row_order(self, num_outputs: int) -> torch.Tensor:
        is_plain = self.half_distance == HALF_PANEL
        return plain_row_order(num_outputs) if is_plain else gated_row_order(num_outputs // 2)
