"""How one linear is quantised: a frozen value for each scheme of integers, its fields the methods' own terms."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, NamedTuple

from infercomp.runtime.config import LARGEST_COUNT, describe, require_int, require_number
from infercomp.runtime.errors import ConfigError

from .rounding import Rounding

# What the kernels' panels take, and what group_linear's sums of a group allow, for 8 bits and for fewer.
_GROUP_STEP, _LARGEST_GROUP = 32, {8: 512, 4: 8192, 3: 8192}


class Recipe:
    """What the option ``quantization`` takes: a recipe for all linears, or recipes for named layers."""

    @property
    def rules(self) -> tuple[tuple[str, LinearRecipe | None], ...]:
        """Patterns and what becomes of the layers that fit: the first that fits counts; None leaves floats."""
        raise NotImplementedError

    @property
    def needs_calibration(self) -> bool:
        """Whether samples of text are needed."""
        return any(recipe is not None and recipe.needs_calibration for _, recipe in self.rules)

    @property
    def has_rounding(self) -> bool:
        """Whether some layers' weights may be rounded in another way than to nearest."""
        return any(recipe is not None and recipe.rounding is not None for _, recipe in self.rules)

    def recipe_of(self, layer: str) -> LinearRecipe | None:
        """What becomes of the linear of this name."""
        return next((recipe for pattern, recipe in self.rules if fits(pattern, [layer])), None)

    def as_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def to_json(self) -> str:
        """Canonical JSON, which ``recipes.recipe_from_json`` takes."""
        return json.dumps(self.as_dict(), sort_keys=True)


def fits(pattern: str, layers: Iterable[str]) -> bool:
    """Whether a pattern is for a layer that has these names."""
    return any(fnmatchcase(layer, pattern) or fnmatchcase(layer, f"*.{pattern}") for layer in layers)


@dataclass(frozen=True)
class LinearRecipe(Recipe):
    """One scheme of integers. Raises ConfigError naming a field out of range."""

    weight_bits: ClassVar[int]
    activation_bits: ClassVar[int]
    """16 says that activations stay floats, whatever their dtype."""

    group_size: int | None = None
    """Consecutive input channels that share a scale; None is all of a row."""

    symmetric: bool = True
    """Whether groups have no zero of their own."""

    rounding: Rounding | None = None
    """How weights become integers; None is to nearest. The methods need calibration data."""

    def __post_init__(self) -> None:
        if self.rounding is not None and not isinstance(self.rounding, Rounding):
            what = f"rounding must be GPTQ(), ScaleSearch() or None, not {describe(self.rounding)}"
            raise ConfigError(what, field="rounding")
        if not isinstance(self.symmetric, bool):
            raise ConfigError(f"symmetric must be True or False, not {describe(self.symmetric)}", field="symmetric")
        largest, is_row = _LARGEST_GROUP[self.weight_bits], self.group_size is None and not self.needs_group
        if not is_row and not _is_group(self.group_size, largest):
            what = f"group_size must be a multiple of {_GROUP_STEP} up to {largest}"
            raise ConfigError(f"{what}, not {describe(self.group_size)}", field="group_size")
        if is_row and not self.symmetric:
            raise ConfigError("a row has no zero of its own: symmetric must be True", field="symmetric")

    @property
    def needs_group(self) -> bool:
        return self.weight_bits < 8

    @property
    def rules(self) -> tuple[tuple[str, LinearRecipe | None], ...]:
        return (("*", self),)

    @property
    def smoothing(self) -> Smoothing | None:
        """How outliers move from activations into weights, or None where they stay."""
        return None

    @property
    def needs_calibration(self) -> bool:
        """Whether samples of text are needed."""
        return self.rounding is not None

    def bits_per_weight(self, num_channels: int) -> float:
        """Of a linear with so many input channels: codes, float16 scales and zeros of groups, a float32 scale a row."""
        if self.group_size is None:
            return self.weight_bits + 32 / num_channels
        return self.weight_bits + (16 if self.symmetric else 24) / self.group_size

    @property
    def for_head(self) -> LinearRecipe:
        """What the LM head gets in place of this recipe: 8 bits in every scheme."""
        return W8A8() if self.activation_bits == 8 else W8A16()

    def as_dict(self) -> dict[str, Any]:
        fields = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        rounding = None if self.rounding is None else self.rounding.as_dict()
        return {"recipe": type(self).__name__.lower(), **fields, "rounding": rounding}


class Smoothing(NamedTuple):
    """SmoothQuant's alpha, or "search", and the power of the mean over tokens, or None for their maximum."""

    alpha: float | str
    power: float | None


def _is_group(size: object, largest: int) -> bool:
    is_int = isinstance(size, int) and not isinstance(size, bool)
    return is_int and 0 < size <= largest and not size % _GROUP_STEP  # type: ignore[operator]


@dataclass(frozen=True)
class W8A8(LinearRecipe):
    """Weights int8 with a scale for each output channel, activations int8 with a scale for each token, which is
    found as the token is computed (ZeroQuant, Yao et al. 2022)."""

    weight_bits = 8
    activation_bits = 8

    smooth_alpha: float | str | None = None
    """How much of the activations' outliers moves into the weights, in [0, 1] (SmoothQuant, Xiao et al. 2022: 0.5), or
    "search" for what suits each layer; needs calibration data. None leaves all where they are."""

    smooth_power: float | None = 3.0
    """What stands for a channel's activations in SmoothQuant's scales: the mean over tokens of this power of their
    magnitudes, as each token has a scale of its own here; None is their maximum, as in the paper."""

    outlier_threshold: float | None = None
    """Input channels that reach this magnitude in the calibration data stay floats, in activations and in weights
    (LLM.int8(), Dettmers et al. 2022: 6.0). There each batch finds its own; here they are found once."""

    embedding_groups: int | None = None
    """So many groups of input channels, sorted by their range in the calibration data, have a scale of their own for
    each token (PEG, Bondarenko et al. 2021: 6)."""

    embedding_group_sizes: str = "even"
    """"even" groups, as in the paper: their number divides the input channels. "fitted": ends of groups
    that keep the sum of a group's size times the square of its largest range least."""

    activation_scale: str = "token"
    """"token": each has a scale, which is found as it is computed. "tensor": one for all, found on calibration data."""

    activation_percentile: float | None = None
    """With "tensor", the percentile of the magnitudes that the scale reaches, in (0, 100]: larger ones are clipped.
    None is their maximum."""

    harmful_error: float | None = None
    """Activations stay floats where 8 bits change the output of a layer that reads them by more than this part of it,
    over the calibration data (Bondarenko et al. 2021); None rounds all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        alpha = self.smooth_alpha
        if alpha is not None and alpha != "search":
            require_number(alpha, "smooth_alpha", 'in [0, 1], "search" or None', low=0, high=1, is_open=False)
        if self.smooth_power is not None:
            require_number(self.smooth_power, "smooth_power", "of at least 1, or None", low=1, is_open=False)
        if self.outlier_threshold is not None:
            require_number(self.outlier_threshold, "outlier_threshold", "above 0", low=0)
        if self.embedding_groups is not None:
            require_int(self.embedding_groups, "embedding_groups", 2, LARGEST_COUNT)
        if self.embedding_group_sizes not in ("even", "fitted"):
            what = f'embedding_group_sizes must be "even" or "fitted", not {describe(self.embedding_group_sizes)}'
            raise ConfigError(what, field="embedding_group_sizes")
        self._check_activation_scale()
        if self.harmful_error is not None:
            require_number(self.harmful_error, "harmful_error", "from 0, or None", low=0, is_open=False)
        if self.outlier_threshold is not None and self.embedding_groups is not None:
            what = "channels are split by outlier_threshold or by embedding_groups, not by both"
            raise ConfigError(what, field="embedding_groups")

    def _check_activation_scale(self) -> None:
        if self.activation_scale not in ("token", "tensor"):
            what = f'activation_scale must be "token" or "tensor", not {describe(self.activation_scale)}'
            raise ConfigError(what, field="activation_scale")
        is_static = self.activation_scale == "tensor"
        if self.activation_percentile is not None:
            require_number(self.activation_percentile, "activation_percentile", "in (0, 100] or None", low=0, high=100)
            if not is_static:
                what = 'a token\'s scale is its maximum: activation_percentile needs activation_scale="tensor"'
                raise ConfigError(what, field="activation_percentile")
        if is_static and self.smooth_alpha == "search":
            what = "the search for alpha rounds each token by a scale of its own"
            raise ConfigError(what, remedy="give smooth_alpha a number", field="smooth_alpha")
        if is_static and self.embedding_groups is not None:
            what = "embedding_groups have a scale for each token"
            raise ConfigError(what, remedy='activation_scale="token"', field="activation_scale")

    @property
    def smoothing(self) -> Smoothing | None:
        return None if self.smooth_alpha is None else Smoothing(self.smooth_alpha, self.smooth_power)

    @property
    def needs_calibration(self) -> bool:
        fields = (self.smooth_alpha, self.outlier_threshold, self.embedding_groups, self.harmful_error)
        is_measured = self.activation_scale == "tensor" or any(field is not None for field in fields)
        return super().needs_calibration or is_measured


@dataclass(frozen=True)
class W8A16(LinearRecipe):
    """Weights int8 with a scale for each output channel, or for each group; activations stay floats."""

    weight_bits = 8
    activation_bits = 16


@dataclass(frozen=True)
class W4A8(LinearRecipe):
    """Weights of 4 bits with a scale, and unless ``symmetric`` a zero, for each group; activations as in W8A8."""

    weight_bits = 4
    activation_bits = 8
    group_size: int | None = 32
    symmetric: bool = False


@dataclass(frozen=True)
class W4A16(LinearRecipe):
    """Weights as in W4A8; activations stay floats."""

    weight_bits = 4
    activation_bits = 16
    group_size: int | None = 32
    symmetric: bool = False


@dataclass(frozen=True)
class W3A16(LinearRecipe):
    """Weights of 3 bits with a scale, and unless ``symmetric`` a zero, for each group; activations stay floats."""

    weight_bits = 3
    activation_bits = 16
    group_size: int | None = 64
    symmetric: bool = False


@dataclass(frozen=True)
class GOBO(LinearRecipe):
    """Weights are one of 2^bits centroids of their layer, but for outliers, which are kept (GOBO, Zadeh et al. 2020).

    Activations stay floats, and no data is needed. Codes are stored in 4 bits, whatever ``bits`` is.
    """

    weight_bits = 4
    activation_bits = 16

    bits: int = 3
    """A layer has 2^bits centroids; from 2 to 4."""

    outlier_log_density: float = -4.0
    """A weight is an outlier where the logarithm of the density of the Gaussian fitted to its layer is below it."""

    fit: str = "l1"
    """What centroids are moved for: until the "l1" distances fall no further, as in the paper, or until no weight
    changes its centroid ("squares", K-means)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int(self.bits, "bits", 2, 4)
        if self.fit not in ("l1", "squares"):
            raise ConfigError(f'fit must be "l1" or "squares", not {describe(self.fit)}', field="fit")
        require_number(self.outlier_log_density, "outlier_log_density", "that is finite", low=-math.inf)
        if self.group_size is not None:
            raise ConfigError("centroids are those of a layer: group_size must be None", field="group_size")
        if self.rounding is not None:
            raise ConfigError("GOBO has a rounding of its own: rounding must be None", field="rounding")
        if not self.symmetric:
            raise ConfigError("centroids have no zeros: symmetric must be True", field="symmetric")

    @property
    def needs_group(self) -> bool:
        return False

    def bits_per_weight(self, num_channels: int) -> float:
        """Codes, a table for 16 rows and a count a row; outliers, which only the weights know, are left out."""
        return 4 + 32 / num_channels + 32 * 2**self.bits / (16 * num_channels)
