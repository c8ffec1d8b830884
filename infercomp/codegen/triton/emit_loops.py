"""Triton text of a ``LoopSpec``: a program computes a tile of whole rows, so each row is summed in one order."""

from __future__ import annotations

import sympy
import torch

from ..indexing import Element, LoopVariable
from ..scalar import Scalar, loads_of, round_to, walk
from ..specs import LoopSpec, Store
from .kernel_text import Emitted, Launch, divided_up, module_text, size_text
from .scalar_text import STEP_COLUMNS, TYPES, Guard, Scope, tile_of, variables_of

ELEMENTS_PER_PROGRAM = 2048
_ELEMENTS_PER_WARP = 512
_MOST_WARPS = 16


def emit_loop(spec: LoopSpec, name: str) -> Emitted:
    num_rows = rows_per_program(spec)
    scope = Scope("", num_rows, {}, ())
    scope.add(f"row = (tl.program_id(0).to(tl.int64) * {num_rows} + tl.arange(0, {num_rows}))[:, None]")
    scope.positions[spec.row] = "row"
    if num_rows > 1:
        scope.add(f"is_row = row < {scope.index(spec.row.extent)}")
        scope.guards = (Guard(frozenset((spec.row,)), "is_row"),)
    written: set[str] = set()
    for store in spec.stores:
        if written & set(loads_of(store.value)):
            # What other threads of this program wrote is read back.
            scope.add("tl.debug_barrier()")
            written.clear()
        _emit_store(spec, store, scope)
        written.add(store.buffer)
    num_warps = min(_MOST_WARPS, max(1, num_rows * _widest_tile(spec) // _ELEMENTS_PER_WARP))
    text = module_text(spec, name, scope.lines, num_warps=num_warps)
    return Emitted((Launch(name, text, (divided_up(size_text(spec.row.extent), num_rows), "1", "1")),))


def rows_per_program(spec: LoopSpec) -> int:
    """How many rows make a program worth starting; from the spec alone."""
    return 1 if spec.row.extent == 1 else max(1, ELEMENTS_PER_PROGRAM // _widest_tile(spec))


def _widest_tile(spec: LoopSpec) -> int:
    extents = [store.column.extent for store in spec.stores]
    for store in spec.stores:
        nodes = [node for node in walk(store.value) if node.op in ("sum", "max", "min")]
        extents += [node.payload[1] for node in nodes]  # type: ignore[index]
    return max(tile_of(extent) or STEP_COLUMNS for extent in extents)


def _emit_store(spec: LoopSpec, store: Store, scope: Scope) -> None:
    tile = tile_of(store.column.extent)
    if tile is not None:
        scope.hold(store.column)
        inner, width = scope, tile
    else:
        _emit_row_reductions(store, scope)
        inner, width = scope.stepped(store.column, store.column.extent), STEP_COLUMNS
    dtype = next(buffer.dtype for buffer in spec.buffers if buffer.name == store.buffer)
    value = inner.value(store.value)
    emit_masked_store(store, inner, (scope.num_rows, width), value, dtype, spec.row)
    if tile is not None:
        # A later store that reads this element back finds it in registers, rounded as it was stored.
        scope.known[Scalar("load", (), store.value.dtype, (store.buffer, store.index, dtype))] = scope.value(
            round_to(store.value, dtype)
        )


def emit_masked_store(
    store: Store, scope: Scope, shape: tuple[int, int], value: str, dtype: torch.dtype, row: LoopVariable
) -> None:
    """The store of a whole tile; an element whose place is out of range is not written."""
    place = scope.named(f"tl.broadcast_to({_tensor(scope.index(store.index))}, {shape})", "place")
    checks = [scope.element(part)[1] for part in sympy.preorder_traversal(store.index) if isinstance(part, Element)]
    inside = scope.mask(frozenset((row, store.column)))
    mask = " & ".join([*([inside] if inside else []), *checks])
    stored = f"tl.broadcast_to({value}.to({TYPES[dtype]}), {shape})"
    scope.add(f"tl.store({store.buffer} + {place}, {stored}{f', mask={mask}' if mask else ''})")


def _tensor(index: str) -> str:
    return f"tl.full((), {index}, tl.int32)" if index.isdigit() else index


def _emit_row_reductions(store: Store, scope: Scope) -> None:
    """Reductions that do not depend on the column, each once a row, before the loop over columns."""
    for node in walk(store.value):
        if node.op in ("sum", "max", "min") and store.column not in variables_of(node):
            scope.value(node)
