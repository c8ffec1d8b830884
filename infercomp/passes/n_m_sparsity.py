"""What the option ``sparsity`` takes: how many weights of each group are kept, and which."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from infercomp.runtime.config import LARGEST_COUNT, describe, require_int, require_number
from infercomp.runtime.errors import ConfigError

from .permutation_search import METHODS, PermutationSearch

SCORES = ("magnitude", "wanda", "sparsegpt")
LARGEST_GROUP = 16
_PATTERN = re.compile(r"(\d{1,2}):(\d{1,2})")


@dataclass(frozen=True)
class NM:
    """``n`` weights are kept of every ``m`` consecutive input channels, 1 <= n < m <= 16, and the others are zeros.

    (Some papers count the zeros.) Raises ConfigError naming a field out of range.
    """

    n: int
    m: int

    score: str = "magnitude"
    """What is kept: the largest "magnitude" |w|; with "wanda" the largest |w| ||x||, x being a channel's activations
    (Sun et al. 2023); with "sparsegpt" those whose loss costs the outputs most, and the others of a row make up for it
    (Frantar & Alistarh 2023). The last two need calibration data."""

    permute: bool | str = False
    """Whether input channels are put into the order that keeps most, those of layers that read the same input into one
    order (Pool & Yu 2021): the method of a `PermutationSearch`, or True for "regressions"."""

    num_regressions: int = 50
    """Local optima that the search leaves by random swaps: the first fifty or so gain most for their time."""

    tail: str = "refuse"
    """A layer whose input channels M does not divide: "refuse" it, or "pad" its last group with zeros that are none of
    its own."""

    layers: tuple[str, ...] = ("*",)
    """Layers that may become sparse: patterns for their names (``fnmatch``), or for the ends of these behind a dot."""

    density: float | None = None
    """Of the weights of these layers so many are left, from N / M to 1: only those layers become sparse that cost least
    when each is made sparse alone, measured on calibration data. None makes all of them sparse."""

    damp: float = 0.01
    """What SparseGPT adds to the Hessian's diagonal, as a part of its mean."""

    block_size: int = 128
    """Channels that SparseGPT takes before it brings the rest of a row up to date."""

    def __post_init__(self) -> None:
        require_int(self.m, "m", 2, LARGEST_GROUP)
        require_int(self.n, "n", 1, self.m - 1)
        if self.score not in SCORES:
            raise ConfigError(f"score must be one of {', '.join(SCORES)}, not {describe(self.score)}", field="score")
        if self.tail not in ("refuse", "pad"):
            raise ConfigError(f"tail must be refuse or pad, not {describe(self.tail)}", field="tail")
        if not isinstance(self.permute, bool) and self.permute not in METHODS:
            what = f"permute must be True, False or one of {', '.join(METHODS)}, not {describe(self.permute)}"
            raise ConfigError(what, field="permute")
        require_int(self.num_regressions, "num_regressions", 0, LARGEST_COUNT)
        if self.permute and self.tail == "pad":
            raise ConfigError("channels are put in order only where M divides them: tail must be refuse", field="tail")
        is_tuple = isinstance(self.layers, tuple) and self.layers
        if not is_tuple or not all(isinstance(each, str) and each for each in self.layers):
            what = f"layers must be a tuple of patterns, not {describe(self.layers)}"
            raise ConfigError(what, remedy='for example ("*.mlp.*", "o_proj")', field="layers")
        if self.density is not None:
            require_number(self.density, "density", "below 1 and above 0", low=0, high=1)
            if self.density < self.n / self.m:
                what = f"density {self.density} is below the {self.n / self.m:g} that {self.n}:{self.m} leaves of all"
                raise ConfigError(what, remedy="raise it, or choose another pattern", field="density")
        require_number(self.damp, "damp", "above 0", low=0)
        require_int(self.block_size, "block_size", 1, LARGEST_COUNT)

    @property
    def needs_calibration(self) -> bool:
        """Whether samples of text are needed."""
        return self.has_measured_score or self.density is not None

    @property
    def has_measured_score(self) -> bool:
        """Whether the score asks what the layers' inputs are."""
        return self.score != "magnitude"

    @property
    def search(self) -> PermutationSearch | None:
        """How the order of channels is searched, or None where they stay."""
        if not self.permute:
            return None
        method = "regressions" if self.permute is True else str(self.permute)
        return PermutationSearch(method, self.num_regressions)

    def to_json(self) -> str:
        """Canonical JSON, which ``nm_of`` takes."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def nm_of(value: str | NM) -> NM:
    """What a pattern such as "2:4" or JSON stands for. Raises ConfigError, naming the field, for anything else."""
    if isinstance(value, NM):
        return value
    pattern = _PATTERN.fullmatch(value.strip())
    if pattern:
        return NM(int(pattern[1]), int(pattern[2]))
    try:
        found = json.loads(value)
    except ValueError:
        found = value
    if not isinstance(found, Mapping) or not {"n", "m"} <= found.keys():
        what = f"sparsity must be an NM, a pattern, JSON or None, not {describe(value)}"
        raise ConfigError(what, remedy='for example "2:4" or {"n": 2, "m": 4, "score": "wanda"}', field="sparsity")
    names = [each.name for each in dataclasses.fields(NM)]
    for name in found:
        if name not in names:
            what = f"sparsity has no field {name!r}"
            raise ConfigError(what, remedy=f"valid: {', '.join(names)}", field=str(name))
    given = dict(found)
    if isinstance(given.get("layers"), list):
        given["layers"] = tuple(given["layers"])
    return NM(**given)
