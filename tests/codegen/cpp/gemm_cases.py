"""Operands of one product for each format of gemm.h and sparse_panels.h, in float64 and as the kernels get them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from hypothesis import strategies as st
from torch import Tensor

from infercomp.codegen import weight_panels
from infercomp.codegen.group_panels import pack_group_panels
from infercomp.codegen.sparse_group_panels import pack_sparse_group_panels
from infercomp.codegen.sparse_panels import pack_sparse_panels
from infercomp.codegen.sparse_weights import compress_2_of_4, restore_2_of_4
from infercomp.codegen.weight_panels import PanelFormat, gated_row_order, grouped, plain_row_order, sparse_grouped


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@dataclass
class Case:
    """Operands of one product in float64, what the kernel gets of them, and by how much it may miss."""

    rows: Tensor  # [R, K], a view into wider rows whose rest is poison
    panels: Tensor  # [P, …]
    row_order: Tensor  # [P * 32]
    row_sums: Tensor | None  # int32 [R, groups]
    weight: Tensor  # float64 [N, K]
    tolerance: Tensor | float  # [R, N] or 0: exact

    def product(
        self,
        library: ctypes.CDLL,
        kernel: str,
        block: int | None = None,
        rows: slice = slice(None),
        entry: str = "",
    ) -> Tensor:
        """[R, P * 32], in blocks of `block` rows, or as `entry` of the kernel has them."""
        activations = self.rows[rows]
        dtype = torch.int32 if kernel in ("int8", "int8_prepared", "sparse_int8") else torch.float32
        output = torch.full((len(activations), len(self.row_order)), 99, dtype=dtype)
        sums = self.row_sums[rows].contiguous() if self.row_sums is not None else torch.empty(1, 1, dtype=torch.int32)
        getattr(library, kernel + entry)(
            len(activations),
            pointer(activations),
            ctypes.c_int64(activations.stride(0)),
            pointer(self.panels),
            len(self.panels),
            ctypes.c_int64(activations.shape[1]),
            block or getattr(library, kernel + "_max_rows")(),
            pointer(output),
            pointer(sums),
            ctypes.c_int64(sums.shape[1]),
        )
        return output

    def is_right(self, output: Tensor) -> bool:
        lanes = self.row_order >= 0
        expected = self.rows.double() @ self.weight.T
        misses = (output[:, lanes].double() - expected[:, self.row_order[lanes]]).abs()
        allowed = self.tolerance if isinstance(self.tolerance, float) else self.tolerance[:, self.row_order[lanes]]
        return bool((misses <= allowed).all()) and bool((output[:, ~lanes] == 0).all())


def poisoned(rows: Tensor, poison: float) -> Tensor:
    wide = torch.full((rows.shape[0], rows.shape[1] + 5), poison, dtype=rows.dtype)
    wide[:, : rows.shape[1]] = rows
    return wide[:, : rows.shape[1]]


def sum_tolerance(rows: Tensor, weight: Tensor, num_roundings: int) -> Tensor:
    """The classic bound of a sum of products in float32: each rounding errs by at most eps of Σ |a||w|."""
    return num_roundings * torch.finfo(torch.float32).eps * (rows.double().abs() @ weight.double().abs().T)


def int8_values(*shape: int) -> Tensor:
    """All of -128..127, the ends often: 255 * 127 twice would overflow an instruction that saturates at 16 bits."""
    ends = torch.where(torch.rand(shape) < 0.5, -128, 127)
    return torch.where(torch.rand(shape) < 0.3, ends, torch.randint(-128, 128, shape)).to(torch.int8)


def float_case(
    num_rows: int, n: int, k: int, order: Tensor, activation: torch.dtype, weight_dtype: torch.dtype
) -> Case:
    rows = torch.randn(num_rows, k).to(activation)
    weight = torch.randn(n, k).to(weight_dtype)
    panels = weight_panels.pack_float_panels(weight, order)
    tolerance = sum_tolerance(rows, weight, k)
    return Case(poisoned(rows, float("nan")), panels, order, None, weight.double(), tolerance)


def int8_case(num_rows: int, n: int, k: int, order: Tensor) -> Case:
    rows, weight = int8_values(num_rows, k), int8_values(n, k)
    panels = weight_panels.pack_int8_panels(weight, order)
    row_sums = rows.sum(1, keepdim=True, dtype=torch.int32)
    return Case(poisoned(rows, 77), panels, order, row_sums, weight.double(), 0.0)


def int8_weights_case(num_rows: int, n: int, k: int, order: Tensor, activation: torch.dtype) -> Case:
    rows, weight = torch.randn(num_rows, k).to(activation), int8_values(n, k)
    panels = weight_panels.pack_int8_panels(weight, order)
    tolerance = sum_tolerance(rows, weight, k)
    return Case(poisoned(rows, float("nan")), panels, order, None, weight.double(), tolerance)


def group_case(
    num_rows: int, n: int, k: int, order: Tensor, panel_format: PanelFormat, activation: torch.dtype
) -> Case:
    """`k` is rounded up to whole groups."""
    group, bits = panel_format.group, panel_format.bits
    assert group is not None
    num_groups = -(-k // group)
    k = num_groups * group
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
    # Subnormal half-precision scales are among them.
    scales = (torch.randn(n, num_groups) * 10.0 ** torch.randint(-7, 3, (n, num_groups))).half()
    zeros = {
        "middle": None,
        "points": torch.randint(0, 256, (n, num_groups), dtype=torch.uint8),
        "values": (torch.randn(n, num_groups) * 10.0 ** torch.randint(-7, 3, (n, num_groups))).half(),
    }[panel_format.zeros]
    panels = pack_group_panels(bits, codes, scales, zeros, order)
    steps, has_values = scales.double().repeat_interleave(group, 1), panel_format.zeros == "values"
    shifts = torch.full((n, num_groups), 2.0 ** (bits - 1)) if zeros is None else zeros
    shifts = shifts.double().repeat_interleave(group, 1)
    weight = steps * codes + shifts if has_values else steps * (codes - shifts)
    # Products and their sums may be larger than those of what they make together.
    parts = steps.abs() * codes + shifts.abs() if has_values else weight
    rows = int8_values(num_rows, k) if activation == torch.int8 else torch.randn(num_rows, k).to(activation)
    row_sums = rows.unflatten(1, (num_groups, group)).sum(2, dtype=torch.int32) if activation == torch.int8 else None
    # Two roundings more a group than products: the scale's and the zero's.
    tolerance = sum_tolerance(rows, parts, k + 2 * num_groups)
    return Case(
        poisoned(rows, 77 if activation == torch.int8 else float("nan")), panels, order, row_sums, weight, tolerance
    )


def two_of_four(weight: Tensor) -> Tensor:
    """Two of every four inputs at random places, the others zeros; some groups have fewer."""
    places = torch.rand(weight.shape).unflatten(1, (-1, 4)).argsort(-1).flatten(1)
    return torch.where((places < 2) & (torch.rand(weight.shape) < 0.9), weight, torch.zeros_like(weight))


def sparse_case(num_rows: int, n: int, k: int, order: Tensor, *, values: PanelFormat, activation: torch.dtype) -> Case:
    """`k` is rounded up to eights."""
    k = -(-k // 8) * 8
    weight = int8_values(n, k) if values.bits == 8 else torch.randn(n, k).to(VALUES[values])
    weight = two_of_four(weight)
    panels = pack_sparse_panels(*compress_2_of_4(weight), weight_panels.sparse(values), order)
    if activation == torch.int8:
        rows = int8_values(num_rows, k)
        row_sums = rows.sum(1, keepdim=True, dtype=torch.int32)
        return Case(poisoned(rows, 77), panels, order, row_sums, weight.double(), 0.0)
    rows = torch.randn(num_rows, k).to(activation)
    tolerance = sum_tolerance(rows, weight, k)
    return Case(poisoned(rows, float("nan")), panels, order, None, weight.double(), tolerance)


def sparse_group_case(
    num_rows: int, n: int, k: int, order: Tensor, panel_format: PanelFormat, activation: torch.dtype
) -> Case:
    """`k` is rounded up to whole groups."""
    group, bits = panel_format.group, panel_format.bits
    assert group is not None
    num_groups = -(-k // group)
    k = num_groups * group
    scales = (torch.randn(n, num_groups) * 10.0 ** torch.randint(-7, 3, (n, num_groups))).half()
    zeros = torch.randint(0, 1 << bits, (n, num_groups)) if panel_format.zeros == "points" else None
    middles = torch.full((n, num_groups), 1 << (bits - 1)) if zeros is None else zeros
    codes = torch.randint(0, 1 << bits, (n, k)) - middles.repeat_interleave(group, 1)
    steps, indices = compress_2_of_4(two_of_four(codes.to(torch.int16)))
    kept = (steps + middles.repeat_interleave(group // 2, 1)).to(torch.uint8)
    points = None if zeros is None else zeros.to(torch.uint8)
    panels = pack_sparse_group_panels(panel_format, kept, indices, scales, points, order)
    weight = restore_2_of_4(steps.double(), indices) * scales.double().repeat_interleave(group, 1)
    rows = torch.randn(num_rows, k).to(activation)
    return Case(poisoned(rows, float("nan")), panels, order, None, weight, sum_tolerance(rows, weight, k + num_groups))


VALUES = {weight_panels.F32: torch.float32, weight_panels.BF16: torch.bfloat16}


def case_of(kernel: str) -> Callable[[int, int, int, Tensor], Case]:
    f32, bf16, i8 = torch.float32, torch.bfloat16, torch.int8
    return {
        "f32": lambda *shape: float_case(*shape, f32, f32),
        "bf16_panels": lambda *shape: float_case(*shape, bf16, bf16),
        "int8": int8_case,
        "int8_prepared": int8_case,
        "int8_weights_bf16": lambda *shape: int8_weights_case(*shape, bf16),
        **{name: partial(group_case, panel_format=FORMATS[name], activation=rows) for name, rows in GROUPS.items()},
        "sparse_f32": lambda *shape: sparse_case(*shape, values=weight_panels.F32, activation=f32),
        "sparse_bf16": lambda *shape: sparse_case(*shape, values=weight_panels.BF16, activation=bf16),
        "sparse_int8_weights": lambda *shape: sparse_case(*shape, values=weight_panels.INT8, activation=f32),
        "sparse_int8": lambda *shape: sparse_case(*shape, values=weight_panels.INT8, activation=i8),
        **{
            name: partial(sparse_group_case, panel_format=FORMATS[name], activation=rows)
            for name, rows in SPARSE_GROUPS.items()
        },
    }[kernel]


SPARSE_GROUPS = {
    "sparse_int4_g32_zp": torch.float32,
    "sparse_int4_g64_bf16": torch.bfloat16,
    "sparse_int8_g96": torch.float32,
}
GROUPS = {
    "int3_g64": torch.int8,
    "int4_g32_zp": torch.int8,
    "int4_g32_zv": torch.int8,
    "int4_g64": torch.int8,
    "int8_g32": torch.int8,
    "int3_weights_g64": torch.float32,
    "int3_weights_g32_zp_bf16": torch.bfloat16,
    "int4_weights_g32_zp": torch.float32,
    "int4_weights_g32_zv_bf16": torch.bfloat16,
    "int4_weights_g128_bf16": torch.bfloat16,
    "int8_weights_g32": torch.float32,
}
FORMATS: dict[str, PanelFormat] = {
    "f32": weight_panels.F32,
    "bf16_panels": weight_panels.BF16,
    "int8": weight_panels.INT8,
    "int8_prepared": weight_panels.INT8,
    "int8_weights_bf16": weight_panels.INT8,
    "int3_g64": grouped(3, 64, "middle"),
    "int4_g32_zp": grouped(4, 32, "points"),
    "int4_g32_zv": grouped(4, 32, "values"),
    "int4_g64": grouped(4, 64, "middle"),
    "int8_g32": grouped(8, 32, "middle"),
    "int3_weights_g64": grouped(3, 64, "middle"),
    "int3_weights_g32_zp_bf16": grouped(3, 32, "points"),
    "int4_weights_g32_zp": grouped(4, 32, "points"),
    "int4_weights_g32_zv_bf16": grouped(4, 32, "values"),
    "int4_weights_g128_bf16": grouped(4, 128, "middle"),
    "int8_weights_g32": grouped(8, 32, "middle"),
    "sparse_f32": weight_panels.sparse(weight_panels.F32),
    "sparse_bf16": weight_panels.sparse(weight_panels.BF16),
    "sparse_int8_weights": weight_panels.sparse(weight_panels.INT8),
    "sparse_int8": weight_panels.sparse(weight_panels.INT8),
    "sparse_int4_g32_zp": sparse_grouped(4, 32, "points"),
    "sparse_int4_g64_bf16": sparse_grouped(4, 64, "middle"),
    "sparse_int8_g96": sparse_grouped(8, 96, "middle"),
}
SEEDS = st.integers(0, 999)
SHAPES = st.tuples(st.integers(1, 30), st.integers(1, 80), st.integers(1, 150), st.booleans(), SEEDS)


def draw_case(kernel: str, shape: tuple[int, int, int, bool, int]) -> Case:
    num_rows, num_outputs, k, gated, seed = shape
    torch.manual_seed(seed)
    if gated:
        return case_of(kernel)(num_rows, 2 * num_outputs, k, gated_row_order(num_outputs))
    return case_of(kernel)(num_rows, num_outputs, k, plain_row_order(num_outputs))
