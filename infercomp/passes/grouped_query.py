"""What the option ``kv_heads`` takes: how many heads of keys and values are left, and how they are made."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass

from infercomp.runtime.config import LARGEST_COUNT, describe, require_int
from infercomp.runtime.errors import ConfigError

MERGES = ("mean", "first", "random", "aligned")


@dataclass(frozen=True)
class GroupedQuery:
    """Attention whose query heads share ``groups`` heads of keys and values (Ainslie et al. 2023); 1 is multi-query
    attention (Shazeer 2019). Raises ConfigError naming a field out of range.
    """

    groups: int
    """Heads of keys and values that each attention is left with; a divisor of those that it has."""

    merge: str = "mean"
    """"mean" of a group's weights, the "first" or a "random" head of each group, or the mean of "aligned" heads, which
    needs calibration data."""

    seed: int = 0
    """What the "random" heads are drawn by."""

    def __post_init__(self) -> None:
        require_int(self.groups, "groups", 1, LARGEST_COUNT)
        require_int(self.seed, "seed", 0, LARGEST_COUNT)
        if self.merge not in MERGES:
            what = f"merge must be one of {', '.join(MERGES)}, not {describe(self.merge)}"
            raise ConfigError(what, field="merge")

    @property
    def needs_calibration(self) -> bool:
        """Whether samples of text are needed."""
        return self.merge == "aligned"

    def to_json(self) -> str:
        """Canonical JSON, which ``grouped_query_of`` takes."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def grouped_query_of(value: str | GroupedQuery) -> GroupedQuery:
    """What a number of heads or JSON stands for. Raises ConfigError, naming the field, for anything else."""
    if isinstance(value, GroupedQuery):
        return value
    try:
        found = json.loads(value)
    except ValueError:
        found = value
    if isinstance(found, int):
        return GroupedQuery(found)
    if not isinstance(found, Mapping) or "groups" not in found:
        what = f"kv_heads must be a GroupedQuery, a number of heads, JSON or None, not {describe(value)}"
        raise ConfigError(what, remedy='for example "1" or {"groups": 2, "merge": "mean"}', field="kv_heads")
    names = [each.name for each in dataclasses.fields(GroupedQuery)]
    for name in found:
        if name not in names:
            what = f"kv_heads has no field {name!r}"
            raise ConfigError(what, remedy=f"valid: {', '.join(names)}", field=str(name))
    return GroupedQuery(**found)
