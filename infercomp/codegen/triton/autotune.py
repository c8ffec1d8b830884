"""Which candidate is fastest, measured once per chip and shape class and kept in a JSON file.

The measuring function is given from outside (it launches kernels; a test gives numbers), so nothing here
needs a device. Candidates, order and ties are deterministic.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from .candidates import TUNED_FIELDS, Tuning, candidates, tuning_of, with_tuning
from .chip import Chip
from .errors import KernelCompileError, KernelSpecError
from .specs.base import KernelSpec

SpecType = TypeVar("SpecType", bound=KernelSpec)
# Seconds of one launch; raises KernelCompileError, or returns infinity, for a kernel not to be used.
Measure = Callable[[KernelSpec], float]
FORMAT_VERSION = 1


def shape_class(spec: KernelSpec, num_rows: int, num_keys: int = 0) -> str:
    """A readable key of all that makes candidates comparable: the spec without what is tuned, and nominal sizes."""
    fixed = {name: value for name, value in vars(spec).items() if name not in (*TUNED_FIELDS, "origin")}
    digest = hashlib.sha256(repr(sorted(fixed.items())).encode()).hexdigest()[:16]
    return f"{type(spec).__name__}_{num_rows}x{num_keys}_{digest}"


@dataclass
class Autotuner:
    """Chooses among candidates; without a measuring function the cost model's first choice is taken, not kept."""

    path: Path
    chip: Chip
    measure: Measure | None = None
    _known: dict[str, Tuning] = field(init=False)

    def __post_init__(self) -> None:
        self._known = _read(self.path).get(self.chip.name, {})

    def choose(self, spec: SpecType, num_rows: int, num_keys: int = 0) -> SpecType:
        """The spec with the best known tiles; measured now if it never was."""
        key = shape_class(spec, num_rows, num_keys)
        if key in self._known:
            try:
                return with_tuning(spec, self._known[key])
            except (KernelSpecError, TypeError):
                del self._known[key]  # written by a version with other fields or other limits
        forms = candidates(spec, self.chip, num_rows, num_keys)
        if self.measure is None:
            return forms[0]
        seconds = [_measured(self.measure, form) for form in forms]
        best = min(range(len(forms)), key=seconds.__getitem__)
        if math.isinf(seconds[best]):
            raise KernelCompileError(
                f"none of {len(forms)} candidates of {spec.name} can be used",
                target=self.chip.target,
                remedy="compile the spec alone to see why",
            )
        self._known[key] = tuning_of(forms[best])
        _write(self.path, self.chip.name, key, self._known[key])
        return forms[best]


def _measured(measure: Measure, spec: KernelSpec) -> float:
    try:
        return measure(spec)
    except KernelCompileError:
        return math.inf


def _read(path: Path) -> dict[str, dict[str, Tuning]]:
    """Chips, shape classes, tunings. A file that cannot be used is measured anew: it is only a cache."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return {}
    is_ours = isinstance(content, dict) and content.get("version") == FORMAT_VERSION
    return content["chips"] if is_ours else {}


def _write(path: Path, chip_name: str, key: str, tuning: Tuning) -> None:
    """Add one entry to what is in the file now, and replace the file in one step, so readers see it whole."""
    chips = _read(path)
    chips.setdefault(chip_name, {})[key] = tuning
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
        json.dump({"version": FORMAT_VERSION, "chips": chips}, file, indent=1, sort_keys=True)
    os.replace(file.name, path)
