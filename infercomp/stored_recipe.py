"""The recipe of a checkpoint whose linears come in integers, and the check that none of them was left behind."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch

from .codegen.model_graph import ModelGraph, source_line
from .config import Config
from .loading.stored_linears import StoredLinear
from .passes.linear_recipes import LinearRecipe
from .passes.recipes import RECIPE_KINDS, LayerRecipes, Stored
from .passes.record import PassRecord
from .runtime.errors import ConfigError, UnsupportedError

_NUMBER = re.compile(r"\.\d+\.")


def with_stored_recipe(config: Config, linears: Mapping[str, StoredLinear], model: torch.nn.Module) -> Config:
    """``config`` with what the checkpoint is quantised as; raises ConfigError for an option that speaks against it."""
    keeps = isinstance(config.passes.recipe, Stored)
    if not linears and keeps:
        what = "the checkpoint holds no linear in integers that kernels read"
        raise ConfigError(what, field="quantization", remedy="leave it out, or name a recipe")
    if not linears:
        return config
    if config.passes.quantization is not None and not keeps:
        what = "the checkpoint is quantised already"
        raise ConfigError(what, field="quantization", remedy="leave it out, or load the unquantised checkpoint")
    if config.passes.kv_heads is not None:
        what = "heads are merged in floats, and the checkpoint is quantised already"
        raise ConfigError(what, field="kv_heads", remedy="leave it out, or load the unquantised checkpoint")
    if config.passes.sparsity is not None:
        what = "weights become sparse in floats, and the checkpoint is quantised already"
        raise ConfigError(what, field="sparsity", remedy="leave it out, or load the unquantised checkpoint")
    if config.passes.verify:
        what = "weights that come in integers have no floats to measure the passes against"
        raise ConfigError(what, field="verify", remedy="leave it out, or verify the unquantised checkpoint")
    recipes = {name: _recipe_of(linear) for name, linear in linears.items()}
    return replace(config, passes=replace(config.passes, quantization=LayerRecipes(_rules(recipes, model))))


def require_all_found(linears: Mapping[str, StoredLinear], parameters: Collection[str]) -> None:
    """Raise UnsupportedError for a linear that the captured model has no parameter of: zeros would be in its place."""
    missing = next((name for name in linears if f"{name}.weight" not in parameters), None)
    if missing is not None:
        raise UnsupportedError(
            f"the checkpoint holds {missing} in integers, and the model has no parameter of that name",
            remedy="load the unquantised checkpoint; tensors that transformers renames are not read in integers",
            field="quantization_config",
        )


def require_all_taken(model_graph: ModelGraph, records: tuple[PassRecord, ...]) -> None:
    """Raise UnsupportedError where a weight that comes in integers is still read as floats: those are zeros."""
    for name in model_graph.stored_integers:
        if name not in model_graph.weights or not model_graph.placeholder(name).users:
            continue
        user = next(iter(model_graph.placeholder(name).users))
        misses = [miss.reason for record in records for miss in record.near_misses if miss.node == user.name]
        raise UnsupportedError(
            f"no kernel computes {name} on its stored integers: {(misses or ['nothing took it'])[0]}",
            where=source_line(user),
            remedy="load the unquantised checkpoint, and do not disable quantize_linears",
            field="quantization",
        )


def _recipe_of(linear: StoredLinear) -> LinearRecipe:
    kind = RECIPE_KINDS[f"w{linear.weight_bits}a{linear.activation_bits}"]
    return kind(group_size=linear.group_size, symmetric=linear.symmetric)


def _rules(recipes: Mapping[str, LinearRecipe], model: torch.nn.Module) -> tuple[tuple[str, LinearRecipe | None], ...]:
    """One rule for layers that differ in their number alone, where all such linears of the model are alike."""
    alike: dict[str, set[LinearRecipe | None]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) or name in recipes:
            alike.setdefault(_pattern(name), set()).add(recipes.get(name))
    rules = {
        _pattern(name) if alike.get(_pattern(name)) == {recipe} else name: recipe for name, recipe in recipes.items()
    }
    return tuple(rules.items())


def _pattern(name: str) -> str:
    return _NUMBER.sub(".*.", name)
