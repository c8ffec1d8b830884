"""Specs of kernels that treat each row alone: norms, gated activation, rotary embedding, cache writes."""

from __future__ import annotations

from dataclasses import dataclass

from .base import (
    DTYPE_BYTES,
    Argument,
    Grid,
    KernelSpec,
    ceiling_division,
    power_of_two_at_least,
    require,
    require_dtype,
)


@dataclass(frozen=True, kw_only=True)
class NormSpec(KernelSpec):
    """``ops.rms_norm`` or ``ops.layer_norm`` of rows [T, D], one row a program, in float32.

    ``has_residual``: input + residual is rounded to ``dtype``, written to ``summed``, and then normalised.
    ``is_quantized``: the norm, rounded to ``dtype``, goes through ``ops.quantize_per_token``: int8 codes, a
    float32 scale a row and, if ``group_size`` is not 0, int32 sums of the codes of each group.
    """

    dtype: str
    num_columns: int
    eps: float
    is_layer_norm: bool = False
    has_weight: bool = True
    has_bias: bool = False
    unit_offset: bool = False
    has_residual: bool = False
    is_quantized: bool = False
    group_size: int = 0
    input_row_stride: int | None = None

    @property
    def allows_contraction(self) -> bool:
        return not self.is_quantized

    @property
    def name(self) -> str:
        kind = "layer_norm" if self.is_layer_norm else "rms_norm"
        return f"{'add_' if self.has_residual else ''}{kind}{'_int8' if self.is_quantized else ''}_{self.dtype}"

    @property
    def tile_columns(self) -> int:
        return power_of_two_at_least(self.num_columns)

    def validate(self) -> None:
        require_dtype(self.dtype, "dtype")
        require(self.tile_columns <= 65536, f"a row of {self.num_columns} is too long", field="num_columns")
        require(self.is_layer_norm or not self.has_bias, "an RMS norm has no bias", field="has_bias")
        _require_groups(self.num_columns, self.group_size)

    def arguments(self) -> tuple[Argument, ...]:
        value = f"*{self.dtype}"
        output = _quantized_outputs(self.group_size) if self.is_quantized else (Argument("output", value),)
        summed = (Argument("summed", value),) if self.has_residual else ()
        residual = (Argument("residual", value),) if self.has_residual else ()
        weight = (Argument("weight", value),) if self.has_weight else ()
        bias = (Argument("bias", value),) if self.has_bias else ()
        return (*output, *summed, Argument("input", value), *residual, *weight, *bias)

    def grid(self, num_rows: int) -> Grid:
        return (num_rows, 1, 1)


@dataclass(frozen=True, kw_only=True)
class QuantizeSpec(KernelSpec):
    """``ops.quantize_per_token`` (ZeroQuant, Yao et al. 2022) bit for bit; sums only if ``group_size`` is not 0."""

    dtype: str
    num_columns: int
    group_size: int = 0
    input_row_stride: int | None = None

    @property
    def allows_contraction(self) -> bool:
        return False

    @property
    def name(self) -> str:
        return f"quantize_{self.dtype}"

    @property
    def tile_columns(self) -> int:
        return power_of_two_at_least(self.num_columns)

    def validate(self) -> None:
        require_dtype(self.dtype, "dtype")
        _require_groups(self.num_columns, self.group_size)

    def arguments(self) -> tuple[Argument, ...]:
        return (*_quantized_outputs(self.group_size), Argument("input", f"*{self.dtype}"))

    def grid(self, num_rows: int) -> Grid:
        return (num_rows, 1, 1)


@dataclass(frozen=True, kw_only=True)
class GatedActivationSpec(KernelSpec):
    """``ops.gated_activation``: activation(gate) * up, [T, N]; row strides let both be parts of one merged row."""

    dtype: str
    num_columns: int
    activation: str
    gate_row_stride: int | None = None
    up_row_stride: int | None = None
    tile_columns: int = 1024

    @property
    def name(self) -> str:
        return f"gated_{self.activation}_{self.dtype}"

    def validate(self) -> None:
        require_dtype(self.dtype, "dtype")

    def arguments(self) -> tuple[Argument, ...]:
        return tuple(Argument(name, f"*{self.dtype}") for name in ("output", "gate", "up"))

    def grid(self, num_rows: int) -> Grid:
        return (num_rows, ceiling_division(self.num_columns, self.tile_columns), 1)


@dataclass(frozen=True, kw_only=True)
class WriteKvSpec(KernelSpec):
    """``ops.write_kv``: key [T, Hkv, D] and value [T, Hkv, Dv] to slots [T] of caches [blocks, block_size, Hkv, ·].

    Row strides let key and value be parts of a merged row of q, k and v.
    """

    dtype: str
    num_kv_heads: int
    head_dim: int
    value_dim: int | None = None
    key_row_stride: int | None = None
    value_row_stride: int | None = None
    index_dtype: str = "i64"
    num_warps: int = 2

    @property
    def name(self) -> str:
        return f"write_kv_{self.dtype}"

    @property
    def key_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def value_width(self) -> int:
        return self.num_kv_heads * (self.head_dim if self.value_dim is None else self.value_dim)

    def validate(self) -> None:
        require(self.dtype in DTYPE_BYTES, f"no dtype {self.dtype!r}", field="dtype")

    def arguments(self) -> tuple[Argument, ...]:
        tensors = (Argument(name, f"*{self.dtype}") for name in ("key_cache", "value_cache", "key", "value"))
        return (*tensors, Argument("slot_mapping", f"*{self.index_dtype}"))

    def grid(self, num_tokens: int) -> Grid:
        return (num_tokens, 1, 1)


@dataclass(frozen=True, kw_only=True)
class RotaryWriteKvSpec(KernelSpec):
    """``ops.rotary_embedding`` of query and key, then ``ops.write_kv``: the key is rotated into the cache.

    query [T, H, D], key [T, Hkv, D], value [T, Hkv, Dv], cos and sin [T, R] -> rotated query [T, H, D].
    Row strides let query, key and value be parts of one merged row. The rotated key is rounded once.
    """

    dtype: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    value_dim: int | None = None
    is_interleaved: bool = False
    angle_dtype: str = "fp32"
    query_row_stride: int | None = None
    key_row_stride: int | None = None
    value_row_stride: int | None = None
    index_dtype: str = "i64"

    @property
    def name(self) -> str:
        return f"rotary_write_kv_{self.dtype}"

    def validate(self) -> None:
        require_dtype(self.dtype, "dtype")
        require_dtype(self.angle_dtype, "angle_dtype")
        fits = 0 < self.rotary_dim <= self.head_dim and self.rotary_dim % 2 == 0
        require(fits, f"{self.rotary_dim} of {self.head_dim} channels cannot turn", field="rotary_dim")

    def arguments(self) -> tuple[Argument, ...]:
        names = ("query_output", "key_cache", "value_cache", "query", "key", "value")
        tensors = (Argument(name, f"*{self.dtype}") for name in names)
        angles = (Argument(name, f"*{self.angle_dtype}") for name in ("cos", "sin"))
        return (*tensors, *angles, Argument("slot_mapping", f"*{self.index_dtype}"))

    def grid(self, num_tokens: int) -> Grid:
        """Axis 1: the query's heads, the key's, the value's."""
        return (num_tokens, 3, 1)


def _quantized_outputs(group_size: int) -> tuple[Argument, ...]:
    outputs = (Argument("output", "*i8"), Argument("output_scale", "*fp32"))
    return (*outputs, Argument("output_sums", "*i32")) if group_size else outputs


def _require_groups(num_columns: int, group_size: int) -> None:
    divides = group_size == 0 or (group_size & (group_size - 1) == 0 and num_columns % group_size == 0)
    require(divides, f"groups of {group_size} do not divide rows of {num_columns}", field="group_size")
