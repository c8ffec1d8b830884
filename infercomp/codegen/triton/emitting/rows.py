"""Texts of kernels that treat each row alone."""

from __future__ import annotations

from ..fragments import activation_statements
from ..specs.base import power_of_two_at_least
from ..specs.rows import GatedActivationSpec, NormSpec, QuantizeSpec, RotaryWriteKvSpec, WriteKvSpec
from ..template import Filling, fill, read_template
from .parts import frame_holes, tl_dtype

# Adding and subtracting 1.5 * 2**23 rounds a float32 below 2**22 to the nearest integer, half to even.
ROUNDING_SHIFT = 12582912.0


def emit_norm(spec: NormSpec) -> str:
    """RMS or layer norm of a row, with an addition before and int8 after where asked for."""
    constants = {
        "NUM_COLUMNS": spec.num_columns,
        "TILE_COLUMNS": spec.tile_columns,
        "INPUT_ROW_STRIDE": _or(spec.input_row_stride, spec.num_columns),
    }
    dtype = tl_dtype(spec.dtype)
    holes: dict[str, Filling] = {
        **frame_holes(spec, constants),
        "add_residual": _add_residual(dtype) if spec.has_residual else (),
        "normalize": _layer_norm(spec.eps) if spec.is_layer_norm else _rms_norm(spec.eps),
        "scale": _scale(spec),
        "quantize": (f"x = x.to({dtype}).to(tl.float32)", *_quantize(spec)) if spec.is_quantized else (),
        "result": "codes" if spec.is_quantized else f"x.to({dtype})",
    }
    return fill(read_template("norm"), holes)


def emit_quantize(spec: QuantizeSpec) -> str:
    """A row on its own symmetric grid of 255 steps."""
    constants = {
        "NUM_COLUMNS": spec.num_columns,
        "TILE_COLUMNS": spec.tile_columns,
        "INPUT_ROW_STRIDE": _or(spec.input_row_stride, spec.num_columns),
    }
    holes: dict[str, Filling] = {
        **frame_holes(spec, constants),
        **dict.fromkeys(("add_residual", "normalize", "scale"), ()),
        "quantize": _quantize(spec),
        "result": "codes",
    }
    return fill(read_template("norm"), holes)


def emit_gated_activation(spec: GatedActivationSpec) -> str:
    """activation(gate) * up."""
    constants = {
        "NUM_COLUMNS": spec.num_columns,
        "GATE_ROW_STRIDE": _or(spec.gate_row_stride, spec.num_columns),
        "UP_ROW_STRIDE": _or(spec.up_row_stride, spec.num_columns),
        "TILE_COLUMNS": spec.tile_columns,
    }
    activation = activation_statements(spec.activation, "x")
    holes = {**frame_holes(spec, constants), "activation": activation, "dtype": tl_dtype(spec.dtype)}
    return fill(read_template("gated_activation"), holes)


def emit_write_kv(spec: WriteKvSpec) -> str:
    """A token's key and value to its slot."""
    constants = {
        "KEY_WIDTH": spec.key_width,
        "VALUE_WIDTH": spec.value_width,
        "KEY_ROW_STRIDE": _or(spec.key_row_stride, spec.key_width),
        "VALUE_ROW_STRIDE": _or(spec.value_row_stride, spec.value_width),
        "TILE_KEY": power_of_two_at_least(spec.key_width),
        "TILE_VALUE": power_of_two_at_least(spec.value_width),
    }
    return fill(read_template("write_kv"), frame_holes(spec, constants))


def emit_rotary_write_kv(spec: RotaryWriteKvSpec) -> str:
    """Query and key turned by their position's angles, key and value to their slot."""
    num_pairs = spec.rotary_dim // 2
    query_width, key_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    value_width = spec.num_kv_heads * _or(spec.value_dim, spec.head_dim)
    num_passed = spec.head_dim - spec.rotary_dim
    constants = {
        "NUM_HEADS": spec.num_heads,
        "NUM_KV_HEADS": spec.num_kv_heads,
        "HEAD_DIM": spec.head_dim,
        "ROTARY_DIM": spec.rotary_dim,
        "NUM_PAIRS": num_pairs,
        "QUERY_WIDTH": query_width,
        "KEY_WIDTH": key_width,
        "VALUE_WIDTH": value_width,
        "VALUE_ROW_STRIDE": _or(spec.value_row_stride, value_width),
        "TILE_HEADS": power_of_two_at_least(spec.num_heads),
        "TILE_PAIRS": power_of_two_at_least(num_pairs),
        "TILE_VALUE": power_of_two_at_least(value_width),
    }
    holes: dict[str, Filling] = {
        **frame_holes(spec, constants),
        "query_address": f"query + token * {_or(spec.query_row_stride, query_width)}",
        "key_address": f"key + token * {_or(spec.key_row_stride, key_width)}",
        "first_channel": "2 * pair" if spec.is_interleaved else "pair",
        "second_channel": "2 * pair + 1" if spec.is_interleaved else "pair + NUM_PAIRS",
        "dtype": tl_dtype(spec.dtype),
        "pass_rest": _pass_rest(num_passed) if num_passed else (),
    }
    return fill(read_template("rotary_write_kv"), holes)


def _or(given: int | None, default: int) -> int:
    return default if given is None else given


def _add_residual(dtype: str) -> tuple[str, ...]:
    return (
        "x += tl.load(residual + row * NUM_COLUMNS + column, mask=is_column, other=0.0).to(tl.float32)",
        f"tl.store(summed + row * NUM_COLUMNS + column, x.to({dtype}), mask=is_column)",
        f"x = x.to({dtype}).to(tl.float32)",
    )


def _rms_norm(eps: float) -> tuple[str, ...]:
    return (f"x = x * tl.rsqrt(tl.sum(x * x, axis=0) / NUM_COLUMNS + {eps!r})",)


def _layer_norm(eps: float) -> tuple[str, ...]:
    return (
        "centered = tl.where(is_column, x - tl.sum(x, axis=0) / NUM_COLUMNS, 0.0)",
        f"x = centered * tl.rsqrt(tl.sum(centered * centered, axis=0) / NUM_COLUMNS + {eps!r})",
    )


def _scale(spec: NormSpec) -> tuple[str, ...]:
    lines = []
    if spec.has_weight:
        load = "tl.load(weight + column, mask=is_column, other=0.0).to(tl.float32)"
        lines.append(f"x = x * {f'(1.0 + {load})' if spec.unit_offset else load}")
    if spec.has_bias:
        lines.append("x = x + tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)")
    return tuple(lines)


def _quantize(spec: NormSpec | QuantizeSpec) -> tuple[str, ...]:
    """The steps of ``ops.quantize_per_token``, each rounded on its own."""
    lines = (
        "maximum = tl.max(tl.abs(x), axis=0)",
        "is_zero = maximum < 1e-30",
        'is_finite = (tl.sum((x != x).to(tl.int32), axis=0) == 0) & (maximum < float("inf"))',
        "inverse = tl.where(is_zero, 0.0, tl.div_rn(127.0, tl.where(is_zero, 1.0, maximum)))",
        f"steps = (x * inverse + {ROUNDING_SHIFT}) - {ROUNDING_SHIFT}",
        "codes = tl.where(is_finite, steps, 0.0).to(tl.int8)",
        f"step = tl.where(is_zero, 1.0, maximum * {1.0 / 127.0!r})",
        'tl.store(output_scale + row, tl.where(is_finite, step, float("nan")))',
    )
    if not spec.group_size:
        return lines
    num_tile_groups = spec.tile_columns // spec.group_size
    return (
        *lines,
        f"groups = tl.reshape(codes.to(tl.int32), ({num_tile_groups}, {spec.group_size}))",
        f"group = tl.arange(0, {num_tile_groups})",
        f"sums = output_sums + row * {spec.num_columns // spec.group_size} + group",
        f"tl.store(sums, tl.sum(groups, axis=1), mask=group < {spec.num_columns // spec.group_size})",
    )


def _pass_rest(num_passed: int) -> tuple[str, ...]:
    tile = power_of_two_at_least(num_passed)
    return (
        f"rest = ROTARY_DIM + tl.arange(0, {tile})[None, :]",
        "is_rest = is_head & (rest < HEAD_DIM)",
        "passed = tl.load(source + head * HEAD_DIM + rest, mask=is_rest)",
        "tl.store(target + head * HEAD_DIM + rest, passed, mask=is_rest)",
    )
