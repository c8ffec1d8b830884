"""Triton text of a ``MatmulSpec`` over a row-major weight: tiles for matrix instructions, K cut at fixed places.

The order of additions follows from the weight's shape alone. K is cut into ``num_splits`` parts; each part
is summed in ascending tiles and the parts are added in ascending order. Few rows give each part to a
program of its own and add them in a second kernel; many rows do the same in one program (stream-K's
fix-up with the places fixed, Osama et al. 2023). A tile has at least 64 rows in both, so that the same
matrix instruction is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..lazy_tensor import Refused
from ..ops.group_codes import highest_code, middle_code
from ..specs import MatmulSpec
from ..weight_panels import INT8
from .emit_loops import emit_masked_store
from .kernel_text import Emitted, Launch, divided_up, module_text, size_text
from .scalar_text import TYPES, Guard, Scope
from .specs.base import ceiling_division, power_of_two_at_least

FEW_ROWS = 64
HALF_PANEL = 16
_FILLED_CHIP = 128  # programs that keep most multiprocessors busy
_MOST_SPLITS = 8
_SMALLEST_SPLIT = 512
_REDUCED_COLUMNS = 256
_GROUP_ROW_TILES = 8


@dataclass(frozen=True)
class Tiles:
    """The tile of one program and how it is launched."""

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class _Product:
    """A spec with what follows from it."""

    spec: MatmulSpec
    num_columns: int
    num_splits: int
    inner_per_split: int

    @property
    def is_gated(self) -> bool:
        return self.spec.half_distance != HALF_PANEL

    @property
    def accumulators(self) -> dict[int, str]:
        return {0: "acc", self.num_columns: "up"} if self.is_gated else {0: "acc"}

    @property
    def is_integer(self) -> bool:
        return self.spec.activation == torch.int8

    @property
    def accumulator_type(self) -> str:
        return "tl.int32" if self.is_integer else "tl.float32"

    @property
    def total_columns(self) -> int:
        return self.num_columns * len(self.accumulators)


def emit_matmul(spec: MatmulSpec, name: str) -> Emitted:
    product = _product(spec)
    few, many = tiles_of(spec, is_few=True), tiles_of(spec, is_few=False)
    num_rows = size_text(spec.row.extent)
    is_few, is_many = f"{num_rows} <= {FEW_ROWS}", f"{num_rows} > {FEW_ROWS}"
    if product.num_splits == 1:
        small = Launch(f"{name}_few", _whole_text(product, f"{name}_few", few), _grid(product, few), is_few)
        large = Launch(f"{name}_many", _whole_text(product, f"{name}_many", many), _grid(product, many), is_many)
        return Emitted((small, large))
    partial, reduce = f"{name}_partial", f"{name}_reduce"
    reduce_grid = (divided_up(str(product.num_columns), _REDUCED_COLUMNS), num_rows, "1")
    return Emitted(
        (
            Launch(partial, _partial_text(product, partial, few), _grid(product, few, product.num_splits), is_few),
            Launch(reduce, _reduce_text(product, reduce), reduce_grid, is_few),
            Launch(f"{name}_many", _whole_text(product, f"{name}_many", many), _grid(product, many), is_many),
        ),
        (f"{product.num_splits * product.total_columns} * min({num_rows}, {FEW_ROWS})",),
    )


def tiles_of(spec: MatmulSpec, *, is_few: bool) -> Tiles:
    """Tiles by the spec and whether there are few rows; ``inner`` by the spec alone."""
    is_gated = spec.half_distance != HALF_PANEL
    smallest = 32 if spec.activation == torch.int8 else 16
    widest = 32 if spec.activation == torch.float32 else 64
    inner = max(smallest, min(widest, power_of_two_at_least(spec.reduced)))
    if spec.activation == torch.float32:
        return Tiles(FEW_ROWS, 32 if is_gated else 64, inner, 4, 2)
    if is_few:
        return Tiles(FEW_ROWS, 32 if is_gated else 64, inner, 4, 4)
    return Tiles(128, 64 if is_gated else 128, inner, 8, 3)


def _product(spec: MatmulSpec) -> _Product:
    columns = {store.column.extent for store in spec.stores}
    if len(columns) != 1 or not all(extent.is_Integer for extent in columns):
        raise Refused("results of different or unknown widths in one product")
    num_columns = int(columns.pop())
    few = tiles_of(spec, is_few=True)
    num_splits = 1
    # Two accumulators and two parts would not stay in registers.
    if spec.activation != torch.int8 and spec.half_distance == HALF_PANEL:
        programs = ceiling_division(num_columns, few.columns)
        while (
            num_splits < _MOST_SPLITS
            and programs * num_splits < _FILLED_CHIP
            and spec.reduced // (2 * num_splits) >= _SMALLEST_SPLIT
        ):
            num_splits *= 2
    per_split = ceiling_division(ceiling_division(spec.reduced, num_splits), few.inner) * few.inner
    return _Product(spec, num_columns, num_splits, per_split)


def _grid(product: _Product, tiles: Tiles, num_splits: int = 1) -> tuple[str, str, str]:
    num_row_tiles = divided_up(size_text(product.spec.row.extent), tiles.rows)
    return (f"({num_row_tiles}) * {ceiling_division(product.num_columns, tiles.columns)}", str(num_splits), "1")


def _text(product: _Product, name: str, body: list[str], tiles: Tiles) -> str:
    constants = {
        "NUM_COLUMNS": product.num_columns,
        "NUM_INNER": product.spec.reduced,
        "TILE_ROWS": tiles.rows,
        "TILE_COLUMNS": tiles.columns,
        "TILE_INNER": tiles.inner,
        "INNER_PER_SPLIT": product.inner_per_split,
        "NUM_SPLITS": product.num_splits,
        "NUM_COLUMN_TILES": ceiling_division(product.num_columns, tiles.columns),
        "GROUP_ROW_TILES": _GROUP_ROW_TILES,
    }
    used = {constant: value for constant, value in constants.items() if any(constant in line for line in body)}
    return module_text(
        product.spec,
        name,
        body,
        constants=used,
        num_workspaces=int(product.num_splits > 1),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def _head(product: _Product) -> list[str]:
    """Which rows and columns a program computes."""
    scope = Scope("", 1, {}, ())
    return [
        f"num_rows = {_number(scope.index(product.spec.row.extent))}",
        "num_row_tiles = tl.cdiv(num_rows, TILE_ROWS).to(tl.int32)",
        "tile = tl.program_id(0)",
        "# GROUP_ROW_TILES row tiles go through the same columns before the next begin, while those lie in L2.",
        "tiles_in_group = GROUP_ROW_TILES * NUM_COLUMN_TILES",
        "first_row_tile = tile // tiles_in_group * GROUP_ROW_TILES",
        "num_group_rows = tl.minimum(num_row_tiles - first_row_tile, GROUP_ROW_TILES)",
        "row_tile = first_row_tile + tile % tiles_in_group % num_group_rows",
        "column_tile = tile % tiles_in_group // num_group_rows",
        "row = row_tile.to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)",
        "column = column_tile * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)",
        "is_row = row < num_rows",
        "is_column = column < NUM_COLUMNS",
        f"left = b0 + {scope.index(product.spec.row_offset)} + row[:, None] * {scope.index(product.spec.row_stride)}",
    ]


def _number(text: str) -> str:
    return f"tl.full((), {text}, tl.int64)" if text.isdigit() else text


def _zeros(product: _Product, prefix: str = "") -> list[str]:
    shape = f"(TILE_ROWS, TILE_COLUMNS), dtype={product.accumulator_type}"
    return [f"{prefix}{name} = tl.zeros({shape})" for name in product.accumulators.values()]


def _products(product: _Product, tiles: Tiles, bounds: str, prefix: str = "") -> list[str]:
    """The loop over K between ``bounds``."""
    spec = product.spec
    has_tail = spec.reduced % tiles.inner != 0
    mask = "is_row[:, None] & (k < NUM_INNER)[None, :]" if has_tail else "is_row[:, None]"
    lines = [
        "k = first_inner + tl.arange(0, TILE_INNER)",
        f"x = tl.load(left + k[None, :], mask={mask}, other=0)",
    ]
    precision = ', input_precision="ieee"' if spec.activation == torch.float32 else ""
    precision += ", out_dtype=tl.int32" if product.is_integer else ""
    for offset, name in product.accumulators.items():
        lines += _load_weight(product, tiles, offset, has_tail)
        lines.append(f"{prefix}{name} = tl.dot(x, w.T, {prefix}{name}{precision})")
    return [f"for first_inner in range({bounds}, TILE_INNER):", *(f"    {line}" for line in lines)]


def _load_weight(product: _Product, tiles: Tiles, offset: int, has_tail: bool) -> list[str]:
    """``w`` [TILE_COLUMNS, TILE_INNER] in the dtype that is multiplied."""
    spec = product.spec
    conditions = ["is_column[:, None]"] if product.num_columns % tiles.columns else []
    weight_row = f"(column + {offset}).to(tl.int64)[:, None]" if offset else "column.to(tl.int64)[:, None]"
    if spec.panel_format.group is not None:
        of_codes = _load_packed_weight(product, tiles, weight_row, conditions, has_tail)
        return of_codes + (_load_places(weight_row, conditions, []) if spec.panel_format.is_sparse else [])
    if spec.panel_format.is_sparse:
        return _load_sparse_weight(product, weight_row, conditions, has_tail)
    conditions += ["(k < NUM_INNER)[None, :]"] if has_tail else []
    mask = _mask(conditions)
    address = f"b1 + {weight_row} * NUM_INNER + k[None, :]"
    if spec.weight_layout == "columns":
        address = f"b1 + k.to(tl.int64)[None, :] * {product.total_columns} + {weight_row}"
    widened = ".to(x.dtype)" if spec.panel_format == INT8 and not product.is_integer else ""
    return [f"w = tl.load({address}{mask}){widened}"]


def _mask(conditions: list[str]) -> str:
    return f", mask={' & '.join(conditions)}, other=0" if conditions else ""


def _load_sparse_weight(product: _Product, weight_row: str, conditions: list[str], has_tail: bool) -> list[str]:
    """Two values of every four, and their places."""
    bounds = ["(kept < NUM_INNER // 2)[None, :]"] if has_tail else []
    return [
        "kept = first_inner // 2 + tl.arange(0, TILE_INNER // 2)",
        f"w = tl.load(b1 + {weight_row} * (NUM_INNER // 2) + kept[None, :]{_mask(conditions + bounds)}).to(x.dtype)",
        *_load_places(weight_row, conditions, ["(byte < NUM_INNER // 8)[None, :]"] if has_tail else []),
    ]


def _load_places(weight_row: str, conditions: list[str], bounds: list[str]) -> list[str]:
    """``w`` [TILE_COLUMNS, TILE_INNER / 2] put between zeros where the nibbles of b2 say (sparse_weights.py)."""
    placed = "tl.where(({})[:, :, None] == channel, {}[:, :, None], {})"
    second = placed.format("nibbles >> 2", "second", "tl.zeros_like(second)[:, :, None]")
    return [
        "byte = first_inner // 8 + tl.arange(0, TILE_INNER // 8)",
        f"places = tl.load(b2 + {weight_row} * (NUM_INNER // 8) + byte[None, :]{_mask(conditions + bounds)})",
        "nibbles = tl.interleave(places & 15, places >> 4)",
        "first, second = tl.split(tl.reshape(w, (TILE_COLUMNS, TILE_INNER // 4, 2)))",
        "channel = tl.arange(0, 4)[None, None, :]",
        f"placed = {placed.format('nibbles & 3', 'first', second)}",
        "w = tl.reshape(placed, (TILE_COLUMNS, TILE_INNER))",
    ]


def _load_packed_weight(
    product: _Product, tiles: Tiles, weight_row: str, conditions: list[str], has_tail: bool
) -> list[str]:
    """Codes, a scale and perhaps a zero a group: restored in float32, rounded to the rows' dtype. Of sparse weights,
    what is kept: [TILE_COLUMNS, TILE_INNER / 2]."""
    spec = product.spec
    group = spec.panel_format.group
    assert group is not None
    if has_tail or not (group % tiles.inner == 0 or tiles.inner % group == 0) or product.inner_per_split % group:
        raise Refused(f"groups of {group} do not fit tiles of {tiles.inner} channels")
    mask = _mask(conditions)
    num_groups = max(1, tiles.inner // group)
    share, scales_at = (2, 3) if spec.panel_format.is_sparse else (1, 2)
    num_codes = tiles.inner // share
    row = f"b1 + {weight_row} * {spec.reduced * spec.panel_format.bits // (8 * share)}"
    lines = [
        *_load_codes(spec.panel_format.bits, num_codes, share, row, mask),
        f"group = first_inner // {group} + tl.arange(0, {num_groups})",
        f"place = {weight_row} * {spec.reduced // group} + group[None, :]",
        f"scale = tl.load(b{scales_at} + place{mask}).to(tl.float32)[:, :, None]",
        f"codes = tl.reshape(codes.to(tl.float32), (TILE_COLUMNS, {num_groups}, {num_codes // num_groups}))",
    ]
    restored = f"(codes - {float(middle_code(spec.panel_format.bits))}) * scale"
    if spec.panel_format.zeros != "middle":
        lines.append(f"zero = tl.load(b{scales_at + 1} + place{mask}).to(tl.float32)[:, :, None]")
        restored = "(codes - zero) * scale" if spec.panel_format.zeros == "points" else "codes * scale + zero"
    return [*lines, f"w = tl.reshape({restored}, (TILE_COLUMNS, {num_codes})).to(x.dtype)"]


def _load_codes(bits: int, num_codes: int, share: int, row: str, mask: str) -> list[str]:
    """``codes`` [TILE_COLUMNS, num_codes] of rows that are streams of bits, as group_codes.py has them, with one code
    for ``share`` channels."""
    if bits == 8:
        return [
            f"code = first_inner // {share} + tl.arange(0, {num_codes})",
            f"codes = tl.load({row} + code[None, :]{mask})",
        ]
    if bits == 4:
        return [
            f"pair = first_inner // {2 * share} + tl.arange(0, {num_codes // 2})",
            f"packed = tl.load({row} + pair[None, :]{mask})",
            "codes = tl.interleave(packed & 15, packed >> 4)",
        ]
    split = f"(k * {bits} % 8 > {8 - bits})[None, :]"
    split = mask.replace("mask=", f"mask={split} & ") if mask else f", mask={split}, other=0"
    return [
        f"byte = (k * {bits} // 8)[None, :]",
        f"low = tl.load({row} + byte{mask}).to(tl.int32)",
        f"high = tl.load({row} + byte + 1{split}).to(tl.int32)",
        f"codes = ((high << 8 | low) >> (k * {bits} % 8)[None, :]) & {highest_code(bits)}",
    ]


def _whole_text(product: _Product, name: str, tiles: Tiles) -> str:
    body = [*_head(product), *_zeros(product)]
    if product.num_splits == 1:
        body += _products(product, tiles, "0, NUM_INNER")
    else:
        bounds = "split * INNER_PER_SPLIT, tl.minimum((split + 1) * INNER_PER_SPLIT, NUM_INNER)"
        inner = [*_zeros(product, "part_"), *_products(product, tiles, bounds, "part_")]
        inner += [f"{each} = {each} + part_{each}" for each in product.accumulators.values()]
        body += ["for split in range(NUM_SPLITS):", *(f"    {line}" for line in inner)]
    body += _epilogue(product, (tiles.rows, tiles.columns))
    return _text(product, name, body, tiles)


def _partial_text(product: _Product, name: str, tiles: Tiles) -> str:
    bounds = "split * INNER_PER_SPLIT, tl.minimum((split + 1) * INNER_PER_SPLIT, NUM_INNER)"
    body = [*_head(product), "split = tl.program_id(1)", *_zeros(product), *_products(product, tiles, bounds)]
    body.append(f"place = (split * num_rows + row)[:, None] * {product.total_columns} + column[None, :]")
    mask = "is_row[:, None] & is_column[None, :]"
    body += [f"tl.store(w0 + place + {offset}, {each}, mask={mask})" for offset, each in product.accumulators.items()]
    return _text(product, name, body, tiles)


def _reduce_text(product: _Product, name: str) -> str:
    tiles = Tiles(1, _REDUCED_COLUMNS, 16, 4, 2)
    place = f"(split * num_rows + row)[:, None] * {product.total_columns} + column[None, :]"
    scope = Scope("", 1, {}, ())
    body = [
        f"num_rows = {_number(scope.index(product.spec.row.extent))}",
        "row = tl.program_id(1).to(tl.int64) + tl.arange(0, 1)",
        "column = tl.program_id(0) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)",
        "is_row = row < num_rows",
        "is_column = column < NUM_COLUMNS",
        *_zeros(product),
        "# In ascending order, whichever part was ready first.",
        "for split in range(NUM_SPLITS):",
        *(
            f"    {each} = {each} + tl.load(w0 + {place} + {offset}, mask=is_column[None, :], other=0)"
            for offset, each in product.accumulators.items()
        ),
        *_epilogue(product, (tiles.rows, tiles.columns)),
    ]
    return _text(product, name, body, tiles)


def _epilogue(product: _Product, shape: tuple[int, int]) -> list[str]:
    """The spec's stores over the accumulators."""
    spec = product.spec
    column = spec.stores[0].column
    guards = [Guard(frozenset((spec.row,)), "is_row[:, None]"), Guard(frozenset((column,)), "is_column[None, :]")]
    scope = Scope(
        "", shape[0], {spec.row: "row[:, None]", column: "column[None, :]"}, tuple(guards),
        accumulators=product.accumulators,
    )  # fmt: skip
    for store in spec.stores:
        dtype = next(buffer.dtype for buffer in spec.buffers if buffer.name == store.buffer)
        emit_masked_store(store, scope, shape, scope.value(store.value), dtype, spec.row)
    assert all(buffer.dtype in TYPES for buffer in spec.buffers)
    return scope.lines
