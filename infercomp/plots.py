"""Plots of accounts: the error of every layer, and quality against size. They need matplotlib."""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .runtime.errors import ConfigError

if TYPE_CHECKING:
    from .account import Account

SUFFIXES = (".png", ".svg", ".pdf")
_NUMBER = re.compile(r"\.(\d+)\.")
_PANELS_A_ROW = 4
_DOTS_PER_INCH = 110
_SMALL = 7


def require_plotting(path: str | None) -> None:
    """Raise ConfigError for a file that no plot can be written as; None is none."""
    if path is None:
        return
    if Path(path).suffix not in SUFFIXES:
        what = f"a plot is a file that ends in {', '.join(SUFFIXES)}, not {Path(path).name!r}"
        raise ConfigError(what, remedy="for example --plot errors.png", field="plot")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib", remedy="pip install 'infercomp[plot]'", field="plot")


def plot_of(accounts: Sequence[Account], suffix: str) -> bytes:
    """The plot that says most: of one quantised model the errors of its layers, of several quality against size."""
    quantized = [each for each in accounts if each.layer_errors]
    if len(quantized) == 1 and len(accounts) <= 2:
        return plot_layer_errors(quantized[0].layer_errors, suffix)
    return plot_quality(accounts, suffix)


def plot_layer_errors(errors: Mapping[str, float], suffix: str) -> bytes:
    """The relative error of each layer's output, layer by layer: a panel for each kind of linear."""
    kinds = kinds_of(errors)
    num_columns = min(_PANELS_A_ROW, len(kinds))
    num_rows = -(-len(kinds) // num_columns)
    figure = _figure(2.4 * num_columns + 0.6, 1.9 * num_rows + 0.5)
    panels = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False).flatten()
    for panel, (kind, points) in zip(panels, kinds.items(), strict=False):
        panel.bar(*zip(*points, strict=True), width=0.8, color="tab:blue")
        panel.set_title(kind, fontsize=_SMALL + 2)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.tick_params(labelsize=_SMALL)
        panel.grid(axis="y", alpha=0.3)
    for panel in panels[len(kinds) :]:
        panel.set_visible(False)
    figure.supxlabel("layer", fontsize=_SMALL + 2)
    figure.supylabel("relative error of the output", fontsize=_SMALL + 2)
    return _written(figure, suffix)


def kinds_of(errors: Mapping[str, float]) -> dict[str, list[tuple[int, float]]]:
    """Points of (number of the layer, error) by the layer's last name; a layer without a number is number 0."""
    kinds: dict[str, list[tuple[int, float]]] = {}
    for name, error in errors.items():
        number = _NUMBER.search(name)
        kinds.setdefault(name.rpartition(".")[2], []).append((int(number[1]) if number else 0, error))
    return {kind: sorted(points) for kind, points in kinds.items()}


def plot_quality(accounts: Sequence[Account], suffix: str) -> bytes:
    """Mean divergence against bits a weight, a point a model; the reference, which has none, is left out."""
    points = [(each.name, each.size.bits_per_weight, each.quality.mean_nats) for each in accounts]
    return plot_points([point for point in points if point[2] > 0], suffix)


def plot_points(points: Sequence[tuple[str, float, float]], suffix: str) -> bytes:
    """Points of a name, bits a weight and nats, the latter on a logarithmic axis."""
    figure = _figure(6.4, 4.2)
    axes = figure.subplots()
    for name, bits, nats in points:
        axes.plot(bits, nats, "o", color="tab:blue")
        axes.annotate(name, (bits, nats), xytext=(4, 4), textcoords="offset points", fontsize=_SMALL)
    axes.set_yscale("log")
    axes.margins(x=0.15)
    axes.grid(alpha=0.3)
    axes.set_xlabel("bits a weight, scales and zeros included (all linears but the head)")
    axes.set_ylabel("mean KL divergence to float32, nats")
    return _written(figure, suffix)


def _figure(width_inches: float, height_inches: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width_inches, height_inches), layout="constrained", dpi=_DOTS_PER_INCH)


def _written(figure: Any, suffix: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix.removeprefix("."))
    return buffer.getvalue()
