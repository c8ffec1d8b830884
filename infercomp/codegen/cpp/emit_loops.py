"""C++ text of a ``LoopSpec``: a loop over rows, and inside it reductions and column loops in order."""

from __future__ import annotations

from collections.abc import Iterator

import sympy
import torch

from ..indexing import LoopVariable
from ..scalar import Scalar, walk
from ..specs import Buffer, LoopSpec, Store, symbols_of
from .scalar_text import BUFFER_TYPES, Body, column_segments, elements_in, index_text, reduction_lines, store_text

# Elements that make a task worth handing out: a few microseconds of work.
ELEMENTS_PER_TASK = 8192


def operand_lines(buffers: tuple[Buffer, ...], skipped: frozenset[str] = frozenset()) -> Iterator[str]:
    for position, buffer in enumerate(buffers):
        if buffer.name not in skipped:
            constness = "" if buffer.is_written else "const "
            kind = f"{constness}{BUFFER_TYPES[buffer.dtype]}*"
            yield f"    {kind} {buffer.name} = static_cast<{kind}>(operands[{position}]);"


def size_lines(spec: object) -> Iterator[str]:
    for position, symbol in enumerate(symbols_of(spec)):  # type: ignore[arg-type]
        yield f"    const int64_t {symbol} = sizes[{position}];"


def rows_per_task(spec: LoopSpec) -> str:
    """How many rows make a task, by the widest column loop."""
    extents = [store.column.extent for store in spec.stores]
    columns = max(extents, key=lambda extent: (extent.is_Integer is not True, extent if extent.is_Integer else 0))
    return f"rows_per_task({index_text(columns)}, {ELEMENTS_PER_TASK})"


def emit_loop(spec: LoopSpec, name: str) -> str:
    rows = index_text(spec.row.extent)
    lines = [
        f"static int64_t {name}_tasks(void* const*, const int64_t* sizes) {{",
        *size_lines(spec),
        f"    return divide_up({rows}, {rows_per_task(spec)});",
        "}",
        "",
        f"static void {name}(void* const* operands, const int64_t* sizes, int64_t task, Errors& errors) {{",
        *operand_lines(spec.buffers),
        *size_lines(spec),
        f"    const int64_t rows = {rows_per_task(spec)};",
        f"    const int64_t end = std::min(int64_t({rows}), (task + 1) * rows);",
        f"    for (int64_t {spec.row} = task * rows; {spec.row} < end; ++{spec.row}) {{",
    ]
    row = Body(" " * 8, prefix="s", elements=_row_elements(spec))
    lines += [f"{row.indent}const int64_t {name} = {index_text(element)};" for element, name in row.elements.items()]
    for store in spec.stores:
        lines += _store_lines(store, spec, row)
    return "\n".join([*lines, "    }", "}", ""])


def _store_lines(store: Store, spec: LoopSpec, row: Body) -> list[str]:
    lines = list(_row_reductions(store, row))
    dtype = next(buffer.dtype for buffer in spec.buffers if buffer.name == store.buffer)
    for bounds, conditions in column_segments([store.value], store.column, store.column.extent):
        lines += _column_loop(store, bounds, row, conditions, dtype)
    return lines


def _column_loop(
    store: Store,
    bounds: tuple[sympy.Expr, sympy.Expr],
    row: Body,
    conditions: dict[Scalar, bool],
    dtype: torch.dtype,
) -> list[str]:
    body = Body(" " * 12, dict(row.known), conditions=conditions, elements=row.elements)
    value = body.value(store.value)
    target = f"{store.buffer}[{body.index(store.index)}]"
    statements = [*body.lines, body.indent + store_text(target, value, dtype)]
    column = store.column
    first, last = (index_text(bound) for bound in bounds)
    is_vector = not any("[&]" in line or "checked" in line for line in statements)
    pragma = [f"{row.indent}#pragma omp simd"] if is_vector else []
    loop = f"{row.indent}for (int64_t {column} = {first}; {column} < {last}; ++{column}) {{"
    return [*pragma, loop, *statements, f"{row.indent}}}"]


def _row_elements(spec: LoopSpec) -> dict[sympy.Expr, str]:
    """Indices read from memory that the whole row shares, each read and checked once."""
    indices: list[sympy.Expr] = [store.index for store in spec.stores]
    for store in spec.stores:
        indices += [node.payload[1] for node in walk(store.value) if node.op == "load"]  # type: ignore[index]
    found = {element: None for index in indices for element in elements_in(index) if _is_of_row(element, spec)}
    return {element: f"e{i}" for i, element in enumerate(found)}


def _is_of_row(element: sympy.Expr, spec: LoopSpec) -> bool:
    loops = {symbol for symbol in element.free_symbols if isinstance(symbol, LoopVariable)}
    return loops <= {spec.row}


def _row_reductions(store: Store, row: Body) -> Iterator[str]:
    """Reductions that do not depend on the column, each once a row, before the column loop."""
    for node in walk(store.value):
        if node.op in ("sum", "max", "min") and node not in row.known and not depends_on(node, store.column):
            name = f"{node.op}_{len(row.known)}"
            yield from reduction_lines(node, name, row.indent, row)
            row.known[node] = name


def depends_on(root: Scalar, variable: LoopVariable) -> bool:
    """Whether an index inside an expression uses the loop variable."""
    for node in walk(root):
        if node.op == "load" and node.payload[1].has(variable):  # type: ignore[index]
            return True
        if node.op == "index" and node.payload.has(variable):  # type: ignore[attr-defined]
            return True
        if node.op == "index_less" and any(part.has(variable) for part in node.payload):  # type: ignore[attr-defined]
            return True
        if node.op == "accumulator":
            return True
    return False
