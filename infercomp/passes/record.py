"""What a pass did: its matches, what only looked like one, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Site:
    """One match: ``replaced`` maps each old node's name to the name of the node now in its place."""

    index: int
    node: str
    where: str | None
    replaced: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class NearMiss:
    """A place that looked like a match, with the reason why it is none."""

    node: str
    reason: str
    where: str | None


@dataclass(frozen=True)
class LayerError:
    """‖y' - y‖ / ‖y‖ (Frobenius) of a layer's outputs, y in floats and y' rounded, on the float model's activations."""

    layer: str
    relative_error: float


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: counts, places, reasons, cost in milliseconds, measured error.

    ``layer_errors`` are measured on samples, where some were given, of the layers that the pass has rounded.
    """

    name: str
    numeric_class: str
    matches: int
    skipped: int
    sites: tuple[Site, ...]
    near_misses: tuple[NearMiss, ...]
    milliseconds: float
    max_error: float | None = None
    layer_errors: tuple[LayerError, ...] = ()
