"""Recipes: what their fields may be, what their names and JSON stand for, and which layers a pattern is for."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import infercomp
from infercomp.config import Config, parse_options
from infercomp.passes.config import PassConfig
from infercomp.passes.linear_recipes import GOBO, W3A16, W4A8, W4A16, W8A8, W8A16, Recipe, fits
from infercomp.passes.recipes import HAWQ, RECIPES, LayerRecipes, Stored, recipe_from_json
from infercomp.passes.rounding import GPTQ, ScaleSearch
from infercomp.runtime.errors import ConfigError

groups = st.integers(1, 256).map(lambda count: 32 * count)
sizes = st.integers(1, 999)
shares = st.floats(0, 1, exclude_min=True)
searches = st.builds(ScaleSearch, st.integers(1, 99), shares)
gptqs = st.builds(
    GPTQ, st.integers(1, 99), shares, st.floats(1e-6, 10), st.booleans(), st.integers(1, 999), st.booleans()
)
roundings = st.none() | searches | gptqs
linear_recipes = st.one_of(
    st.builds(
        W8A8,
        rounding=roundings,
        smooth_alpha=st.none() | st.just("search") | st.floats(0, 1),
        smooth_power=st.none() | st.floats(1, 9),
    ),
    st.builds(W8A8, rounding=roundings, outlier_threshold=st.floats(0, 9, exclude_min=True)),
    st.builds(W8A8, harmful_error=st.floats(0, 1)),
    st.builds(
        W8A8,
        rounding=roundings,
        smooth_alpha=st.none() | st.floats(0, 1),
        activation_scale=st.just("tensor"),
        activation_percentile=st.none() | st.floats(0, 100, exclude_min=True),
    ),
    st.builds(
        W8A8,
        rounding=roundings,
        embedding_groups=sizes.filter(lambda count: count > 1),
        embedding_group_sizes=st.sampled_from(("even", "fitted")),
    ),
    st.builds(W8A16, rounding=roundings),
    st.builds(W4A8, groups, st.booleans(), roundings),
    st.builds(W4A16, groups, st.booleans(), roundings),
    st.builds(
        GOBO, bits=st.integers(2, 4), outlier_log_density=st.floats(-9, 9), fit=st.sampled_from(("l1", "squares"))
    ),
)
rules = st.tuples(st.text(min_size=1), st.none() | linear_recipes)
weight_only = st.builds(W8A16, rounding=roundings) | st.builds(W4A16, groups, st.booleans())
choices = st.lists(weight_only, min_size=2, max_size=3).map(tuple)
kinds = st.sampled_from(("trace", "eigenvalue"))
hawqs = st.builds(HAWQ, st.floats(1, 9), choices, kinds, sizes, sizes, st.integers(2, 99))
recipes = (
    linear_recipes
    | hawqs
    | st.just(Stored())
    | st.builds(LayerRecipes, st.lists(rules, min_size=1, max_size=4).map(tuple))
)


@given(recipes)
def test_json_and_back(recipe: Recipe) -> None:
    text = recipe.to_json()
    assert recipe_from_json(text) == recipe
    config = parse_options({}, {"INFERCOMP_QUANTIZATION": text})
    assert config.passes.recipe == recipe
    assert config.fingerprint() == Config(passes=PassConfig(quantization=recipe)).fingerprint()


@given(recipes, recipes)
def test_different_recipes_have_different_json_and_fingerprints(one: Recipe, other: Recipe) -> None:
    assert (one.to_json() == other.to_json()) == (one == other)
    fingerprints = [parse_options({"quantization": each}, {}).fingerprint() for each in (one, other)]
    assert (fingerprints[0] == fingerprints[1]) == (one == other)


def test_json_may_leave_out_what_has_a_default() -> None:
    assert recipe_from_json('{"recipe": "w4a16", "group_size": 64}') == W4A16(64, False)


@pytest.mark.parametrize("name", RECIPES)
def test_a_name_is_short_for_a_recipe(name: str) -> None:
    recipe = PassConfig(quantization=name).recipe
    assert recipe == PassConfig(quantization=RECIPES[name]).recipe == RECIPES[name]
    methods = {
        "stored": Stored(),
        "zeroquant": W8A8(),
        "w8a8-smoothquant": W8A8(smooth_alpha=0.5),
        "w8a8-smoothquant-search": W8A8(smooth_alpha="search"),
        "w8a8-static": W8A8(activation_scale="tensor"),
        "w8a8-static-smoothquant": W8A8(smooth_alpha=0.5, smooth_power=None, activation_scale="tensor"),
        "hawq": HAWQ(6.0, (W8A16(), W4A16(64, True)), "trace"),
        "qbert": HAWQ(6.0, (W8A8(), W4A8(64, True)), "eigenvalue"),
        "hawq-gptq": HAWQ(5.5, (W8A16(), W4A16(32, True, GPTQ())), "trace"),
        "llm-int8": W8A8(outlier_threshold=6.0),
        "gobo": GOBO(bits=3, outlier_log_density=-4.0),
        "gobo-squares": GOBO(bits=3, fit="squares"),
        "peg": W8A8(embedding_groups=6, embedding_group_sizes="fitted"),
        "peg-even": W8A8(embedding_groups=6),
        "w8a16-search": W8A16(rounding=ScaleSearch(64, 0.75)),
        "w4a16-gptq": W4A16(128, True, GPTQ()),
        "w4a16-g32-gptq": W4A16(32, True, GPTQ()),
        "w4a16-g64-gptq": W4A16(64, True, GPTQ()),
        "w3a16-gptq": W3A16(128, True, GPTQ()),
        "w3a16-g32-gptq": W3A16(32, True, GPTQ()),
        "w3a16-g64-gptq": W3A16(64, True, GPTQ()),
    }
    if name in methods:
        assert recipe == methods[name]
        return
    given_group = f"-g{RECIPES[name].group_size}" if "-g" in name else ""
    suffix = "-sym" if given_group and RECIPES[name].symmetric else ""
    assert name == f"w{RECIPES[name].weight_bits}a{RECIPES[name].activation_bits}{given_group}{suffix}"
    fingerprints = {parse_options({"quantization": each}, {}).fingerprint() for each in (name, RECIPES[name])}
    assert len(fingerprints) == 1


def test_the_package_has_every_recipe() -> None:
    assert (infercomp.W8A8, infercomp.W8A16, infercomp.LayerRecipes) == (W8A8, W8A16, LayerRecipes)
    assert (infercomp.W4A8, infercomp.W4A16, infercomp.W3A16) == (W4A8, W4A16, W3A16)
    assert (infercomp.GPTQ, infercomp.ScaleSearch, infercomp.HAWQ) == (GPTQ, ScaleSearch, HAWQ)
    assert infercomp.GOBO == GOBO


@pytest.mark.parametrize("made", [W4A8, W4A16, W3A16])
@pytest.mark.parametrize("group_size", [None, 0, -32, 31, 48, 8224, True, 32.0, "32"])
def test_a_group_that_no_kernel_takes_is_refused(made: Any, group_size: Any) -> None:
    with pytest.raises(ConfigError, match="multiple of 32 up to 8192") as caught:
        made(group_size)
    assert caught.value.field == "group_size"


@pytest.mark.parametrize(
    ("make", "field"),
    [
        *[(lambda size=size: W8A8(group_size=size), "group_size") for size in (0, 31, 544, "32")],
        (lambda: W8A16(symmetric=False), "symmetric"),
        (lambda: W4A16(symmetric=1), "symmetric"),
        *[
            (lambda alpha=alpha: W8A8(smooth_alpha=alpha), "smooth_alpha")
            for alpha in (-0.1, 1.1, math.nan, math.inf, "0.5", True)
        ],
        *[(lambda power=power: W8A8(smooth_power=power), "smooth_power") for power in (0.5, math.nan, math.inf, "max")],
        *[(lambda end=end: W8A8(outlier_threshold=end), "outlier_threshold") for end in (0, -6, math.inf, "6", True)],
        *[(lambda count=count: W8A8(embedding_groups=count), "embedding_groups") for count in (0, 1, 2.0, True)],
        *[(lambda bound=bound: W8A8(harmful_error=bound), "harmful_error") for bound in (-0.1, math.nan, "0", True)],
        (lambda: W8A8(outlier_threshold=6.0, embedding_groups=2), "embedding_groups"),
        *[(lambda n=n: W8A8(embedding_group_sizes=n), "embedding_group_sizes") for n in ("odd", None, 6)],
        (lambda: W8A16(rounding="gptq"), "rounding"),
        (lambda: ScaleSearch(num_candidates=0), "num_candidates"),
        *[(lambda end=end: ScaleSearch(smallest=end), "smallest") for end in (0, 1.5, math.nan, "1", True)],
        *[(lambda damp=damp: GPTQ(damp=damp), "damp") for damp in (0.0, -1, math.nan, math.inf, None)],
        (lambda: GPTQ(block_size=0), "block_size"),
        (lambda: GPTQ(act_order=1), "act_order"),
        (lambda: GPTQ(true_sequential=None), "true_sequential"),
        (lambda: GPTQ(smallest=2), "smallest"),
        *[(lambda bits=bits: GOBO(bits=bits), "bits") for bits in (1, 5, 3.0, "3", True, None)],
        *[(lambda end=end: GOBO(outlier_log_density=end), "outlier_log_density") for end in (math.nan, math.inf, "x")],
        (lambda: GOBO(group_size=32), "group_size"),
        (lambda: GOBO(symmetric=False), "symmetric"),
        (lambda: GOBO(rounding=GPTQ()), "rounding"),
        (lambda: HAWQ(bits_per_weight=0), "bits_per_weight"),
        (lambda: HAWQ(choices=(W8A8(),)), "choices"),
        (lambda: HAWQ(choices=[W8A8(), W8A16()]), "choices"),
        (lambda: HAWQ(choices=(W8A8(), "w8a16")), "choices"),
        (lambda: HAWQ(choices=(W8A8(smooth_alpha=0.5), W8A16())), "choices"),
        (lambda: HAWQ(sensitivity="norm"), "sensitivity"),
        (lambda: HAWQ(num_probes=0), "num_probes"),
        (lambda: HAWQ(num_samples=True), "num_samples"),
        (lambda: HAWQ(num_tokens=1), "num_tokens"),
        (lambda: LayerRecipes(()), "layers"),
        (lambda: LayerRecipes([("*", W8A8())]), "layers"),
        (lambda: LayerRecipes((("*", "w8a8"),)), "layers"),
        (lambda: LayerRecipes((("", W8A8()),)), "layers"),
        (lambda: LayerRecipes((("*", W8A8(), 1),)), "layers"),
        (lambda: LayerRecipes((("*", LayerRecipes((("*", W8A8()),))),)), "layers"),
    ],
)
def test_a_field_out_of_range_is_named(make: Any, field: str) -> None:
    with pytest.raises(ConfigError, match=field) as caught:
        make()
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ({}, "recipe"),
        ({"recipe": "w5a5"}, "recipe"),
        ({"recipe": ["w8a8"]}, "recipe"),
        ({"recipe": "w8a8", "bits": 8}, "bits"),
        ({"recipe": "w4a16", "group_size": 33}, "group_size"),
        ({"recipe": "w8a16", "rounding": "gptq"}, "rounding"),
        ({"recipe": "w8a16", "rounding": {"rounding": "gptk"}}, "rounding"),
        ({"recipe": "w8a16", "rounding": {"rounding": "gptq", "dump": 1}}, "dump"),
        ({"recipe": "w8a16", "rounding": {"rounding": "gptq", "damp": 0}}, "damp"),
        ({"recipe": "layers"}, "layers"),
        ({"recipe": "hawq", "bits": 4}, "bits"),
        ({"recipe": "hawq", "choices": "w8a8"}, "choices"),
        ({"recipe": "hawq", "choices": [{"recipe": "w5a5"}, {"recipe": "w8a8"}]}, "recipe"),
        ({"recipe": "layers", "layers": [["*"]]}, "layers"),
        ({"recipe": "layers", "layers": [[1, None]]}, "layers"),
        ({"recipe": "layers", "layers": [], "bits": 1}, "bits"),
        ({"recipe": "layers", "layers": [["*", {"recipe": "w5a5"}]]}, "recipe"),
        ({"recipe": "layers", "layers": [["*", "w8a8"]]}, "recipe"),
    ],
)
def test_json_that_is_no_recipe_names_the_field(value: Any, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_options({"quantization": json.dumps(value)}, {})
    assert caught.value.field == field


@pytest.mark.parametrize("text", ["{", '{"recipe": "w8a8"'])
def test_what_is_no_json_says_so(text: str) -> None:
    with pytest.raises(ConfigError, match="no JSON") as caught:
        PassConfig(quantization=text)
    assert caught.value.field == "quantization"


@pytest.mark.parametrize("quantization", [8, ("w8a8",), {"recipe": "w8a8"}, W8A8])
def test_quantization_of_another_type_is_refused(quantization: Any) -> None:
    with pytest.raises(ConfigError, match="must be a recipe, the name of one or None") as caught:
        PassConfig(quantization=quantization)
    assert caught.value.field == "quantization"


@pytest.mark.parametrize(
    ("pattern", "is_for"),
    [
        ("*", True),
        ("model.layers.0.mlp.down_proj", True),
        ("layers.0.mlp.*", True),
        ("down_proj", True),
        ("*.down_proj", True),
        ("own_proj", False),
        ("layers.0", False),
        ("layers.0.MLP.*", False),
        ("*.up_proj", False),
    ],
)
def test_a_pattern_is_for_a_name_or_its_end_behind_a_dot(pattern: str, is_for: bool) -> None:
    assert fits(pattern, ["model.layers.0.mlp.down_proj"]) == is_for
    assert fits(pattern, ["lm_head", "model.layers.0.mlp.down_proj"]) == is_for
    assert not fits(pattern, [])
