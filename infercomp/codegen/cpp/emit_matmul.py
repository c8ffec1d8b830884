"""C++ text of a ``MatmulSpec``: tiles of rows times one panel, then the epilogue over each tile."""

from __future__ import annotations

import torch

from ..indexing import LoopVariable
from ..scalar import Scalar
from ..specs import MatmulSpec, Store
from ..weight_panels import BF16, F32, INT8, PanelFormat
from .emit_loops import operand_lines, size_lines
from .scalar_text import BUFFER_TYPES, Body, index_text, store_text

# A block of rows that stays in the second-level cache while the panels stream past it.
BLOCK_BYTES = 1 << 18


def panels_type(panel_format: PanelFormat, activation: torch.dtype) -> str:
    """The struct of gemm.h that multiplies rows of ``activation`` with a weight format."""
    kind = BUFFER_TYPES[activation]
    zeros = "true" if panel_format.zero_points else "false"
    if panel_format == F32:
        return "F32Panels"
    if panel_format == BF16:
        return "BF16Panels"
    if panel_format == INT8:
        return "INT8Panels" if kind == "int8_t" else f"INT8WeightPanels<{kind}>"
    if kind == "int8_t":
        return f"INT4Panels<{panel_format.group}, {zeros}>"
    return f"INT4WeightPanels<{panel_format.group}, {zeros}, {kind}>"


def emit_matmul(spec: MatmulSpec, name: str) -> str:
    has_sums = spec.activation == torch.int8
    is_paired = spec.half_distance != 16
    columns = index_text(spec.stores[0].column.extent)
    width = 16 if is_paired else 32
    rows, stride = index_text(spec.row.extent), index_text(spec.row_stride)
    row_bytes = spec.reduced * spec.activation.itemsize
    block = max(1, BLOCK_BYTES // row_bytes)
    num_groups = spec.reduced // (spec.panel_format.group or spec.reduced)
    sums = f"b2 + first * {num_groups}, " if has_sums else ""
    lines = [
        f"using {name}_panels = {panels_type(spec.panel_format, spec.activation)};",
        f"constexpr int64_t {name}_reduced = {spec.reduced};",
        "",
        f"static int64_t {name}_tasks(void* const*, const int64_t* sizes) {{",
        *size_lines(spec),
        f"    const int64_t rows = block_rows({rows}, {block}, {name}_panels::MAX_ROWS);",
        f"    return divide_up({columns}, {width}) * divide_up({rows}, rows);",
        "}",
        "",
        f"static void {name}(void* const* operands, const int64_t* sizes, int64_t task, Errors& errors) {{",
        f"    using Panels = {name}_panels;",
        *operand_lines(spec.buffers),
        *size_lines(spec),
        f"    const int64_t num_panels = divide_up({columns}, {width}), panel = task % num_panels;",
        f"    const int64_t rows = block_rows({rows}, {block}, Panels::MAX_ROWS);",
        f"    const int64_t begin = task / num_panels * rows, end = std::min(int64_t({rows}), begin + rows);",
        f"    const int64_t first_column = panel * {width};",
        f"    const int64_t num_columns = std::min(int64_t({width}), {columns} - first_column);",
        f"    const uint8_t* weights = b1 + panel * Panels::panel_bytes({name}_reduced);",
        "    for (int64_t first = begin; first < end; first += Panels::MAX_ROWS) {",
        "        alignas(64) Panels::accumulator tile[Panels::MAX_ROWS][PANEL];",
        "        const int num_rows = int(std::min(end - first, int64_t(Panels::MAX_ROWS)));",
        f"        const auto* left = b0 + {index_text(spec.row_offset)} + first * ({stride});",
        f"        multiply_rows<Panels>(num_rows, left, {stride}, weights, {name}_reduced, {sums}tile);",
        "        for (int tile_row = 0; tile_row < num_rows; ++tile_row) {",
        f"            const int64_t {spec.row} = first + tile_row;",
        "            const Panels::accumulator* products = tile[tile_row];",
    ]  # fmt: skip
    accumulators = {0: "products[lane]"}
    if is_paired:
        accumulators[spec.half_distance] = "products[lane + 16]"
    for store in spec.stores:
        lines += _epilogue(store, spec, accumulators)
    return "\n".join([*lines, "        }", "    }", "}", ""])


def _epilogue(store: Store, spec: MatmulSpec, accumulators: dict[int, str]) -> list[str]:
    body = Body(" " * 16, accumulator=accumulators)
    column: LoopVariable = store.column
    body.lines.append(f"{body.indent}const int64_t {column} = first_column + lane;")
    value: Scalar = store.value
    dtype = next(buffer.dtype for buffer in spec.buffers if buffer.name == store.buffer)
    text = body.value(value)
    return [
        "            #pragma omp simd",
        "            for (int64_t lane = 0; lane < num_columns; ++lane) {",
        *body.lines,
        body.indent + store_text(f"{store.buffer}[{index_text(store.index)}]", text, dtype),
        "            }",
    ]
