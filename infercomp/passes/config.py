"""Options of the pass pipeline: which passes and matches to leave out, where to stop, whether to measure.

`disable` and `limit` exist to find the pass behind a wrong number: switch off one pass, or one match of
one pass, or apply only the first so many matches (as LLVM's opt-bisect-limit does) and halve.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from infercomp.runtime.config import LARGEST_COUNT, describe, require_int
from infercomp.runtime.errors import ConfigError

# A match is looked up by its text, so an index has one spelling only: no leading zeros.
_DISABLE_ENTRY = re.compile(r"[a-z][a-z0-9_]*(#(0|[1-9][0-9]*))?")


@dataclass(frozen=True)
class PassConfig:
    """What the pipeline may do; it knows no pass names, so `check_pass_names` is for who does."""

    disable: tuple[str, ...] = ()
    """Passes left out whole (`"fuse_mlp"`), or one match of a pass by its index (`"fuse_mlp#12"`)."""

    limit: int | None = None
    """At most so many matches are applied over the whole pipeline; None means all."""

    verify: bool = False
    """Whether each pass is measured against its numeric class on real inputs."""

    def __post_init__(self) -> None:
        _check_disable(self.disable)
        if self.limit is not None:
            require_int(self.limit, "limit", 0, LARGEST_COUNT)
        if not isinstance(self.verify, bool):
            raise ConfigError(f"verify must be True or False, not {describe(self.verify)}", field="verify")


def check_pass_names(config: PassConfig, known: Sequence[str]) -> None:
    """Refuse a `disable` entry that names no known pass: it would silently switch off nothing."""
    for entry in config.disable:
        name = entry.partition("#")[0]
        if name not in known:
            raise ConfigError(
                f"disable names no pass: {name!r}",
                remedy=f"did you mean {nearest_name(name, known)!r}? valid: {', '.join(known)}",
                field="disable",
            )


def nearest_name(name: str, known: Iterable[str]) -> str:
    """The known name most like `name`, however unlike it is; upper and lower case are the same to it."""
    by_lowered = {each.lower(): each for each in known}
    return by_lowered[difflib.get_close_matches(name.lower(), by_lowered, n=1, cutoff=0.0)[0]]


def _check_disable(disable: object) -> None:
    if not isinstance(disable, tuple):
        raise ConfigError(f"disable must be a tuple of strings, not {describe(disable)}", field="disable")
    for entry in disable:
        if not isinstance(entry, str) or not _DISABLE_ENTRY.fullmatch(entry):
            raise ConfigError(
                f"disable has an entry that cannot name a pass: {describe(entry)}",
                remedy='write "pass_name" or "pass_name#match_index", for example "recognize_attention#12"',
                field="disable",
            )
