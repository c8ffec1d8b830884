"""smooth_activations: an identity in every decoder family with outliers, what it finds, and what it does to numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from families import DECODERS, VOCAB_SIZE
from graph_testing import copied, outputs
from small_llm import byte_model, byte_tokenizer
from torch import nn

from infercomp import LLM
from infercomp.codegen.model_graph import ModelGraph
from infercomp.codegen.ops import linear
from infercomp.passes import smooth_activations
from infercomp.passes.calibration import Calibration, largest_of_channels, some_tokens, stream
from infercomp.passes.config import PassConfig
from infercomp.passes.linear_recipes import W8A8, W8A16, Recipe
from infercomp.passes.pipeline import PIPELINE, run_pipeline
from infercomp.passes.recipes import LayerRecipes
from infercomp.passes.record import PassRecord
from infercomp.passes.smooth_activations import SMOOTH_ACTIVATIONS
from infercomp.passes.smoothing_scales import smoothing_scales
from infercomp.runtime.errors import ConfigError, NumericalError, VerificationError
from infercomp.serving import capture_for_serving, position_limit

BEFORE = PIPELINE[: [each.name for each in PIPELINE].index("smooth_activations")]
SMOOTH = W8A8(smooth_alpha=0.5, smooth_power=None)


@torch.no_grad()
def plant_outliers(model: nn.Module, factor: float = 100.0) -> nn.Module:
    """An entry of each vector and a row of each matrix is that much larger, and with it a channel of what it makes."""
    for name, parameter in model.named_parameters():
        if not any(part in name for part in ("embed", "wte", "wpe", "head")):
            parameter[3] *= factor
    return model


def samples(num_samples: int = 3) -> tuple[dict[str, torch.Tensor], ...]:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, VOCAB_SIZE, (1, 20), generator=generator) for _ in range(num_samples)]
    return tuple({"input_ids": each, "position_ids": torch.arange(20)[None]} for each in ids)


CALIBRATION = Calibration(samples())


def recognized(model: nn.Module) -> tuple[ModelGraph, dict[str, torch.Tensor]]:
    """The graph as the pass meets it, and example inputs."""
    model_graph, examples = capture_for_serving(model, position_limit(model))
    run_pipeline(model_graph, PassConfig(), pipeline=BEFORE)
    return model_graph, examples


def smooth(
    model_graph: ModelGraph,
    examples: dict[str, torch.Tensor],
    recipe: Recipe = SMOOTH,
    calibration: Calibration | None = CALIBRATION,
    **options: Any,
) -> PassRecord:
    """Run the pass, which is measured in float64 against the graph before it."""
    config = PassConfig(quantization=recipe, verify=True, **options)
    pipeline = (dataclasses.replace(SMOOTH_ACTIVATIONS, after=()),)
    (record,) = run_pipeline(model_graph, config, example_inputs=examples, calibration=calibration, pipeline=pipeline)
    return record


@cache
def recognized_with_outliers(family: str, factor: float) -> tuple[ModelGraph, dict[str, torch.Tensor]]:
    return recognized(plant_outliers(DECODERS[family].build(DECODERS[family].attn_implementations[0]), factor))


def with_outliers(family: str, factor: float = 100.0) -> tuple[ModelGraph, dict[str, torch.Tensor]]:
    model_graph, examples = recognized_with_outliers(family, factor)
    return copied(model_graph), examples


def llama(factor: float = 100.0) -> tuple[ModelGraph, dict[str, torch.Tensor]]:
    return with_outliers("llama", factor)


# Inputs of linears whose scales are folded, of two layers: before q, k and v; before o; of the MLP; before the head.
MATCHES = {
    "llama": 9, "mistral": 9, "qwen2": 9, "qwen3": 9, "gemma2": 8, "gemma3": 8, "phi3": 5, "gpt2": 4, "opt": 6,
    "gpt_neox": 5, "gptj": 5, "falcon": 2, "bloom": 5, "mpt": 4,
}  # fmt: skip


@pytest.mark.parametrize("name", DECODERS)
def test_folding_is_an_identity_in_every_family(name: str) -> None:
    model_graph, examples = with_outliers(name)
    before = dict(model_graph.weights)
    record = smooth(model_graph, examples)
    assert record.matches == MATCHES[name]
    assert record.max_error is not None and record.max_error <= 1e-9
    changed = [each for each, tensor in before.items() if not torch.equal(tensor, model_graph.weights[each])]
    assert len(changed) >= record.matches
    assert outputs(model_graph, list(examples.values()))[0].isfinite().all()
    inputs = {node.args[0] for node in model_graph.calls(linear.overload)}
    assert len(inputs) == record.matches + len(record.near_misses)


def _repeat_in_turn(producer: Any, scales: torch.Tensor) -> torch.Tensor:
    return scales.repeat(producer.num_repeats)


def _forget_the_offset(smoother: Any, norm: Any, scales: torch.Tensor) -> None:
    smoother._multiply(norm.args[1], 1 / scales, 0)


def _forget_biases(smoother: Any, weight: Any, scales: torch.Tensor, dim: int) -> None:
    if "bias" not in weight.name:
        MULTIPLY(smoother, weight, scales, dim)


MULTIPLY = smooth_activations._Smoother._multiply
BUGS = {
    "heads of a group in another order": ("llama", "_Producer.repeated", _repeat_in_turn),
    "Gemma's weight taken for a plain one": ("gemma2", "_Smoother._multiply_behind", _forget_the_offset),
    "biases of norms and linears forgotten": ("opt", "_Smoother._multiply", _forget_biases),
}


@pytest.mark.parametrize(("family", "place", "bug"), BUGS.values(), ids=BUGS)
def test_a_planted_bug_is_caught(
    family: str, place: str, bug: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"infercomp.passes.smooth_activations.{place}", bug)
    model_graph, examples = with_outliers(family)
    with pytest.raises(VerificationError, match="smooth_activations is declared exact"):
        smooth(model_graph, examples)


def spread_of_inputs(model_graph: ModelGraph) -> dict[str, float]:
    """How far the largest channel of each input is above the one in the middle."""
    wanted = {node.args[0]: node.args[1].name for node in model_graph.calls(linear.overload)}
    found: dict[str, float] = {}

    def visit(node: Any, values: Any) -> None:
        maxima = largest_of_channels(values)
        found[wanted[node]] = float(maxima.max() / maxima.median())

    stream(model_graph, CALIBRATION.samples, {node: partial(visit, node) for node in wanted})
    return found


def test_outliers_leave_the_activations() -> None:
    model_graph, examples = llama()
    before = spread_of_inputs(model_graph)
    smooth(model_graph, examples)
    after = spread_of_inputs(model_graph)
    assert all(after[name] < before[name] / 3 for name in before), (before, after)


def test_alpha_zero_leaves_no_outliers_in_weights_and_one_none_in_activations() -> None:
    def spreads(alpha: float) -> tuple[float, float]:
        model_graph, examples = llama(factor=10.0)
        smooth(model_graph, examples, W8A8(smooth_alpha=alpha, smooth_power=None))
        (weight,) = (tensor for name, tensor in model_graph.weights.items() if "layers_0_mlp_down" in name)
        columns = weight.abs().amax(0)
        (of_input,) = (each for name, each in spread_of_inputs(model_graph).items() if "layers_0_mlp_down" in name)
        return float(columns.max() / columns.min()), of_input

    (weights_at_0, inputs_at_0), (weights_at_1, inputs_at_1) = spreads(0), spreads(1.0)
    # What is left is what rounding to powers of two leaves: a factor of two between any two channels.
    assert weights_at_0 <= 2 < weights_at_1
    assert inputs_at_1 <= 2 < inputs_at_0


def test_scales_are_the_nearest_powers_of_two() -> None:
    maxima, of_weights = torch.tensor([16.0, 9.0, 100.0, 0.0, 3.0, 1e9]), torch.tensor([1.0, 9.0, 0.25, 1.0, 0.0, 1e-9])
    scales = smoothing_scales(maxima, of_weights, 0.5)
    assert scales.tolist() == [1.0, 0.25, 4.0, 1.0, 1.0, 65536.0]
    assert smoothing_scales(torch.zeros(2), torch.ones(2), 0.5).tolist() == [1.0, 1.0]


def test_recipes_of_layers_are_kept_to() -> None:
    model_graph, examples = llama()
    before = dict(model_graph.weights)
    record = smooth(model_graph, examples, LayerRecipes((("layers.1.mlp.*", SMOOTH), ("*", W8A16()))))
    assert record.matches == 2
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, model_graph.weights[name])}
    layer = "p_model_model_layers_1_"
    parts = ("post_attention_layernorm", "mlp_gate_proj", "mlp_up_proj", "mlp_down_proj")
    assert changed == {f"{layer}{part}_weight" for part in parts}


def test_linears_of_one_input_need_one_alpha() -> None:
    model_graph, examples = llama()
    record = smooth(model_graph, examples, LayerRecipes((("q_proj", W8A8(smooth_alpha=0.25)), ("*", SMOOTH))))
    assert record.matches == 7
    assert {miss.reason for miss in record.near_misses} == {"linears of one input are to be smoothed in different ways"}


def test_one_match_may_be_left_out() -> None:
    model_graph, examples = llama()
    record = smooth(model_graph, examples, disable=("smooth_activations#3",))
    assert (record.matches, record.skipped) == (8, 1)


def test_a_search_takes_the_alpha_that_moves_outputs_least() -> None:
    """Whatever single alpha a layer is given, none leaves it less error than the search does."""

    def errors(alpha: float | str) -> list[float]:
        model_graph, examples = llama(factor=10.0)
        exact = dict(model_graph.weights)
        rows = {}
        for node in model_graph.calls(linear.overload):
            rows[node.args[1].name] = node.args[0]

        def visit(node: Any, values: Any) -> None:
            tokens = some_tokens(values, 512)
            for name in (name for name, source in rows.items() if source is node):
                inputs, weight = on_8_bits(tokens), on_8_bits(model_graph.weights[name])
                whole = tokens @ model_graph.weights[name].t()
                moved = (inputs @ weight.t() - whole).square().sum(-1) / whole.square().sum(-1)
                found[name] = float(moved.mean())

        found: dict[str, float] = {}
        # What is folded into rows of a weight changes how much they count among its outputs.
        apart = LayerRecipes((("o_proj", None), ("down_proj", None), ("*", W8A8(smooth_alpha=alpha))))
        smooth(model_graph, examples, apart)
        assert any(not torch.equal(exact[name], model_graph.weights[name]) for name in exact)
        stream(model_graph, CALIBRATION.samples, {source: partial(visit, source) for source in rows.values()})
        of_inputs: dict[Any, float] = {}
        for name, error in found.items():
            of_inputs[rows[name]] = of_inputs.get(rows[name], 0.0) + error
        return list(of_inputs.values())

    searched = errors("search")
    for alpha in (0.25, 0.5, 0.75):
        assert all(one <= other * 1.001 for one, other in zip(searched, errors(alpha), strict=True))


def on_8_bits(rows: torch.Tensor) -> torch.Tensor:
    steps = rows.abs().amax(-1, keepdim=True) / 127
    return torch.round(rows / steps) * steps


def test_without_smooth_alpha_nothing_happens() -> None:
    model_graph, examples = llama()
    assert smooth(model_graph, examples, W8A8(), calibration=None).matches == 0


def test_what_is_missing_or_wrong_is_an_error_before_any_work() -> None:
    model_graph, examples = llama()
    with pytest.raises(ConfigError, match="needs samples") as caught:
        smooth(model_graph, examples, calibration=None)
    assert caught.value.field == "calibration"
    with pytest.raises(ConfigError, match=r"no linear: 'mlp\.doun'") as caught:
        smooth(model_graph, examples, LayerRecipes((("mlp.doun", SMOOTH),)))
    assert caught.value.field == "layers"
    model_graph.frozen = False
    with pytest.raises(ConfigError, match="are the user's") as caught:
        smooth(model_graph, examples)
    assert caught.value.field == "smooth_alpha"


def test_activations_that_are_no_numbers_name_their_layer() -> None:
    model_graph, examples = llama()
    model_graph.weights["p_model_model_layers_0_mlp_up_proj_weight"].data[5, 5] = float("nan")
    with pytest.raises(NumericalError, match=r"input of model\.model\.layers\.0\.mlp\.down_proj is") as caught:
        smooth(model_graph, examples)
    assert caught.value.field == "calibration"
    assert "sample 0" in caught.value.what


def test_llm_smooths_what_plain_rounding_breaks() -> None:
    model = plant_outliers(byte_model())
    tokens = list(range(3, 60))
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)

    def divergence(**options: Any) -> float:
        llm = LLM(model, byte_tokenizer(), num_blocks=64, block_size=4, **options)
        found = llm.logits(tokens).log_softmax(-1)
        return float((expected.exp() * (expected - found)).sum(-1).mean())

    text = ["The quick brown fox jumps over the lazy dog. " * 8]
    smoothed = divergence(quantization="w8a8-smoothquant", calibration=text, verify=True)
    assert smoothed < divergence(quantization="w8a8") / 3
