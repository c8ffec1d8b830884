"""The text that ``LLM`` is given to learn from and to measure on."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Texts:
    """What ``LLM`` is given of text, as it is given: ``calibration``, where what it shows is kept, ``evaluation``."""

    calibration: Any = None
    calibration_folder: str | os.PathLike[str] | None = None
    evaluation: Any = None

    def given(self) -> tuple[str, ...]:
        """The names of those that there are."""
        return tuple(each.name for each in fields(self) if getattr(self, each.name) is not None)


NO_TEXTS = Texts()
