"""Texts of matrix products: tiles, one row, and the second stage of a split product."""

from __future__ import annotations

from ..specs.base import Fragment, ceiling_division
from ..specs.matmul import MatmulReduceSpec, MatmulSpec
from ..template import Filling, fill, lines_of, read_template
from .parts import dot_options, frame_holes, masked, tl_dtype


def emit_matmul(spec: MatmulSpec) -> str:
    """The kernel of a product: one row a program, or tiles."""
    constants = _constants(spec)
    if spec.is_single_row:
        return fill(read_template("gemv"), {**frame_holes(spec, constants), **_gemv_holes(spec)})
    tile = fill(read_template("matmul_tile"), _tile_holes(spec))
    if spec.is_persistent:
        head = "for tile in range(tl.program_id(0), num_row_tiles * NUM_COLUMN_TILES, tl.num_programs(0)):"
        body = (head, *("    " + line for line in lines_of(tile)))
    else:
        body = ("tile = tl.program_id(0)", *lines_of(tile))
    holes = {**frame_holes(spec, constants), "descriptors": _descriptors(spec), "tiles": body}
    return fill(read_template("matmul"), holes)


def emit_matmul_reduce(spec: MatmulReduceSpec) -> str:
    """The kernel that adds a split product's partials and finishes them."""
    product = spec.product
    constants = {
        "NUM_COLUMNS": product.num_columns,
        "PARTIAL_COLUMNS": product.num_columns * product.num_accumulators,
        "NUM_SPLITS": product.num_splits,
        "TILE_ROWS": spec.tile_rows,
        "TILE_COLUMNS": spec.tile_columns,
    }
    other = "0" if product.is_integer else "0.0"
    sums = tuple(
        f"{name} = {name} + tl.load(partial{offset}, mask=is_output, other={other})"
        for name, offset in _accumulator_offsets(product)
    )
    holes: dict[str, Filling] = {
        **frame_holes(spec, constants),
        "accumulators": _zeros(product, "(TILE_ROWS, TILE_COLUMNS)"),
        "sums": sums,
        "finish": _finish(product),
        "store": _store_output(product),
    }
    return fill(read_template("matmul_reduce"), holes)


def _constants(spec: MatmulSpec) -> dict[str, int | float]:
    constants: dict[str, int | float] = {
        "NUM_COLUMNS": spec.num_columns,
        "NUM_INNER": spec.num_inner,
        "TILE_COLUMNS": spec.tile_columns,
        "TILE_INNER": spec.tile_inner,
    }
    if not spec.is_single_row:
        constants["TILE_ROWS"] = spec.tile_rows
        constants["NUM_COLUMN_TILES"] = ceiling_division(spec.num_columns, spec.tile_columns)
        constants["GROUP_ROW_TILES"] = spec.group_row_tiles
        constants["INNER_PER_SPLIT"] = spec.inner_per_split
    if spec.weight_format == "u4":
        constants["GROUP_SIZE"] = spec.group_size
        constants["NUM_GROUPS"] = spec.num_inner // spec.group_size
    return constants


def _tile_holes(spec: MatmulSpec) -> dict[str, Filling]:
    is_split = spec.num_splits > 1
    split = (
        "split = tl.program_id(1)",
        "split_begin = split * INNER_PER_SPLIT",
        "split_end = tl.minimum(split_begin + INNER_PER_SPLIT, NUM_INNER)",
    )
    products: list[str] = []
    for name, row_offset in _weight_blocks(spec):
        products += _load_weight(spec, row_offset)
        product = f"tl.dot(x, w.T, {name}{dot_options(spec.input_dtype, allow_tf32=spec.allow_tf32)}"
        products.append(f"{name} = {product}{', out_dtype=tl.int32' if spec.is_integer else ''})")
    return {
        "split": split if is_split else (),
        "inner_range": "split_begin, split_end" if is_split else "0, NUM_INNER",
        "accumulators": _zeros(spec, "(TILE_ROWS, TILE_COLUMNS)"),
        "load_input": _load_input(spec),
        "prologue": _prologue(spec.prologue, tl_dtype(spec.input_dtype)),
        "products": tuple(products),
        "finish": () if is_split else _finish(spec),
        "store": _store_partials(spec) if is_split else _store_output(spec),
    }


def _gemv_holes(spec: MatmulSpec) -> dict[str, Filling]:
    products: list[str] = []
    for name, row_offset in _weight_blocks(spec):
        products += _load_weight(spec, row_offset, is_rounded=False)
        wide = tl_dtype(spec.accumulator)
        products.append(f"{name} = {name} + x.to({wide}) * w.to({wide})")
    return {
        "accumulators": _zeros(spec, "(TILE_COLUMNS, TILE_INNER)"),
        "load_input": _load_input(spec),
        "prologue": _prologue(spec.prologue, None),
        "products": tuple(products),
        "sums": tuple(f"{name} = tl.sum({name}, axis=1)[None, :]" for name, _ in _weight_blocks(spec)),
        "finish": _finish(spec),
        "store": _store_output(spec),
    }


def _weight_blocks(spec: MatmulSpec) -> list[tuple[str, str]]:
    """Each accumulator and where its weight rows begin."""
    return [("acc", ""), ("up", " + NUM_COLUMNS")][: spec.num_accumulators]


def _accumulator_offsets(spec: MatmulSpec) -> list[tuple[str, str]]:
    return _weight_blocks(spec)


def _zeros(spec: MatmulSpec, shape: str) -> tuple[str, ...]:
    dtype = tl_dtype(spec.accumulator)
    return tuple(f"{name} = tl.zeros({shape}, dtype={dtype})" for name, _ in _weight_blocks(spec))


def _has_inner_tail(spec: MatmulSpec) -> bool:
    return spec.num_inner % spec.tile_inner != 0


def _has_column_tail(spec: MatmulSpec) -> bool:
    return spec.num_columns % spec.tile_columns != 0


def _descriptors(spec: MatmulSpec) -> tuple[str, ...]:
    """TMA descriptors of input and weight; reading beyond an edge gives zeros, so no masks."""
    if not spec.use_descriptors:
        return ()
    rows = spec.num_columns * spec.num_accumulators
    shape, block = [rows, spec.num_inner], "[TILE_COLUMNS, TILE_INNER]"
    if spec.is_transposed:
        shape, block = [spec.num_inner, rows], "[TILE_INNER, TILE_COLUMNS]"
    return (
        "input_tiles = tl.make_tensor_descriptor(",
        f"    input, shape=[num_rows, NUM_INNER], strides=[{spec.row_stride}, 1], block_shape=[TILE_ROWS, TILE_INNER]",
        ")",
        "weight_tiles = tl.make_tensor_descriptor(",
        f"    weight, shape={shape}, strides=[{shape[1]}, 1], block_shape={block}",
        ")",
    )


def _load_input(spec: MatmulSpec) -> tuple[str, ...]:
    if spec.use_descriptors:
        return ("x = input_tiles.load([row_tile * TILE_ROWS, first_inner])",)
    conditions = [] if spec.is_single_row else ["is_row[:, None]"]
    if _has_inner_tail(spec):
        conditions.append("k[None, :] < NUM_INNER")
    address = f"input + row_offset[:, None] * {spec.row_stride} + k[None, :]"
    return (f"x = {masked(address, conditions, '0' if spec.is_integer else '0.0')}",)


def _prologue(prologue: Fragment, rounded_to: str | None) -> tuple[str, ...]:
    if not prologue:
        return ()
    rounding = (f"x = x.to({rounded_to})",) if rounded_to else ()
    return ("x = x.to(tl.float32)", *prologue.statements, *rounding)


def _load_weight(spec: MatmulSpec, row_offset: str, *, is_rounded: bool = True) -> tuple[str, ...]:
    """``w`` [TILE_COLUMNS, TILE_INNER], in the input's dtype if ``is_rounded`` (for a matrix instruction)."""
    if spec.weight_format == "u4":
        return _load_packed_weight(spec, row_offset, is_rounded=is_rounded)
    rounding = f".to({tl_dtype(spec.input_dtype)})" if is_rounded and _is_widened(spec) else ""
    if spec.use_descriptors:
        first_row = f"column_tile * TILE_COLUMNS{row_offset}"
        place = f"first_inner, {first_row}" if spec.is_transposed else f"{first_row}, first_inner"
        turn = ".T" if spec.is_transposed else ""
        return (f"w = weight_tiles.load([{place}]){turn}{rounding}",)
    conditions = ["is_column[:, None]"] if _has_column_tail(spec) else []
    if _has_inner_tail(spec):
        conditions.append("k[None, :] < NUM_INNER")
    weight_row = f"{_weight_row(row_offset)}[:, None]"
    address = f"weight + {weight_row} * NUM_INNER + k[None, :]"
    if spec.is_transposed:
        total = "NUM_COLUMNS" if not spec.is_gated else "(2 * NUM_COLUMNS)"
        address = f"weight + k.to(tl.int64)[None, :] * {total} + (column{row_offset})[:, None]"
    other = "0" if "i8" in (spec.input_dtype, spec.weight_format) else "0.0"
    return (f"w = {masked(address, conditions, other)}{rounding}",)


def _weight_row(row_offset: str) -> str:
    return f"(column{row_offset}).to(tl.int64)" if row_offset else "column.to(tl.int64)"


def _is_widened(spec: MatmulSpec) -> bool:
    return spec.weight_format == "i8" and not spec.is_integer


def _load_packed_weight(spec: MatmulSpec, row_offset: str, *, is_rounded: bool) -> tuple[str, ...]:
    tile_bytes = spec.tile_inner // 2
    conditions = ["is_column[:, None]"] if _has_column_tail(spec) else []
    tail = [f"pair[None, :] < {spec.num_inner // 2}"] if _has_inner_tail(spec) else []
    packed = masked(f"weight + weight_row * {spec.num_inner // 2} + pair[None, :]", conditions + tail, "0")
    num_groups = max(1, spec.tile_inner // spec.group_size)
    group = "group_place" if num_groups > 1 else "weight_row * NUM_GROUPS + first_inner // GROUP_SIZE"
    group_tail = ["group[None, :] < NUM_GROUPS"] if num_groups > 1 and _has_inner_tail(spec) else []
    scale = masked(f"weight_scale + {group}", conditions + group_tail)
    zero = "8.0"
    lines = [
        f"weight_row = {_weight_row(row_offset)}[:, None]",
        f"pair = first_inner // 2 + tl.arange(0, {tile_bytes})",
        f"packed = {packed}",
        "w = tl.interleave(packed & 15, packed >> 4).to(tl.float32)",
    ]
    if num_groups > 1:
        lines.append(f"group = first_inner // GROUP_SIZE + tl.arange(0, {num_groups})")
        lines.append("group_place = weight_row * NUM_GROUPS + group[None, :]")
    lines.append(f"scale = {scale}.to(tl.float32)")
    if spec.has_zero:
        zero = "zero"
        lines.append(f"zero = {masked(f'weight_zero + {group}', conditions + group_tail, '0')}.to(tl.float32)")
    if num_groups > 1:
        lines.append(f"w = tl.reshape(w, (TILE_COLUMNS, {num_groups}, GROUP_SIZE))")
        zero = "zero[:, :, None]" if spec.has_zero else zero
        lines.append(f"w = tl.reshape((w - {zero}) * scale[:, :, None], (TILE_COLUMNS, TILE_INNER))")
    else:
        lines.append(f"w = (w - {zero}) * scale")
    if is_rounded:
        lines.append(f"w = w.to({tl_dtype(spec.input_dtype)})")
    return tuple(lines)


def _finish(spec: MatmulSpec) -> tuple[str, ...]:
    """Integer sums and int8 weights get their scales, then the epilogue runs in float32."""
    lines = []
    for name, row_offset in _weight_blocks(spec):
        if spec.is_integer:
            lines.append(
                f"{name} = {name}.to(tl.float32) * tl.load(input_scale + row, mask=is_row, other=0.0)[:, None]"
            )
        if spec.weight_format == "i8":
            scale = f"tl.load(weight_scale + column{row_offset}, mask=is_column, other=0.0)"
            lines.append(f"{name} = {name} * {scale}[None, :]")
    return (*lines, *spec.epilogue.statements)


def _store_output(spec: MatmulSpec) -> tuple[str, ...]:
    place = "output + row_offset[:, None] * NUM_COLUMNS + column[None, :]"
    return (f"tl.store({place}, acc.to({tl_dtype(spec.output_dtype)}), mask=is_output)",)


def _store_partials(spec: MatmulSpec) -> tuple[str, ...]:
    columns = spec.num_columns * spec.num_accumulators
    place = f"partial = partials + (split * num_rows + row_offset)[:, None] * {columns} + column[None, :]"
    return (
        place,
        *(f"tl.store(partial{offset}, {name}, mask=is_output)" for name, offset in _accumulator_offsets(spec)),
    )
