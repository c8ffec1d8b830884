"""tanh as Triton statements."""

from __future__ import annotations

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
