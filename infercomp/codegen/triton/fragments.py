"""Statements for the holes of matmul kernels: what is fused behind, or in front of, a product.

Named values in an epilogue: ``acc`` float32 [TILE_ROWS, TILE_COLUMNS] (and ``up`` of a gated product),
``row`` [TILE_ROWS], ``row_offset`` (row as int64), ``column`` [TILE_COLUMNS], ``is_row``, ``is_column``,
``is_output`` (both) and the constant ``NUM_COLUMNS``. In a prologue: ``x`` float32 [TILE_ROWS, TILE_INNER],
``row``, ``row_offset``, ``is_row``, ``k`` [TILE_INNER], and the constant ``NUM_INNER``.
"""

from __future__ import annotations

from .specs.base import Argument, Fragment, require

# Below this, 1 - exp(-2x) has lost too many digits, and four terms of the series err by less than 1e-7 of tanh.
_SERIES_LIMIT = 0.2


def tanh_statements(name: str, value: str) -> tuple[str, ...]:
    """``name = tanh(value)`` from exp alone, as every target and the interpreter have exp; float32, within 4e-7."""
    return (
        f"{name}_square = {value} * {value}",
        f"{name}_series = 2.0 / 15.0 - {name}_square * (17.0 / 315.0)",
        f"{name}_series = 1.0 + {name}_square * (-1.0 / 3.0 + {name}_square * {name}_series)",
        f"{name}_tail = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs({value})) + 1.0)",
        f"{name}_far = tl.where({value} < 0, -{name}_tail, {name}_tail)",
        f"{name} = tl.where({name}_square < {_SERIES_LIMIT**2:.4f}, {value} * {name}_series, {name}_far)",
    )


def activation_statements(activation: str, name: str) -> tuple[str, ...]:
    """``name = activation(name)`` in float32; the activations are those of ``ops.ACTIVATIONS``."""
    if activation == "gelu_tanh":
        inner = f"{name}_inner = 0.7978845608028654 * ({name} + 0.044715 * {name} * {name} * {name})"
        return (
            inner,
            *tanh_statements(f"{name}_tanh", f"{name}_inner"),
            f"{name} = 0.5 * {name} * (1.0 + {name}_tanh)",
        )
    expressions = {
        "silu": f"{name} / (1.0 + tl.exp(-{name}))",
        "gelu": f"0.5 * {name} * (1.0 + tl.erf({name} * 0.7071067811865476))",
        "relu": f"tl.maximum({name}, 0.0)",
        "sigmoid": f"1.0 / (1.0 + tl.exp(-{name}))",
    }
    require(activation in expressions, f"no kernel for the activation {activation!r}", field="activation")
    return (f"{name} = {expressions[activation]}",)


def activation(name: str) -> Fragment:
    """acc = activation(acc)."""
    return Fragment(activation_statements(name, "acc"))


def gate(name: str) -> Fragment:
    """acc = activation(acc) * up, of a gated product (Shazeer 2020)."""
    return Fragment((*activation_statements(name, "acc"), "acc = acc * up"))


def bias(dtype: str, name: str = "bias") -> Fragment:
    """acc += bias [N]."""
    load = f"acc = acc + tl.load({name} + column, mask=is_column, other=0.0).to(tl.float32)[None, :]"
    return Fragment((load,), (Argument(name, f"*{dtype}"),))


def residual(dtype: str, name: str = "residual") -> Fragment:
    """acc += residual [M, N], contiguous."""
    address = f"{name} + row_offset[:, None] * NUM_COLUMNS + column[None, :]"
    return Fragment(
        (f"acc = acc + tl.load({address}, mask=is_output, other=0.0).to(tl.float32)",), (Argument(name, f"*{dtype}"),)
    )


def softcap(limit: float) -> Fragment:
    """acc = limit * tanh(acc / limit) (Gemma 2)."""
    scaled = f"scaled = acc * {1.0 / limit!r}"
    return Fragment((scaled, *tanh_statements("capped", "scaled"), f"acc = capped * {float(limit)!r}"))


def scale_rows(name: str = "row_scale") -> Fragment:
    """A prologue: x *= row_scale [M] float32, as the 1 / rms of a norm computed before."""
    return Fragment((f"x = x * tl.load({name} + row, mask=is_row, other=0.0)[:, None]",), (Argument(name, "*fp32"),))


def scale_inner(dtype: str, name: str = "inner_scale") -> Fragment:
    """A prologue: x *= inner_scale [K], as the weight of a norm."""
    load = f"x = x * tl.load({name} + k, mask=k < NUM_INNER, other=0.0).to(tl.float32)[None, :]"
    return Fragment((load,), (Argument(name, f"*{dtype}"),))
