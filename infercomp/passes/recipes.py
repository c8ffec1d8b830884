"""Recipes: how linears are quantised, as typed values that are JSON and back; a name is short for one.

    W4A16(group_size=64, symmetric=True)                        one recipe for every linear
    LayerRecipes((("*.down_proj", W8A16()), ("*", W4A16())))    for each linear that of the first pattern it fits

A pattern is for the layer's name in the model (``fnmatch``), or for the end of it behind a dot.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from infercomp.runtime.config import LARGEST_COUNT, describe, require_int, require_number
from infercomp.runtime.errors import ConfigError

from .linear_recipes import GOBO, W3A16, W4A8, W4A16, W8A8, W8A16, LinearRecipe, Recipe
from .rounding import GPTQ, ScaleSearch, rounding_of


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


@dataclass(frozen=True)
class HAWQ(Recipe):
    """Each layer gets one of ``choices``, by how much the loss bends in its weights, within a budget (HAWQ, Dong et al.
    2019; HAWQ-V2, Dong et al. 2020; Q-BERT, Shen et al. 2020); needs calibration data.

    The LM head is outside of it, as in every recipe. Raises ConfigError naming a field out of range.
    """

    kind: ClassVar[str] = "hawq"

    bits_per_weight: float = 6.0
    """What the linears may take on the average, scales and zeros included."""

    choices: tuple[LinearRecipe, ...] = (W8A16(), W4A16(64, True))
    """Recipes to choose from, the one that layers have without a choice first."""

    sensitivity: str = "trace"
    """"trace" of the Hessian, or its largest "eigenvalue" in each block, by a power iteration, far slower."""

    num_probes: int = 4
    """Random directions for the trace, or steps of the power iteration."""

    num_samples: int = 4
    num_tokens: int = 128
    """Samples of the calibration data that the Hessian is taken over, and the tokens of each that are."""

    def __post_init__(self) -> None:
        require_number(self.bits_per_weight, "bits_per_weight", "above 0", low=0)
        is_tuple = isinstance(self.choices, tuple) and len(self.choices) > 1
        if not is_tuple or not all(isinstance(choice, LinearRecipe) for choice in self.choices):
            raise ConfigError("choices must be a tuple of two recipes or more", field="choices")
        if any(choice.needs_calibration and choice.rounding is None for choice in self.choices):
            what = "choices are recipes of bits: smoothing and split channels come before any choice is made"
            raise ConfigError(what, field="choices")
        if self.sensitivity not in ("trace", "eigenvalue"):
            what = f'sensitivity must be "trace" or "eigenvalue", not {describe(self.sensitivity)}'
            raise ConfigError(what, field="sensitivity")
        for name, low in (("num_probes", 1), ("num_samples", 1), ("num_tokens", 2)):
            require_int(getattr(self, name), name, low, LARGEST_COUNT)

    @property
    def rules(self) -> tuple[tuple[str, LinearRecipe | None], ...]:
        return (("*", self.choices[0]),)

    @property
    def needs_calibration(self) -> bool:
        return True

    @property
    def has_rounding(self) -> bool:
        return any(choice.rounding is not None for choice in self.choices)

    def as_dict(self) -> dict[str, Any]:
        fields = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        return {"recipe": self.kind, **fields, "choices": [choice.as_dict() for choice in self.choices]}


@dataclass(frozen=True)
class Stored(Recipe):
    """The linears that a GGUF file holds in integers stay so (Q8_0, Q4_0 and Q4_1); others stay floats.

    Other checkpoints in integers need no recipe, as nothing could widen them. It speaks of a file that ``LLM`` loads:
    there recipes of the layers take its place, and anywhere else it raises ConfigError.
    """

    kind: ClassVar[str] = "stored"

    @property
    def rules(self) -> tuple[tuple[str, LinearRecipe | None], ...]:
        what = "stored says to keep what a file holds in integers, and the model comes from no file of LLM's"
        raise ConfigError(what, remedy="give LLM the .gguf file, or another recipe", field="quantization")

    def as_dict(self) -> dict[str, Any]:
        return {"recipe": self.kind}


def _is_rule(rule: object) -> bool:
    if not isinstance(rule, tuple) or len(rule) != 2:
        return False
    pattern, recipe = rule
    return isinstance(pattern, str) and pattern != "" and (recipe is None or isinstance(recipe, LinearRecipe))


RECIPE_KINDS: dict[str, type[LinearRecipe]] = {
    each.__name__.lower(): each for each in (W8A8, W8A16, W4A8, W4A16, W3A16, GOBO)
}


def recipe_from_json(text: str) -> Recipe:
    """The recipe of ``Recipe.to_json``. Raises ConfigError, naming the field, for anything else."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"quantization is no JSON: {error}", field="quantization") from None
    readers = {LayerRecipes.kind: _layer_recipes, HAWQ.kind: _hawq, Stored.kind: _stored}
    return readers.get(str(_kind_of(value)), _linear_recipe)(value)


def _kind_of(value: object) -> object:
    return value.get("recipe") if isinstance(value, Mapping) else None


def _linear_recipe(value: object) -> LinearRecipe:
    kind = _kind_of(value)
    if not isinstance(value, Mapping) or not isinstance(kind, str) or kind not in RECIPE_KINDS:
        valid = f"valid: {', '.join([*RECIPE_KINDS, LayerRecipes.kind, HAWQ.kind, Stored.kind])}"
        what = f'a recipe is an object whose "recipe" names one, not {describe(kind if kind else value)}'
        raise ConfigError(what, remedy=valid, field="recipe")
    made = RECIPE_KINDS[kind]
    names = [each.name for each in dataclasses.fields(made)]
    _refuse_unknown(kind, value, names)
    given = {name: value[name] for name in names if name in value}
    return made(**{**given, "rounding": rounding_of(value.get("rounding"))})


def _stored(value: Mapping[str, Any]) -> Stored:
    _refuse_unknown(Stored.kind, value, [])
    return Stored()


def _hawq(value: Mapping[str, Any]) -> HAWQ:
    names = [each.name for each in dataclasses.fields(HAWQ)]
    _refuse_unknown(HAWQ.kind, value, names)
    given = {name: value[name] for name in names if name in value}
    if "choices" in given:
        if not isinstance(given["choices"], list):
            raise ConfigError("choices must be a list of recipes", field="choices")
        given["choices"] = tuple(map(_linear_recipe, given["choices"]))
    return HAWQ(**given)


def _refuse_unknown(kind: str, value: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in value:
        if name not in ("recipe", *names):
            raise ConfigError(f"{kind} has no field {name!r}", remedy=f"valid: {', '.join(names)}", field=str(name))


def _layer_recipes(value: Mapping[str, Any]) -> LayerRecipes:
    _refuse_unknown(LayerRecipes.kind, value, ["layers"])
    pairs = value.get("layers")
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ConfigError("layers must be a list of pairs of a pattern and a recipe or null", field="layers")
    return LayerRecipes(tuple((name, None if one is None else _linear_recipe(one)) for name, one in pairs))


# What a name stands for: `w4a8-g32-sym` is `W4A8(group_size=32, symmetric=True)`.
RECIPES: dict[str, Recipe] = {
    "w8a8": W8A8(),
    # Token-wise activations and group-wise weights (ZeroQuant, Yao et al. 2022), a row of the weight being a group.
    "zeroquant": W8A8(),
    "w8a8-smoothquant": W8A8(smooth_alpha=0.5),
    "w8a8-smoothquant-search": W8A8(smooth_alpha="search"),
    "w8a8-static": W8A8(activation_scale="tensor"),
    # The paper's own setting, its scales by maxima.
    "w8a8-static-smoothquant": W8A8(smooth_alpha=0.5, smooth_power=None, activation_scale="tensor"),
    "llm-int8": W8A8(outlier_threshold=6.0),
    "peg": W8A8(embedding_groups=6, embedding_group_sizes="fitted"),
    "peg-even": W8A8(embedding_groups=6),
    "hawq": HAWQ(),
    "qbert": HAWQ(choices=(W8A8(), W4A8(64, True)), sensitivity="eigenvalue"),
    "hawq-gptq": HAWQ(bits_per_weight=5.5, choices=(W8A16(), W4A16(32, True, GPTQ()))),
    "gobo": GOBO(),
    "gobo-squares": GOBO(fit="squares"),
    "w8a16": W8A16(),
    "w8a16-search": W8A16(rounding=ScaleSearch(num_candidates=64, smallest=0.75)),
    "w8a16-g32-sym": W8A16(32),
    "w4a8": W4A8(),
    "w4a16": W4A16(),
    "w3a16": W3A16(),
    **{
        f"{name}-g{group_size}{suffix}": made(group_size, symmetric)
        for name, made in (("w4a8", W4A8), ("w4a16", W4A16), ("w3a16", W3A16))
        for group_size in (32, 64, 128)
        for suffix, symmetric in (("", False), ("-sym", True))
    },
    **{
        f"{name}{suffix}-gptq": made(group_size, True, GPTQ())
        for name, made in (("w4a16", W4A16), ("w3a16", W3A16))
        for group_size, suffix in ((128, ""), (32, "-g32"), (64, "-g64"))
    },
    "stored": Stored(),
}
