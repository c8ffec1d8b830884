"""C++ text of a ``MatmulSpec``: its shape, and the epilogue that product.h calls for every row of a tile."""

from __future__ import annotations

import torch

from ..indexing import LoopVariable
from ..specs import KernelSpec, MatmulSpec, Store
from ..weight_panels import BF16, F32, INT8, PanelFormat
from .emit_loops import operand_lines, size_lines
from .scalar_text import BUFFER_TYPES, Body, index_text, store_text

HALF_PANEL = 16
_SPARSE_WORDS = {8: "SignedINT8Words", 16: "BF16Words", 32: "FloatWords"}


def panels_type(panel_format: PanelFormat, activation: torch.dtype) -> str:
    """The struct of the support headers that multiplies rows of ``activation`` with a weight format."""
    kind = BUFFER_TYPES[activation]
    if panel_format.is_sparse and panel_format.group is not None:
        shape = f"{panel_format.bits}, {panel_format.group}, Zeros::{panel_format.zeros.upper()}"
        return f"SparseGroupWeightPanels<{shape}, {kind}>"
    if panel_format.is_sparse:
        words = _SPARSE_WORDS[panel_format.bits]
        return "SparseINT8Panels" if kind == "int8_t" else f"SparseWeightPanels<{words}, {kind}>"
    if panel_format.outlier_room is not None:
        return f"ClusteredWeightPanels<{panel_format.outlier_room}, {kind}>"
    if panel_format == F32:
        return "F32Panels"
    if panel_format == BF16:
        return "BF16Panels"
    if panel_format == INT8:
        return "INT8Panels" if kind == "int8_t" else f"INT8WeightPanels<{kind}>"
    shape = f"{panel_format.bits}, {panel_format.group}, Zeros::{panel_format.zeros.upper()}"
    return f"GroupPanels<{shape}>" if kind == "int8_t" else f"GroupWeightPanels<{shape}, {kind}>"


def _weights(spec: MatmulSpec, outputs: str) -> tuple[str, str]:
    """The struct of product.h that says where the weight is, and its fields."""
    if spec.weight_layout == "panels":
        return "Panels", "b1"
    kind = BUFFER_TYPES[spec.buffers[1].dtype]
    struct = "RowsInPlace" if spec.weight_layout == "rows" else "ColumnsInPlace"
    return f"{struct}<{kind}>", f"b1, {{{outputs}, {spec.half_distance}}}"


def emit_matmul(spec: MatmulSpec, name: str) -> str:
    is_paired = spec.half_distance != HALF_PANEL
    width = HALF_PANEL if is_paired else 2 * HALF_PANEL
    columns = index_text(spec.stores[0].column.extent)
    num_groups = spec.reduced // (spec.panel_format.group or spec.reduced)
    fields = (
        index_text(spec.row.extent),
        f"divide_up({columns}, {width})",
        str(spec.reduced),
        index_text(spec.row_stride),
    )
    sums = "b2" if spec.activation == torch.int8 else "nullptr"
    panels = panels_type(spec.panel_format, spec.activation)
    weights, weight_fields = _weights(spec, f"2 * {columns}" if is_paired else columns)
    lines = [
        f"static Product {name}_product(const int64_t* sizes) {{",
        *size_lines(spec),
        f"    return {{{', '.join(fields)}, {num_groups}}};",
        "}",
        "",
        f"static int64_t {name}_tasks(void* const*, const int64_t* sizes) {{",
        f"    return num_product_tasks<{panels}, {weights}>({name}_product(sizes));",
        "}",
        "",
        f"static void {name}(void* const* operands, const int64_t* sizes, int64_t task, Errors&) {{",
        *operand_lines(spec.buffers),
        *size_lines(spec),
        f"    const {weights} weights{{{weight_fields}}};",
        f"    const auto* left = b0 + {index_text(spec.row_offset)};",
        f"    run_product_task<{panels}>({name}_product(sizes), task, left, {sums}, weights,",
        f"        [=](int64_t {spec.row}, int64_t panel, const auto* products) {{",
        f"            const int64_t first_column = panel * {width};",
        f"            const int64_t num_columns = std::min(int64_t({width}), {columns} - first_column);",
    ]
    accumulators = {0: "products[lane]"}
    if is_paired:
        accumulators[spec.half_distance] = f"products[lane + {HALF_PANEL}]"
    for store in spec.stores:
        lines += _epilogue(store, spec, accumulators)
    return "\n".join([*lines, "        });", "}", "", *_stream_lines(spec, name, panels)])


def _stream_lines(spec: MatmulSpec, name: str, panels: str) -> list[str]:
    if not streams(spec):
        return []
    return [
        f"static Stream {name}_stream(void* const* operands, const int64_t* sizes, int64_t task) {{",
        "    const uint8_t* panels = static_cast<const uint8_t*>(operands[1]);",
        f"    return product_stream<{panels}>({name}_product(sizes), task, panels);",
        "}",
        "",
    ]


def streams(spec: KernelSpec) -> bool:
    """Whether the executor can be told what a task of the kernel will read."""
    return isinstance(spec, MatmulSpec) and spec.weight_layout == "panels"


def _epilogue(store: Store, spec: MatmulSpec, accumulators: dict[int, str]) -> list[str]:
    body = Body(" " * 16, accumulator=accumulators)
    column: LoopVariable = store.column
    body.lines.append(f"{body.indent}const int64_t {column} = first_column + lane;")
    dtype = next(buffer.dtype for buffer in spec.buffers if buffer.name == store.buffer)
    text = body.value(store.value)
    return [
        "            #pragma omp simd",
        "            for (int64_t lane = 0; lane < num_columns; ++lane) {",
        *body.lines,
        body.indent + store_text(f"{store.buffer}[{index_text(store.index)}]", text, dtype),
        "            }",
    ]
