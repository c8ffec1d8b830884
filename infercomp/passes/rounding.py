"""How weights are rounded to integers, where not each to the nearest: part of a recipe, and JSON as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from infercomp.runtime.config import LARGEST_COUNT, describe, require_int, require_number
from infercomp.runtime.errors import ConfigError


@dataclass(frozen=True)
class Rounding:
    """A method that sees what a linear's inputs are like, in samples of text. Fields out of range: ConfigError."""

    kind: ClassVar[str]

    def as_dict(self) -> dict[str, Any]:
        return {"rounding": self.kind, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class ScaleSearch(Rounding):
    """Each weight goes to the nearest code of the grid, of several, that changes the linear's output least.

    Grids end below the largest weight, by steps down to ``smallest``; the error is that of a group's part of the
    outputs over the calibration samples, which the group's block of GPTQ's Hessian gives.
    """

    kind = "scale-search"

    num_candidates: int = 32
    """Grids tried for each scale."""

    smallest: float = 0.5
    """The end of the narrowest grid, as a part of the largest weight; in (0, 1]."""

    def __post_init__(self) -> None:
        require_int(self.num_candidates, "num_candidates", 1, LARGEST_COUNT)
        require_number(self.smallest, "smallest", "in (0, 1]", low=0, high=1)


@dataclass(frozen=True)
class GPTQ(ScaleSearch):
    """Input channels are rounded one by one, and those not yet rounded make up for the error (Frantar et al. 2022).

    H = 2 X Xᵀ / tokens over the calibration samples, its diagonal raised by ``damp`` times its mean. Grids are
    ScaleSearch's, and stay those of the weights as they came, so that groups are neighbours in any order.
    """

    kind = "gptq"

    num_candidates: int = 12
    smallest: float = 0.6

    damp: float = 0.01
    """What is added to H's diagonal, as a part of its mean; above 0."""

    act_order: bool = True
    """Whether the channels of the largest activations are rounded first."""

    block_size: int = 128
    """Channels that are rounded before the rest of the row makes up for their errors; changes speed alone."""

    true_sequential: bool = True
    """Whether a linear's inputs are those that the linears before it make once they are rounded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self.damp, "damp", "above 0", low=0)
        require_int(self.block_size, "block_size", 1, LARGEST_COUNT)
        for name in ("act_order", "true_sequential"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ConfigError(f"{name} must be True or False, not {describe(value)}", field=name)


_KINDS: dict[str, type[Rounding]] = {each.kind: each for each in (ScaleSearch, GPTQ)}


def rounding_of(value: object) -> Rounding | None:
    """The rounding that JSON stands for. Raises ConfigError, naming the field, for anything else."""
    if value is None:
        return None
    kind = value.get("rounding") if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or not isinstance(kind, str) or kind not in _KINDS:
        what = f'a rounding is an object whose "rounding" names one, not {describe(kind if kind else value)}'
        raise ConfigError(what, remedy=f"valid: {', '.join(_KINDS)}", field="rounding")
    made = _KINDS[kind]
    names = [each.name for each in dataclasses.fields(made)]
    for name in value:
        if name not in ("rounding", *names):
            raise ConfigError(f"{kind} has no field {name!r}", remedy=f"valid: {', '.join(names)}", field=str(name))
    return made(**{name: value[name] for name in names if name in value})
