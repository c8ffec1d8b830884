"""Edited kernels loaded back: C++ texts of a folder in place of the generated ones of the same names."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path

from ..runtime.errors import ConfigError

FIELD = "kernel_overrides"


def read_overrides(folder: str | None) -> dict[str, str]:
    """The texts ``<kernel>.cpp`` in a folder by kernel; raises ConfigError if it cannot be read."""
    if folder is None:
        return {}
    try:
        return {path.stem: path.read_text() for path in sorted(Path(folder).iterdir()) if path.suffix == ".cpp"}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{FIELD} cannot be read: {error}", where=folder, remedy="name a folder of .cpp files", field=FIELD
        ) from error


def check_overrides(overrides: Mapping[str, str], kernels: Collection[str], folder: str | None) -> None:
    """Raise ConfigError for a text that no kernel of the program is named after."""
    unknown = sorted(set(overrides) - set(kernels))
    if unknown:
        raise ConfigError(
            f"{FIELD}: no kernel is called {', '.join(unknown)}",
            where=folder,
            remedy="keep only files of kernels that this model has (infercomp dump writes them), or dump again",
            field=FIELD,
        )


def overrides_digest(folder: str | None) -> str | None:
    """What the folder says, whatever it is called."""
    texts = read_overrides(folder)
    return hashlib.sha256(repr(sorted(texts.items())).encode()).hexdigest() if folder is not None else None
