"""Recipes: how linears are quantised, as typed values that are JSON and back; a name is short for one.

    W4A16(group_size=64, symmetric=True)                        one recipe for every linear
    LayerRecipes((("*.down_proj", W8A16()), ("*", W4A16())))    for each linear that of the first pattern it fits

A pattern is for the layer's name in the model (``fnmatch``), or for the end of it behind a dot.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, NamedTuple

from infercomp.runtime.config import LARGEST_COUNT, describe, require_int, require_number
from infercomp.runtime.errors import ConfigError

from .rounding import GPTQ, Rounding, ScaleSearch, rounding_of

# What the kernels' panels take, and what int4_linear's sums of a group allow.
_GROUP_STEP, _LARGEST_GROUP = 32, 8192


class Recipe:
    """What the option ``quantization`` takes: a recipe for all linears, or recipes for named layers."""

    @property
    def rules(self) -> tuple[tuple[str, LinearRecipe | None], ...]:
        """Patterns and what becomes of the layers that fit: the first that fits counts; None leaves floats."""
        raise NotImplementedError

    def recipe_of(self, layer: str) -> LinearRecipe | None:
        """What becomes of the linear of this name."""
        return next((recipe for pattern, recipe in self.rules if fits(pattern, [layer])), None)

    def as_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def to_json(self) -> str:
        """Canonical JSON, which ``from_json`` takes."""
        return json.dumps(self.as_dict(), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Recipe:
        """The recipe of ``to_json``. Raises ConfigError, naming the field, for anything else."""
        try:
            value = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"quantization is no JSON: {error}", field="quantization") from None
        return _layer_recipes(value) if _kind_of(value) == LayerRecipes.kind else _linear_recipe(value)


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
        if self.weight_bits == 8 and not self.symmetric:
            raise ConfigError("8-bit weights have no zeros: symmetric must be True", field="symmetric")
        if self.weight_bits == 8 and self.group_size is not None:
            what = f"8-bit weights have one scale a row: group_size must be None, not {describe(self.group_size)}"
            raise ConfigError(what, field="group_size")
        if self.weight_bits == 4 and not _is_group(self.group_size):
            what = f"group_size must be a multiple of {_GROUP_STEP} up to {_LARGEST_GROUP}"
            raise ConfigError(f"{what}, not {describe(self.group_size)}", field="group_size")

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


def _is_group(size: object) -> bool:
    is_int = isinstance(size, int) and not isinstance(size, bool)
    return is_int and 0 < size <= _LARGEST_GROUP and not size % _GROUP_STEP  # type: ignore[operator]


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
    each token (PEG, Bondarenko et al. 2021: 6). Divides the input channels."""

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
        if self.harmful_error is not None:
            require_number(self.harmful_error, "harmful_error", "from 0, or None", low=0, is_open=False)
        if self.outlier_threshold is not None and self.embedding_groups is not None:
            what = "channels are split by outlier_threshold or by embedding_groups, not by both"
            raise ConfigError(what, field="embedding_groups")

    @property
    def smoothing(self) -> Smoothing | None:
        return None if self.smooth_alpha is None else Smoothing(self.smooth_alpha, self.smooth_power)

    @property
    def needs_calibration(self) -> bool:
        fields = (self.smooth_alpha, self.outlier_threshold, self.embedding_groups, self.harmful_error)
        return super().needs_calibration or any(field is not None for field in fields)


@dataclass(frozen=True)
class W8A16(LinearRecipe):
    """Weights int8 with a scale for each output channel; activations stay floats."""

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
class LayerRecipes(Recipe):
    """Recipes for named sets of layers, as pairs of a pattern and a recipe, or None for layers that stay floats.

    A layer gets the recipe of the first pattern that fits; one that none fits stays in floats. Raises ConfigError
    for pairs of another form, and where the model is known for a pattern that no linear fits.
    """

    kind: ClassVar[str] = "layers"

    layers: tuple[tuple[str, LinearRecipe | None], ...]

    def __post_init__(self) -> None:
        is_tuple = isinstance(self.layers, tuple) and self.layers
        if not is_tuple or not all(_is_rule(rule) for rule in self.layers):
            what = "layers must be a tuple of pairs of a pattern and a recipe or None"
            raise ConfigError(what, remedy='for example (("lm_head", None), ("*", W4A16()))', field="layers")

    @property
    def rules(self) -> tuple[tuple[str, LinearRecipe | None], ...]:
        return self.layers

    def as_dict(self) -> dict[str, Any]:
        layers = [[pattern, None if recipe is None else recipe.as_dict()] for pattern, recipe in self.layers]
        return {"recipe": self.kind, "layers": layers}


def _is_rule(rule: object) -> bool:
    if not isinstance(rule, tuple) or len(rule) != 2:
        return False
    pattern, recipe = rule
    return isinstance(pattern, str) and pattern != "" and (recipe is None or isinstance(recipe, LinearRecipe))


def fits(pattern: str, layers: Iterable[str]) -> bool:
    """Whether a pattern is for a layer that has these names."""
    return any(fnmatchcase(layer, pattern) or fnmatchcase(layer, f"*.{pattern}") for layer in layers)


RECIPE_KINDS: dict[str, type[LinearRecipe]] = {each.__name__.lower(): each for each in (W8A8, W8A16, W4A8, W4A16)}


def _kind_of(value: object) -> object:
    return value.get("recipe") if isinstance(value, Mapping) else None


def _linear_recipe(value: object) -> LinearRecipe:
    kind = _kind_of(value)
    if not isinstance(value, Mapping) or not isinstance(kind, str) or kind not in RECIPE_KINDS:
        valid = f"valid: {', '.join([*RECIPE_KINDS, LayerRecipes.kind])}"
        what = f'a recipe is an object whose "recipe" names one, not {describe(kind if kind else value)}'
        raise ConfigError(what, remedy=valid, field="recipe")
    made = RECIPE_KINDS[kind]
    names = [each.name for each in dataclasses.fields(made)]
    for name in value:
        if name not in ("recipe", *names):
            raise ConfigError(f"{kind} has no field {name!r}", remedy=f"valid: {', '.join(names)}", field=str(name))
    given = {name: value[name] for name in names if name in value}
    return made(**{**given, "rounding": rounding_of(value.get("rounding"))})


def _layer_recipes(value: Mapping[str, Any]) -> LayerRecipes:
    unknown = sorted(value.keys() - {"recipe", "layers"})
    if unknown:
        raise ConfigError(f"{LayerRecipes.kind} has no field {unknown[0]!r}", remedy="valid: layers", field=unknown[0])
    pairs = value.get("layers")
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ConfigError("layers must be a list of pairs of a pattern and a recipe or null", field="layers")
    return LayerRecipes(tuple((name, None if one is None else _linear_recipe(one)) for name, one in pairs))


# What a name stands for: `w4a8-g32-sym` is `W4A8(group_size=32, symmetric=True)`.
RECIPES: dict[str, LinearRecipe] = {
    "w8a8": W8A8(),
    "w8a8-smoothquant": W8A8(smooth_alpha=0.5),
    "w8a8-smoothquant-search": W8A8(smooth_alpha="search"),
    "llm-int8": W8A8(outlier_threshold=6.0),
    "peg": W8A8(embedding_groups=6),
    "w8a16": W8A16(),
    "w8a16-search": W8A16(rounding=ScaleSearch(num_candidates=64, smallest=0.75)),
    "w4a8": W4A8(),
    "w4a16": W4A16(),
    **{
        f"{name}-g{group_size}{suffix}": made(group_size, symmetric)
        for name, made in (("w4a8", W4A8), ("w4a16", W4A16))
        for group_size in (32, 64, 128)
        for suffix, symmetric in (("", False), ("-sym", True))
    },
    "w4a16-gptq": W4A16(128, True, GPTQ()),
    **{f"w4a16-g{group_size}-gptq": W4A16(group_size, True, GPTQ()) for group_size in (32, 64)},
}
