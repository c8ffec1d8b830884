"""Weights in the order in which the CPU kernels read them: panels of 32 outputs, each one sequential stream.

`codegen/cpp/support/gemm.h` multiplies what is made here, and says in its head how a panel is laid out. Which row of
the weight each of a panel's 32 lanes computes is given as a row order; -1 is an output of zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

PANEL = 32
HALF = PANEL // 2
ALIGNMENT = 64
OUTLIER_BYTES = 8
INT8_OFFSET = 128
SYMMETRIC_ZERO_POINT = 8
# Rows are gathered this many panels at a time, so that packing needs little memory beside its result.
PANELS_AT_ONCE = 16


@dataclass(frozen=True)
class PanelFormat:
    """How the weights of one panel are stored: `bits` each, in 32-bit words of 32 // bits consecutive k.

    With a `group` (4 bits only), each group of that many k ends in 32 float16 scales and, with `zero_points`, 32 uint8.
    With `outlier_room`, which the name has too, words are codes of tables (clustered_panels.py).
    """

    name: str
    bits: int
    group: int | None = None
    zero_points: bool = False
    outlier_room: int | None = field(default=None, repr=False)

    @property
    def weights_per_word(self) -> int:
        return 32 // self.bits

    @property
    def group_bytes(self) -> int:
        """Bytes of one group of one panel, its scales and zero points included."""
        assert self.group is not None
        return self.group * PANEL // 2 + PANEL * 2 + (PANEL if self.zero_points else 0)

    @property
    def outlier_bytes(self) -> int:
        """Bytes of the outliers of one half of a panel."""
        assert self.outlier_room is not None
        return self.outlier_room * OUTLIER_BYTES

    def panel_bytes(self, k: int) -> int:
        """Bytes of one panel of a weight with `k` inputs, a multiple of 64."""
        if self.outlier_room is not None:
            if k % self.weights_per_word or self.outlier_room % 4:
                what = f"not {k} and {self.outlier_room}"
                raise ValueError(f"clustered panels take multiples of 8 inputs and of 4 outliers, {what}")
            return PANEL * 4 + k // self.weights_per_word * PANEL * 4 + ALIGNMENT + PANEL // HALF * self.outlier_bytes
        if self.group is None:
            return -(-k // self.weights_per_word) * PANEL * 4
        if k % self.group:
            raise ValueError(f"{k} inputs do not divide into groups of {self.group}")
        return -(-(k // self.group * self.group_bytes) // ALIGNMENT) * ALIGNMENT


F32 = PanelFormat("f32", bits=32)
BF16 = PanelFormat("bf16", bits=16)
INT8 = PanelFormat("int8", bits=8)


def int4(group: int, zero_points: bool) -> PanelFormat:
    """The 4-bit format with groups of `group` inputs, a multiple of 32."""
    if group <= 0 or group % 32:
        raise ValueError(f"a group of {group} inputs is not a positive multiple of 32")
    return PanelFormat(f"int4_g{group}" + ("_zp" if zero_points else ""), bits=4, group=group, zero_points=zero_points)


def clustered(outlier_room: int) -> PanelFormat:
    """4-bit codes of a table for each half of a panel, with room for so many outliers of each half."""
    return PanelFormat(f"clustered_o{outlier_room}", bits=4, outlier_room=outlier_room)


def plain_row_order(num_outputs: int) -> Tensor:
    """Row order int64 [P * 32] in which panel j, lane i is row 32 j + i, and -1 past the last."""
    order = torch.arange(-(-num_outputs // PANEL) * PANEL)
    order[num_outputs:] = -1
    return order


def gated_row_order(num_outputs: int) -> Tensor:
    """Row order int64 [P * 32] for a weight of gate rows [0, num_outputs) followed by as many up rows.

    In panel j, lanes 0..15 are gate rows 16 j + i and lanes 16..31 the up rows of the same outputs.
    """
    gate = torch.arange(-(-num_outputs // HALF) * HALF)
    gate[num_outputs:] = -1
    up = torch.where(gate < 0, -1, gate + num_outputs)
    return torch.stack((gate.view(-1, HALF), up.view(-1, HALF)), dim=1).flatten()


def pack_float_panels(weight: Tensor, row_order: Tensor) -> Tensor:
    """Pack `weight` [N, K], float32 or bfloat16, as [P, ceil(K / x), 32, x] of its dtype, x being 1 or 2.

    `row_order` is int64 [P * 32]: the row of each lane of each panel, or -1.
    """
    if weight.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"float panels hold float32 or bfloat16, not {weight.dtype}")
    return _pack_words(weight, row_order, F32 if weight.dtype == torch.float32 else BF16)


def pack_int8_panels(weight: Tensor, row_order: Tensor) -> Tensor:
    """Pack `weight` [N, K] int8 as uint8 [P, ceil(K / 4), 32, 4] of weight + 128.

    `row_order` is int64 [P * 32]: the row of each lane of each panel, or -1.
    """
    if weight.dtype != torch.int8:
        raise ValueError(f"INT8 panels hold int8, not {weight.dtype}")
    panels = _pack_words(weight, row_order, INT8).view(torch.uint8)
    return panels.bitwise_xor_(INT8_OFFSET)


def pack_int4_panels(q: Tensor, scales: Tensor, zeros: Tensor | None, row_order: Tensor) -> Tensor:
    """Pack `q` uint8 [N, K] of values 0..15 with its groups' scales and zero points as uint8 [P, panel bytes].

    A weight is scales[n, g] * (q[n, k] - zeros[n, g]) with g = k // G; `scales` is float16 [N, K / G] and `zeros`
    uint8 [N, K / G], or None where all are 8. `row_order` is int64 [P * 32]: the row of each lane of each panel, or -1.
    """
    num_inputs, num_groups = q.shape[1], scales.shape[1]
    if q.dtype != torch.uint8 or scales.dtype != torch.float16 or (zeros is not None and zeros.dtype != torch.uint8):
        raise ValueError("INT4 panels take uint8 values, float16 scales and uint8 zero points")
    if num_groups == 0 or num_inputs % num_groups:
        raise ValueError(f"{num_inputs} inputs do not divide into {num_groups} groups")
    panel_format = int4(num_inputs // num_groups, zeros is not None)
    group_bytes, scales_at = panel_format.group_bytes, num_inputs // num_groups * PANEL // 2
    panels = torch.zeros(_num_panels(row_order), panel_format.panel_bytes(num_inputs), dtype=torch.uint8)
    for chunk, rows in _chunks(row_order):
        groups = panels[chunk, : num_groups * group_bytes].unflatten(1, (num_groups, group_bytes))
        # [p, 32, group, word, nibble, byte] to [p, group, word, 32, byte]: bytes 0..3 low, 4..7 high.
        values = _gather(q, rows).view(-1, PANEL, num_groups, scales_at // (PANEL * 4), 2, 4).permute(0, 2, 3, 1, 4, 5)
        words = groups[:, :, :scales_at].unflatten(2, (-1, PANEL, 4))
        words.copy_(values[..., 1, :] << 4 | values[..., 0, :])
        lane_scales = _gather(scales, rows).view(-1, PANEL, num_groups).transpose(1, 2).contiguous()
        groups[:, :, scales_at : scales_at + PANEL * 2] = lane_scales.view(torch.uint8)
        if zeros is not None:
            groups[:, :, scales_at + PANEL * 2 :] = _gather(zeros, rows).view(-1, PANEL, num_groups).transpose(1, 2)
    return panels


def unpack_float_panels(panels: Tensor, row_order: Tensor, num_outputs: int, num_inputs: int) -> Tensor:
    """The weight [N, K] that ``pack_float_panels`` made ``panels`` of."""
    return _unpack_words(panels, row_order, num_outputs, num_inputs)


def unpack_int8_panels(panels: Tensor, row_order: Tensor, num_outputs: int, num_inputs: int) -> Tensor:
    """The weight int8 [N, K] that ``pack_int8_panels`` made ``panels`` of."""
    return _unpack_words(panels, row_order, num_outputs, num_inputs).bitwise_xor_(INT8_OFFSET).view(torch.int8)


def unpack_int4_panels(
    panels: Tensor, panel_format: PanelFormat, row_order: Tensor, num_outputs: int, num_inputs: int
) -> tuple[Tensor, ...]:
    """The values uint8 [N, K], scales and, where there are any, zero points that ``pack_int4_panels`` was given."""
    assert panel_format.group is not None
    num_groups, scales_at = num_inputs // panel_format.group, panel_format.group * PANEL // 2
    q = torch.empty(num_outputs, num_inputs, dtype=torch.uint8)
    scales = torch.empty(num_outputs, num_groups, dtype=torch.float16)
    zeros = torch.empty(num_outputs, num_groups, dtype=torch.uint8)
    for chunk, rows in _chunks(row_order):
        groups = panels[chunk, : num_groups * panel_format.group_bytes].unflatten(1, (num_groups, -1))
        # [p, group, word, 32, byte] to [p, 32, group, word, nibble, byte].
        words = groups[:, :, :scales_at].unflatten(2, (-1, PANEL, 4)).permute(0, 3, 1, 2, 4)
        _scatter(q, rows, torch.stack((words & 15, words >> 4), dim=4).flatten(2).flatten(0, 1))
        ends = scales_at + PANEL * 2
        lane_scales = groups[:, :, scales_at:ends].contiguous().view(torch.float16)
        _scatter(scales, rows, lane_scales.transpose(1, 2).flatten(0, 1))
        if panel_format.zero_points:
            _scatter(zeros, rows, groups[:, :, ends:].transpose(1, 2).flatten(0, 1))
    return (q, scales, zeros) if panel_format.zero_points else (q, scales)


def _unpack_words(panels: Tensor, row_order: Tensor, num_outputs: int, num_inputs: int) -> Tensor:
    weight = torch.empty(num_outputs, num_inputs, dtype=panels.dtype)
    for chunk, rows in _chunks(row_order):
        lanes = panels[chunk].transpose(1, 2).flatten(2)
        _scatter(weight, rows, lanes[:, :, :num_inputs].flatten(0, 1))
    return weight


def _pack_words(weight: Tensor, row_order: Tensor, panel_format: PanelFormat) -> Tensor:
    num_inputs, per_word = weight.shape[1], panel_format.weights_per_word
    whole, rest = divmod(num_inputs, per_word)
    panels = torch.empty(_num_panels(row_order), whole + bool(rest), PANEL, per_word, dtype=weight.dtype)
    for chunk, rows in _chunks(row_order):
        lanes = _gather(weight, rows).view(-1, PANEL, num_inputs)
        words = lanes[:, :, : whole * per_word].unflatten(2, (whole, per_word))
        panels[chunk, :whole] = words.transpose(1, 2)
        if rest:
            panels[chunk, whole] = 0
            panels[chunk, whole, :, :rest] = lanes[:, :, whole * per_word :]
    return panels


def _num_panels(row_order: Tensor) -> int:
    num_lanes: int = row_order.numel()
    if num_lanes % PANEL:
        raise ValueError(f"a row order of {num_lanes} lanes does not fill panels of {PANEL}")
    return num_lanes // PANEL


def _chunks(row_order: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """A few panels at a time, with the rows of their lanes."""
    for first in range(0, _num_panels(row_order), PANELS_AT_ONCE):
        chunk = slice(first, first + PANELS_AT_ONCE)
        yield chunk, row_order.view(-1, PANEL)[chunk].flatten()


def _gather(source: Tensor, rows: Tensor) -> Tensor:
    """The named rows of `source`, zeros where the name is -1."""
    gathered = source.detach().index_select(0, rows.clamp(min=0))
    gathered[rows < 0] = 0
    return gathered


def _scatter(destination: Tensor, rows: Tensor, lanes: Tensor) -> None:
    """Each lane to the row that it is named after; what is named -1 goes nowhere."""
    is_row = rows >= 0
    destination[rows[is_row]] = lanes[is_row]
