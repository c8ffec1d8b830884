"""Panels are another order of the same bytes: what was packed is read back bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infercomp.codegen import weight_panels
from infercomp.codegen.packing import HALF_PANEL, PanelPacking
from infercomp.codegen.sparse_weights import packed_channels
from infercomp.codegen.weight_panels import (
    BF16,
    F32,
    INT8,
    ZERO_BYTES,
    PanelFormat,
    clustered,
    grouped,
    sparse,
    sparse_grouped,
)

FLOATS = {F32: torch.float32, BF16: torch.bfloat16}


@st.composite
def packings(draw: st.DrawFn) -> tuple[PanelPacking, tuple[torch.Tensor, ...]]:
    """A packing and the parts of a weight of any size that it takes."""
    groups = st.builds(grouped, st.sampled_from([3, 4, 8]), st.sampled_from([32, 64]), st.sampled_from([*ZERO_BYTES]))
    groups |= st.builds(
        sparse_grouped, st.sampled_from([4, 8]), st.sampled_from([32, 96]), st.sampled_from(["middle", "points"])
    )
    formats = [F32, BF16, INT8, clustered(8), *map(sparse, (F32, BF16, INT8))]
    panel_format = draw(st.sampled_from(formats) | groups)
    is_gated = draw(st.booleans())
    num_outputs = draw(st.integers(1, 70)) * (2 if is_gated else 1)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 31)))
    if panel_format.outlier_room is not None:
        num_outputs *= 16
    half_distance = num_outputs // 2 if is_gated else HALF_PANEL
    if panel_format.group is not None:
        num_groups = draw(st.integers(1, 3))
        parts = quantised(panel_format, num_outputs, num_groups, generator)
        if panel_format.is_sparse:
            channels = torch.randint(0, 4, (num_outputs, num_groups * panel_format.group // 2), generator=generator)
            codes, *constants = parts
            parts = (codes[:, ::2], packed_channels(channels.to(torch.uint8)), *constants)
        return PanelPacking(panel_format, half_distance), parts
    if panel_format.is_sparse:
        num_values = 4 * draw(st.integers(1, 20))
        return PanelPacking(panel_format, half_distance), sparse_parts(panel_format, num_outputs, num_values, generator)
    is_transposed = panel_format in FLOATS and draw(st.booleans())
    num_inputs = draw(st.integers(1, 40))
    if panel_format.outlier_room is not None:
        return PanelPacking(panel_format, half_distance), clustered_parts(num_outputs, num_inputs, generator)
    shape = (num_inputs, num_outputs) if is_transposed else (num_outputs, num_inputs)
    if panel_format == INT8:
        values = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
    else:
        values = torch.randn(shape, generator=generator).to(FLOATS[panel_format])
    return PanelPacking(panel_format, half_distance, is_transposed), (values,)


def quantised(
    panel_format: PanelFormat, num_outputs: int, num_groups: int, generator: torch.Generator
) -> tuple[torch.Tensor, ...]:
    num_bytes = num_groups * panel_format.group * panel_format.bits // 8
    codes = torch.randint(0, 256, (num_outputs, num_bytes), dtype=torch.uint8, generator=generator)
    scales = torch.rand(num_outputs, num_groups, generator=generator).half()
    if panel_format.zeros == "middle":
        return codes, scales
    if panel_format.zeros == "values":
        return codes, scales, torch.randn(num_outputs, num_groups, generator=generator).half()
    return codes, scales, torch.randint(0, 256, (num_outputs, num_groups), dtype=torch.uint8, generator=generator)


def clustered_parts(num_outputs: int, num_words: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    codes = torch.randint(0, 256, (num_outputs, 4 * num_words), dtype=torch.uint8, generator=generator)
    is_outlier = torch.rand(num_outputs // 16, 16 * 8 * num_words, generator=generator).argsort(1) < 8
    is_outlier &= torch.rand(num_outputs // 16, 1, generator=generator) < 0.7
    rows, columns = is_outlier.view(num_outputs, -1).nonzero().unbind(1)
    counts = rows.bincount(minlength=num_outputs).int()
    table = torch.randn(num_outputs // 16, 8, generator=generator)
    return codes, table, counts, columns.int(), torch.randn(len(rows), generator=generator)


def sparse_parts(
    panel_format: PanelFormat, num_outputs: int, num_values: int, generator: torch.Generator
) -> tuple[torch.Tensor, ...]:
    dtype = {8: torch.int8, 16: torch.bfloat16, 32: torch.float32}[panel_format.bits]
    values = (50 * torch.randn(num_outputs, num_values, generator=generator)).to(dtype)
    return values, packed_channels(torch.randint(0, 4, values.shape, dtype=torch.uint8, generator=generator))


def is_restored(packing: PanelPacking, parts: tuple[torch.Tensor, ...]) -> bool:
    panels = packing.pack(*parts)
    found = packing.unpack(panels, [tuple(part.shape) for part in parts])
    return len(found) == len(parts) and all(map(torch.equal, found, parts))


@settings(max_examples=150, deadline=None)
@given(packings())
def test_what_was_packed_is_read_back(case: tuple[PanelPacking, tuple[torch.Tensor, ...]]) -> None:
    assert is_restored(*case)


def test_a_wrong_order_of_rows_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the rows of gated weights read back as if they were neighbours."""
    values = torch.arange(128 * 4, dtype=torch.float32).view(128, 4)
    packing = PanelPacking(F32, half_distance=64)
    assert is_restored(packing, (values,))
    panels = packing.pack(values)
    monkeypatch.setattr("infercomp.codegen.packing.gated_row_order", lambda n: weight_panels.plain_row_order(2 * n))
    assert not torch.equal(packing.unpack(panels, [tuple(values.shape)])[0], values)
