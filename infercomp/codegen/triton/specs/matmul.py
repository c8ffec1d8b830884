"""Specs of matrix products: tiles for tensor cores, one row at a time for decoding, and split K."""

from __future__ import annotations

from dataclasses import dataclass

from .base import (
    DTYPE_BYTES,
    FLOAT_DTYPES,
    NOTHING,
    Argument,
    Fragment,
    Grid,
    KernelSpec,
    ceiling_division,
    require,
    require_dtype,
    require_power_of_two,
)

WEIGHT_FORMATS = ("same", "i8", "u4")


@dataclass(frozen=True, kw_only=True)
class MatmulSpec(KernelSpec):
    """input [M, K] times weight [N, K] -> [M, N], accumulated in float32 (int32 for int8 inputs).

    ``weight_format``: "same" is the input's dtype; "i8" is int8 with ``weight_scale`` [N] float32;
    "u4" packs columns 2j and 2j+1 of a row into the low and high nibble of byte j, [N, K/2], with
    ``weight_scale`` [N, K/group_size] in ``group_scale_dtype`` and ``weight_zero`` likewise in uint8 (8 if absent).
    int8 inputs take an int8 weight and ``input_scale`` [M] float32 besides.

    Gated (Shazeer 2020): weight holds the N gate rows, then the N up rows; the epilogue sees ``acc``
    (gate) and ``up``. ``prologue`` may change ``x`` [TILE_ROWS, TILE_K] given ``row`` and ``k``;
    ``epilogue`` changes ``acc`` [TILE_ROWS, TILE_COLUMNS] given ``row``, ``column`` and ``is_output``.

    Batch invariance: a row's result depends on ``TILE_K``, ``num_splits`` and the matrix instruction.
    Tiles of fewer than 64 rows take another instruction than taller ones on cuda:90 and later, and the
    one-row kernel sums in another order, so to keep rows the same choose the spec from K and N alone.
    """

    input_dtype: str
    output_dtype: str
    num_columns: int
    num_inner: int
    weight_format: str = "same"
    is_transposed: bool = False  # weight is [K, N]
    group_size: int = 0
    group_scale_dtype: str = "fp16"
    has_zero: bool = False
    is_gated: bool = False
    allow_tf32: bool = False
    input_row_stride: int | None = None
    prologue: Fragment = NOTHING
    epilogue: Fragment = NOTHING
    num_splits: int = 1
    is_persistent: bool = False
    use_descriptors: bool = False  # TMA, cuda:90 and later
    is_single_row: bool = False  # one row a program, no matrix instructions
    tile_rows: int = 128
    tile_columns: int = 128
    tile_inner: int = 64
    group_row_tiles: int = 8
    num_warps: int = 8
    num_stages: int = 3

    @property
    def allows_contraction(self) -> bool:
        """Products of int8 are exact, and what follows them is held to ``ops.int8_linear`` to the bit."""
        return not self.is_integer

    @property
    def name(self) -> str:
        form = "gemv" if self.is_single_row else "gated_matmul" if self.is_gated else "matmul"
        weight = {"same": "", "i8": "_w8", "u4": "_w4"}[self.weight_format]
        return f"{form}_{self.input_dtype}{weight}{'_partial' if self.num_splits > 1 else ''}"

    @property
    def is_integer(self) -> bool:
        return self.input_dtype == "i8"

    @property
    def accumulator(self) -> str:
        return "i32" if self.is_integer else "fp32"

    @property
    def row_stride(self) -> int:
        return self.num_inner if self.input_row_stride is None else self.input_row_stride

    @property
    def num_accumulators(self) -> int:
        return 2 if self.is_gated else 1

    @property
    def inner_per_split(self) -> int:
        """K elements of one split, a multiple of the tile, so that no tile belongs to two splits."""
        return ceiling_division(ceiling_division(self.num_inner, self.num_splits), self.tile_inner) * self.tile_inner

    def validate(self) -> None:
        require_dtype(self.input_dtype, "input_dtype", FLOAT_DTYPES | {"i8": "tl.int8"})
        require_dtype(self.output_dtype, "output_dtype", FLOAT_DTYPES | {"i32": "tl.int32"})
        require(self.weight_format in WEIGHT_FORMATS, f"no weight format {self.weight_format!r}", field="weight_format")
        require_power_of_two(self.tile_rows, "tile_rows", 1 if self.is_single_row else 16)
        require_power_of_two(self.tile_columns, "tile_columns", 1 if self.is_single_row else 16)
        require_power_of_two(self.tile_inner, "tile_inner", 32 if self.is_integer else 16)
        require(self.num_splits >= 1, "num_splits is less than 1", field="num_splits")
        self._validate_weight()
        if self.use_descriptors:
            self._validate_descriptors()
        if self.is_single_row:
            is_plain = self.num_splits == 1 and not self.is_persistent and not self.use_descriptors
            require(is_plain and self.tile_rows == 1, "the one-row kernel has only column tiles", field="is_single_row")

    def _validate_weight(self) -> None:
        if self.is_integer:
            require(self.weight_format == "i8", "int8 inputs need an int8 weight", field="weight_format")
        if self.weight_format == "u4":
            group, tile = self.group_size, self.tile_inner
            divides = group > 0 and self.num_inner % group == 0 and (group % tile == 0 or tile % group == 0)
            require(divides, f"groups of {group} do not fit K {self.num_inner}, tile {tile}", field="group_size")
            require(not self.is_transposed, "packed weights are [N, K/2] only", field="is_transposed")
            require_power_of_two(group, "group_size", 2)
            require_dtype(self.group_scale_dtype, "group_scale_dtype")

    def _validate_descriptors(self) -> None:
        require(self.weight_format != "u4", "descriptors hold no packed nibbles", field="use_descriptors")
        element = DTYPE_BYTES[self.input_dtype]
        inner = DTYPE_BYTES["i8"] if self.weight_format == "i8" else element
        contiguous = self.num_columns * self.num_accumulators if self.is_transposed else self.num_inner
        is_aligned = self.row_stride * element % 16 == 0 and contiguous * inner % 16 == 0
        require(is_aligned, "rows are not a multiple of 16 bytes long", field="use_descriptors")

    def weight_arguments(self) -> tuple[Argument, ...]:
        dtype = {"same": self.input_dtype, "i8": "i8", "u4": "u8"}[self.weight_format]
        zero = (Argument("weight_zero", "*u8"),) if self.has_zero else ()
        return (Argument("weight", f"*{dtype}"), *(self._group_scale() + zero if self.weight_format == "u4" else ()))

    def _group_scale(self) -> tuple[Argument, ...]:
        return (Argument("weight_scale", f"*{self.group_scale_dtype}"),)

    def finish_arguments(self) -> tuple[Argument, ...]:
        """Pointers read after the last product: scales of rows and columns, and the epilogue's operands."""
        rows = (Argument("input_scale", "*fp32"),) if self.is_integer else ()
        columns = (Argument("weight_scale", "*fp32"),) if self.weight_format == "i8" else ()
        return (*rows, *columns, *self.epilogue.operands)

    def arguments(self) -> tuple[Argument, ...]:
        output = Argument("output", f"*{self.output_dtype}")
        if self.num_splits > 1:
            output = Argument("partials", f"*{self.accumulator}")
        finish = () if self.num_splits > 1 else self.finish_arguments()
        inputs = (Argument("input", f"*{self.input_dtype}"), *self.weight_arguments(), *self.prologue.operands)
        return _unique((output, *inputs, *finish, Argument("num_rows", "i32")))

    def grid(self, num_rows: int, num_programs: int | None = None) -> Grid:
        """One program a tile and split; ``num_programs`` (the chip's multiprocessors) for a persistent grid."""
        tiles = ceiling_division(num_rows, self.tile_rows) * ceiling_division(self.num_columns, self.tile_columns)
        if self.is_single_row:
            return (ceiling_division(self.num_columns, self.tile_columns), num_rows, 1)
        if self.is_persistent:
            require(num_programs is not None, "a persistent grid needs num_programs", field="num_programs")
            tiles = min(tiles, num_programs or tiles)
        return (tiles, self.num_splits, 1)

    def partials_shape(self, num_rows: int) -> tuple[int, int, int]:
        """Shape of the workspace that joins a split product to its reduction."""
        return (self.num_splits, num_rows, self.num_columns * self.num_accumulators)

    def reduction(self) -> MatmulReduceSpec:
        """The second stage of a split product: adds the splits in order, then finishes."""
        require(self.num_splits > 1, "the product is not split", field="num_splits")
        return MatmulReduceSpec(product=self, origin=self.origin)


@dataclass(frozen=True, kw_only=True)
class MatmulReduceSpec(KernelSpec):
    """partials [splits, M, N] -> [M, N]: splits are added in ascending order, so no atomics and one result."""

    product: MatmulSpec
    tile_rows: int = 1
    tile_columns: int = 512

    @property
    def allows_contraction(self) -> bool:
        return self.product.allows_contraction

    @property
    def name(self) -> str:
        return self.product.name.replace("_partial", "_reduce")

    def arguments(self) -> tuple[Argument, ...]:
        output = Argument("output", f"*{self.product.output_dtype}")
        partials = Argument("partials", f"*{self.product.accumulator}")
        return (output, partials, *_unique(self.product.finish_arguments()), Argument("num_rows", "i32"))

    def grid(self, num_rows: int) -> Grid:
        columns = ceiling_division(self.product.num_columns, self.tile_columns)
        return (columns, ceiling_division(num_rows, self.tile_rows), 1)


def _unique(arguments: tuple[Argument, ...]) -> tuple[Argument, ...]:
    return tuple(dict.fromkeys(arguments))
