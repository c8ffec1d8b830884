"""Weights in the order in which the CPU kernels read them: panels of 32 outputs, each one sequential stream.

`codegen/cpp/support/gemm.h` multiplies what is made here, and says in its head how a panel is laid out. Which row of
the weight each of a panel's 32 lanes computes is given as a row order; -1 is an output of zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..runtime.weight_memory import Empty, anywhere

PANEL = 32
HALF = PANEL // 2
ALIGNMENT = 64
OUTLIER_BYTES = 8
SPARSE_STEP, SPARSE_BLOCK = 8, 32
INT8_OFFSET = 128
Zeros = Literal["middle", "points", "values"]
"""What the zero of a group is: the middle code, a code in uint8, or in float16 what code 0 stands for."""
ZERO_BYTES: dict[Zeros, int] = {"middle": 0, "points": 1, "values": 2}
# Rows are gathered this many panels at a time, so that packing needs little memory beside its result.
PANELS_AT_ONCE = 16


@dataclass(frozen=True)
class PanelFormat:
    """How the weights of one panel are stored: `bits` each, in 32-bit words of 32 // bits consecutive k.

    With a `group` words are codes, and each group of that many k ends in 32 float16 scales and what `zeros` says
    (group_panels.py, sparse_group_panels.py). With `outlier_room`, which the name has too, words are codes of tables
    (clustered_panels.py).
    """

    name: str
    bits: int
    group: int | None = None
    zeros: Zeros = "middle"
    outlier_room: int | None = field(default=None, repr=False)

    @property
    def weights_per_word(self) -> int:
        return 32 // self.bits

    @property
    def group_bytes(self) -> int:
        """Bytes of one group of one panel, its scales and zero points included."""
        assert self.group is not None
        return self.code_bytes + PANEL * (2 + ZERO_BYTES[self.zeros])

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of one group of one panel, and of their places where two of four are stored."""
        assert self.group is not None
        if self.is_sparse:
            return self.group // SPARSE_BLOCK * (SPARSE_BLOCK // 8 + SPARSE_BLOCK // 2 * self.bits // 8) * PANEL
        return self.group * self.bits // 8 * PANEL

    @property
    def is_sparse(self) -> bool:
        """Whether two of every four weights are stored, and their places (sparse_panels.py, sparse_group_panels.py)."""
        return self.name.startswith("sparse_")

    @property
    def step_bytes(self) -> int:
        """Bytes of the values that a sparse panel keeps of `SPARSE_STEP` inputs."""
        return SPARSE_STEP // 2 * PANEL * self.bits // 8

    @property
    def outlier_bytes(self) -> int:
        """Bytes of the outliers of one half of a panel."""
        assert self.outlier_room is not None
        return self.outlier_room * OUTLIER_BYTES

    def panel_bytes(self, k: int) -> int:
        """Bytes of one panel of a weight with `k` inputs, a multiple of 64."""
        if self.is_sparse and self.group is None:
            if k % SPARSE_STEP:
                raise ValueError(f"sparse panels take multiples of {SPARSE_STEP} inputs, not {k}")
            return -(-k // SPARSE_BLOCK) * PANEL * 4 + k // SPARSE_STEP * self.step_bytes
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


def grouped(bits: int, group: int, zeros: Zeros) -> PanelFormat:
    """Codes of 3, 4 or 8 bits in groups of `group` inputs, a multiple of 32."""
    if group <= 0 or group % 32:
        raise ValueError(f"a group of {group} inputs is not a positive multiple of 32")
    suffix = {"middle": "", "points": "_zp", "values": "_zv"}[zeros]
    return PanelFormat(f"int{bits}_g{group}{suffix}", bits, group, zeros)


def clustered(outlier_room: int) -> PanelFormat:
    """4-bit codes of a table for each half of a panel, with room for so many outliers of each half."""
    return PanelFormat(f"clustered_o{outlier_room}", bits=4, outlier_room=outlier_room)


def sparse(values: PanelFormat) -> PanelFormat:
    """Two of every four weights, stored as in the format ``values``: float32, bfloat16 or INT8."""
    return PanelFormat(f"sparse_{values.name}", bits=values.bits)


def sparse_grouped(bits: int, group: int, zeros: Zeros) -> PanelFormat:
    """Two of every four codes of 4 or 8 bits in groups of `group` inputs, a multiple of 32."""
    if bits not in (4, 8) or zeros == "values":
        raise ValueError(f"no sparse panels hold codes of {bits} bits with zeros as {zeros}")
    dense = grouped(bits, group, zeros)
    return PanelFormat(f"sparse_{dense.name}", bits, group, zeros)


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


def pack_float_panels(weight: Tensor, row_order: Tensor, empty: Empty = anywhere) -> Tensor:
    """Pack `weight` [N, K], float32 or bfloat16, as [P, ceil(K / x), 32, x] of its dtype, x being 1 or 2.

    `row_order` is int64 [P * 32]: the row of each lane of each panel, or -1.
    """
    if weight.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"float panels hold float32 or bfloat16, not {weight.dtype}")
    return _pack_words(weight, row_order, F32 if weight.dtype == torch.float32 else BF16, empty)


def pack_int8_panels(weight: Tensor, row_order: Tensor, empty: Empty = anywhere) -> Tensor:
    """Pack `weight` [N, K] int8 as uint8 [P, ceil(K / 4), 32, 4] of weight + 128.

    `row_order` is int64 [P * 32]: the row of each lane of each panel, or -1.
    """
    if weight.dtype != torch.int8:
        raise ValueError(f"INT8 panels hold int8, not {weight.dtype}")
    panels = _pack_words(weight, row_order, INT8, empty).view(torch.uint8)
    return panels.bitwise_xor_(INT8_OFFSET)


def unpack_float_panels(panels: Tensor, row_order: Tensor, num_outputs: int, num_inputs: int) -> Tensor:
    """The weight [N, K] that ``pack_float_panels`` made ``panels`` of."""
    return _unpack_words(panels, row_order, num_outputs, num_inputs)


def unpack_int8_panels(panels: Tensor, row_order: Tensor, num_outputs: int, num_inputs: int) -> Tensor:
    """The weight int8 [N, K] that ``pack_int8_panels`` made ``panels`` of."""
    return _unpack_words(panels, row_order, num_outputs, num_inputs).bitwise_xor_(INT8_OFFSET).view(torch.int8)


def _unpack_words(panels: Tensor, row_order: Tensor, num_outputs: int, num_inputs: int) -> Tensor:
    weight = torch.empty(num_outputs, num_inputs, dtype=panels.dtype)
    for chunk, rows in chunks(row_order):
        lanes = panels[chunk].transpose(1, 2).flatten(2)
        scatter(weight, rows, lanes[:, :, :num_inputs].flatten(0, 1))
    return weight


def _pack_words(weight: Tensor, row_order: Tensor, panel_format: PanelFormat, empty: Empty) -> Tensor:
    num_inputs, per_word = weight.shape[1], panel_format.weights_per_word
    whole, rest = divmod(num_inputs, per_word)
    panels = empty((num_panels(row_order), whole + bool(rest), PANEL, per_word), weight.dtype)
    for chunk, rows in chunks(row_order):
        lanes = gathered(weight, rows).view(-1, PANEL, num_inputs)
        words = lanes[:, :, : whole * per_word].unflatten(2, (whole, per_word))
        panels[chunk, :whole] = words.transpose(1, 2)
        if rest:
            panels[chunk, whole] = 0
            panels[chunk, whole, :, :rest] = lanes[:, :, whole * per_word :]
    return panels


def num_panels(row_order: Tensor) -> int:
    num_lanes: int = row_order.numel()
    if num_lanes % PANEL:
        raise ValueError(f"a row order of {num_lanes} lanes does not fill panels of {PANEL}")
    return num_lanes // PANEL


def chunks(row_order: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """A few panels at a time, with the rows of their lanes."""
    for first in range(0, num_panels(row_order), PANELS_AT_ONCE):
        chunk = slice(first, first + PANELS_AT_ONCE)
        yield chunk, row_order.view(-1, PANEL)[chunk].flatten()


def gathered(source: Tensor, rows: Tensor) -> Tensor:
    """The named rows of `source`, zeros where the name is -1."""
    lanes = source.detach().index_select(0, rows.clamp(min=0))
    lanes[rows < 0] = 0
    return lanes


def scatter(destination: Tensor, rows: Tensor, lanes: Tensor) -> None:
    """Each lane to the row that it is named after; what is named -1 goes nowhere."""
    is_row = rows >= 0
    destination[rows[is_row]] = lanes[is_row]
