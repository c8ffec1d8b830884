"""Templates are Triton source with holes such as ``{{epilogue}}``; filling them is all that is done with them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parent / "templates"
_HOLE = re.compile(r"\{\{(\w+)\}\}")

# What fills a hole: one expression, or lines that stand at the hole's indentation (none: the line goes).
Filling = str | tuple[str, ...]


@cache
def read_template(name: str) -> str:
    """The text of ``templates/<name>.py.txt``."""
    return (_FOLDER / f"{name}.py.txt").read_text()


def fill(template: str, holes: Mapping[str, Filling]) -> str:
    """Put texts into a template's holes; every hole must be given, and every text must have a hole."""
    wanted = set(_HOLE.findall(template))
    if wanted != set(holes):
        raise KeyError(f"holes {sorted(wanted)} were given {sorted(holes)}")
    return "".join(f"{line}\n" for row in template.splitlines() for line in _fill_row(row, holes))


def _fill_row(row: str, holes: Mapping[str, Filling]) -> list[str]:
    whole = _HOLE.fullmatch(row.strip())
    if whole and isinstance(holes[whole[1]], tuple):
        indent = row[: len(row) - len(row.lstrip())]
        return [(indent + line).rstrip() for text in holes[whole[1]] for line in text.splitlines()]
    return [_HOLE.sub(lambda hole: str(holes[hole[1]]), row)]


def lines_of(text: str) -> tuple[str, ...]:
    return tuple(text.splitlines())
