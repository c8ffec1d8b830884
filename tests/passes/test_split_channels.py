"""split_channels: an identity in float64 whose parts are what the papers say, rounded each by itself."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from families import DECODERS, VOCAB_SIZE
from graph_testing import copied
from hypothesis import given, settings
from hypothesis import strategies as st
from small_llm import byte_model, byte_tokenizer
from torch import fx, nn

from infercomp import LLM
from infercomp.codegen.model_graph import ModelGraph, aten
from infercomp.codegen.ops import linear
from infercomp.passes import split_channels
from infercomp.passes.calibration import Calibration, largest_of_channels, stream
from infercomp.passes.config import PassConfig
from infercomp.passes.linear_recipes import W8A8, W8A16, Recipe
from infercomp.passes.pipeline import PIPELINE, run_pipeline
from infercomp.passes.recipes import LayerRecipes
from infercomp.passes.record import PassRecord
from infercomp.passes.rounding import GPTQ
from infercomp.passes.split_channels import SPLIT_CHANNELS
from infercomp.runtime.errors import ConfigError, VerificationError
from infercomp.serving import capture_for_serving, position_limit

BEFORE = PIPELINE[: [each.name for each in PIPELINE].index("split_channels")]
OUTLIERS, GROUPS = W8A8(outlier_threshold=6.0), W8A8(embedding_groups=4)
OUTLIER_CHANNELS = (3, 17)


@torch.no_grad()
def plant_outliers(model: nn.Module, factor: float) -> nn.Module:
    """Two channels of each norm's output are that much larger, and the weights that read them as much smaller."""
    for layer in model.model.layers:  # type: ignore[union-attr]
        for norm, readers in (
            (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
            (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
        ):
            norm.weight[list(OUTLIER_CHANNELS)] *= factor
            for reader in readers:
                reader.weight[:, list(OUTLIER_CHANNELS)] /= factor
    return model


TOKENS = torch.randint(0, 256, (3000,), generator=torch.Generator().manual_seed(1))
CALIBRATION = Calibration(
    tuple({"input_ids": each[None], "position_ids": torch.arange(60)[None]} for each in TOKENS[60:].split(60)[:8])
)


def recognized(model: nn.Module) -> tuple[ModelGraph, dict[str, torch.Tensor]]:
    model_graph, examples = capture_for_serving(model, position_limit(model))
    run_pipeline(model_graph, PassConfig(), pipeline=BEFORE)
    return model_graph, examples


def split(
    model_graph: ModelGraph,
    examples: dict[str, torch.Tensor],
    recipe: Recipe,
    calibration: Calibration | None = CALIBRATION,
    **options: Any,
) -> PassRecord:
    """Run the pass, which is measured in float64 against the graph before it."""
    config = PassConfig(quantization=recipe, verify=True, **options)
    pipeline = (dataclasses.replace(SPLIT_CHANNELS, after=()),)
    (record,) = run_pipeline(model_graph, config, example_inputs=examples, calibration=calibration, pipeline=pipeline)
    return record


@cache
def _planted_once() -> tuple[ModelGraph, dict[str, torch.Tensor]]:
    return recognized(plant_outliers(byte_model(), 100.0))


def planted() -> tuple[ModelGraph, dict[str, torch.Tensor]]:
    model_graph, examples = _planted_once()
    return copied(model_graph), examples


def weight_named(model_graph: ModelGraph, *parts: str) -> torch.Tensor:
    (found,) = (tensor for name, tensor in model_graph.weights.items() if all(part in name for part in parts))
    return found


@pytest.mark.parametrize(
    ("name", "recipe"), [("llama", OUTLIERS), ("gpt2", OUTLIERS), ("gemma2", GROUPS), ("opt", GROUPS)]
)
def test_splitting_is_an_identity(name: str, recipe: Recipe) -> None:
    """GPT-2's weights lie [K, N], OPT's linears have biases."""
    model = DECODERS[name].build(DECODERS[name].attn_implementations[0])
    samples = tuple({**each, "input_ids": each["input_ids"] % VOCAB_SIZE} for each in CALIBRATION.samples)
    recipe = dataclasses.replace(recipe, outlier_threshold=1.5) if recipe == OUTLIERS else recipe  # type: ignore[type-var]
    record = split(*recognized(model), recipe, Calibration(samples))
    assert record.matches >= 3
    assert record.max_error is not None and record.max_error <= 1e-9


def test_outliers_are_the_channels_that_reach_the_threshold() -> None:
    model_graph, examples = planted()
    maxima: dict[fx.Node, torch.Tensor] = {}
    names = {node.args[0]: node.args[1].name for node in model_graph.calls(linear.overload)}
    visits = {node: partial(lambda n, values: maxima.update({n: largest_of_channels(values)}), node) for node in names}
    stream(model_graph, CALIBRATION.samples, visits)
    expected = {names[node].replace("_weight", ""): (each >= 6).nonzero()[:, 0] for node, each in maxima.items()}
    before = dict(model_graph.weights)
    record = split(model_graph, examples, OUTLIERS)
    assert {miss.reason for miss in record.near_misses} == {
        "no input channel reaches the outlier_threshold in the calibration samples"
    }
    gate = next(name for name in before if "layers_0_mlp_gate" in name)
    outliers = expected["p_model_model_layers_0_mlp_up_proj"] if "up" in gate else None
    channels = next(each for name, each in expected.items() if "layers_0_mlp" in name and len(each))
    assert set(OUTLIER_CHANNELS) <= set(channels.tolist()) and outliers is None
    assert torch.equal(model_graph.weights[f"{gate}_outliers"], before[gate][:, channels])
    assert torch.equal(model_graph.weights[f"{gate}_inliers"], before[gate].index_fill(1, channels, 0))


def test_layers_whose_channels_are_all_outliers_stay_floats() -> None:
    model_graph, examples = planted()
    record = split(model_graph, examples, W8A8(outlier_threshold=1e-6))
    assert record.matches == 0
    assert {miss.reason for miss in record.near_misses} == {"all its input channels are outliers, which stay floats"}
    llm = LLM(byte_model(), quantization=W8A8(outlier_threshold=1e-6), calibration=TOKENS, num_blocks=64)
    (record,) = (each for each in llm.report.passes if each.name == "quantize_linears")
    # What is left is the head, which is split in no recipe.
    assert record.matches == 1


def test_groups_are_sorted_by_range_and_of_one_size() -> None:
    model_graph, examples = planted()
    split(model_graph, examples, GROUPS)
    (permuted, *_) = model_graph.calls(aten.index_select.default)
    order = model_graph.weights[permuted.args[2].name]
    assert sorted(order.tolist()) == list(range(len(order)))
    assert set(order[-len(OUTLIER_CHANNELS) :].tolist()) == set(OUTLIER_CHANNELS)
    parts = [tensor for name, tensor in model_graph.weights.items() if "layers_0_self_attn_q_proj_weight_group" in name]
    assert [part.shape[1] for part in parts] == [len(order) // 4] * 4


@settings(max_examples=40)
@given(st.integers(0, 9999), st.integers(1, 12), st.integers(1, 4))
def test_fitted_sizes_are_the_best_there_are(seed: int, num_channels: int, num_groups: int) -> None:
    num_groups = min(num_groups, num_channels)
    ranges = torch.rand(num_channels, generator=torch.Generator().manual_seed(seed)).exp().sort().values

    def cost(sizes: tuple[int, ...]) -> float:
        ends = torch.tensor(sizes).cumsum(0)
        return float((torch.tensor(sizes) * ranges.double()[ends - 1].square()).sum())

    every = itertools.product(range(1, num_channels + 1), repeat=num_groups)
    best = min(cost(sizes) for sizes in every if sum(sizes) == num_channels)
    found = split_channels.fitted_sizes(ranges, num_groups)
    assert len(found) == num_groups and sum(found) == num_channels and min(found) > 0
    assert cost(tuple(found)) == pytest.approx(best, rel=1e-12)


def test_outliers_have_fitted_groups_of_their_own() -> None:
    model_graph, examples = planted()
    split(model_graph, examples, W8A8(embedding_groups=4, embedding_group_sizes="fitted"))
    parts = [tensor for name, tensor in model_graph.weights.items() if "layers_0_self_attn_q_proj_weight_group" in name]
    sizes = [part.shape[1] for part in parts]
    assert len(sizes) == 4 and len(OUTLIER_CHANNELS) in itertools.accumulate(reversed(sizes))


def _shift(values: Any, recipe: W8A8) -> list[torch.Tensor]:
    first, *rest = CHANNELS(values, recipe)
    return [first.roll(1) if len(first) > 1 else first, *rest[:-1], rest[-1][:-1]]


CHANNELS = split_channels._channels
MULTIPLIED = split_channels._Splitter._weight_part
BUGS: dict[str, tuple[str, Callable[..., Any]]] = {
    "a channel forgotten": ("_channels", _shift),
    "outliers counted twice": (
        "_Splitter._weight_part",
        lambda self, weight, *rest: weight if rest[2] == 0 else MULTIPLIED(self, weight, *rest),
    ),
}


@pytest.mark.parametrize(("place", "bug"), BUGS.values(), ids=BUGS)
def test_a_planted_bug_is_caught(place: str, bug: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"infercomp.passes.split_channels.{place}", bug)
    recipe = GROUPS if place == "_channels" else OUTLIERS
    if recipe is OUTLIERS:
        monkeypatch.setattr(split_channels._Splitter, "_input_parts", _unmasked)
    with pytest.raises((VerificationError, RuntimeError)):
        split(*planted(), recipe)


INPUT_PARTS = split_channels._Splitter._input_parts


def _unmasked(splitter: Any, emit: Any, source: fx.Node, *rest: Any) -> list[fx.Node]:
    return [source, *INPUT_PARTS(splitter, emit, source, *rest)[1:]]


def test_recipes_of_layers_and_switches_are_kept_to() -> None:
    model_graph, examples = planted()
    recipe = LayerRecipes((("mlp.*", GROUPS), ("*", W8A16())))
    record = split(model_graph, examples, recipe, disable=("split_channels#1",))
    assert (record.matches, record.skipped) == (5, 1)
    assert all("mlp" in name for name in model_graph.weights if "_group_" in name)


def test_what_is_missing_or_wrong_is_an_error_before_any_work() -> None:
    model_graph, examples = planted()
    with pytest.raises(ConfigError, match="needs samples") as caught:
        split(model_graph, examples, OUTLIERS, calibration=None)
    assert caught.value.field == "calibration"
    with pytest.raises(ConfigError, match="embedding_groups 7 does not divide") as caught:
        split(model_graph, examples, W8A8(embedding_groups=7))
    assert caught.value.field == "embedding_groups"
    with pytest.raises(ConfigError, match="embedding_groups 99 does not divide") as caught:
        split(model_graph, examples, W8A8(embedding_groups=99, embedding_group_sizes="fitted"))
    assert caught.value.field == "embedding_groups"
    model_graph.frozen = False
    with pytest.raises(ConfigError, match="are the user's") as caught:
        split(model_graph, examples, OUTLIERS)
    assert caught.value.field == "quantization"


def test_planted_outliers_break_plain_rounding_and_nothing_else(tmp_path: Any) -> None:
    tokens = TOKENS[:60].tolist()
    with torch.inference_mode():
        expected = byte_model()(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)

    def served(recipe: Recipe, **options: Any) -> LLM:
        calibration = TOKENS[60:] if recipe.rules[0][1].needs_calibration else None  # type: ignore[union-attr]
        model = plant_outliers(byte_model(), 1000.0)
        return LLM(model, byte_tokenizer(), num_blocks=64, quantization=recipe, calibration=calibration, **options)

    def divergence(llm: LLM) -> float:
        found = llm.logits(tokens).log_softmax(-1)
        return float((expected.exp() * (expected - found)).sum(-1).mean())

    plain, outliers = divergence(served(W8A8())), served(OUTLIERS, verify=True)
    assert divergence(outliers) < plain / 20
    assert divergence(served(W8A8(smooth_alpha=0.5))) < plain / 20
    # An even group of the outliers holds others too, which are lost.
    assert divergence(served(W8A8(embedding_groups=16))) < plain / 3
    assert divergence(served(W8A8(embedding_groups=4, embedding_group_sizes="fitted"))) < plain / 20
    assert divergence(served(W8A8(outlier_threshold=6.0, rounding=GPTQ()))) < plain / 20
    (record,) = (each for each in outliers.report.passes if each.name == "quantize_linears")
    assert "its input channels are outliers, which stay floats" in {miss.reason for miss in record.near_misses}
    outliers.save(tmp_path / "saved")
    assert torch.equal(LLM(tmp_path / "saved", num_blocks=64).logits(tokens), outliers.logits(tokens))
