"""round_weights: what it rounds and with what inputs, that its codes are served as they are, and what outputs lose."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from families import DECODERS, VOCAB_SIZE
from graph_testing import copied, outputs
from small_llm import byte_model, byte_tokenizer

from infercomp import LLM
from infercomp.codegen.model_graph import ModelGraph
from infercomp.codegen.ops import linear
from infercomp.passes import weight_grids
from infercomp.passes.calibration import Calibration
from infercomp.passes.config import PassConfig
from infercomp.passes.linear_recipes import W4A16, W8A8, W8A16, Recipe
from infercomp.passes.pipeline import PIPELINE, run_pipeline
from infercomp.passes.quantizable_linears import parameters_of
from infercomp.passes.recipes import LayerRecipes
from infercomp.passes.record import PassRecord
from infercomp.passes.round_weights import ROUND_WEIGHTS
from infercomp.passes.rounding import GPTQ, ScaleSearch
from infercomp.runtime.errors import ConfigError, NumericalError
from infercomp.serving import capture_for_serving, position_limit

BEFORE = PIPELINE[: [each.name for each in PIPELINE].index("round_weights")]
FOUR_BITS = W4A16(32, True, GPTQ())


def samples(num_samples: int = 6) -> tuple[dict[str, torch.Tensor], ...]:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, VOCAB_SIZE, (1, 20), generator=generator) for _ in range(num_samples)]
    return tuple({"input_ids": each, "position_ids": torch.arange(20)[None]} for each in ids)


CALIBRATION = Calibration(samples())


def recognized(family: str = "llama") -> tuple[ModelGraph, dict[str, torch.Tensor]]:
    """The graph as the pass meets it, and example inputs."""
    model_graph, examples = _recognized_once(family)
    return copied(model_graph), examples


@functools.cache
def _recognized_once(family: str) -> tuple[ModelGraph, dict[str, torch.Tensor]]:
    model = DECODERS[family].build(DECODERS[family].attn_implementations[0])
    model_graph, examples = capture_for_serving(model, position_limit(model))
    run_pipeline(model_graph, PassConfig(), pipeline=BEFORE)
    return model_graph, examples


def rounded(
    model_graph: ModelGraph,
    examples: dict[str, torch.Tensor],
    recipe: Recipe = FOUR_BITS,
    calibration: Calibration | None = CALIBRATION,
    **options: Any,
) -> PassRecord:
    config = PassConfig(quantization=recipe, verify=True, **options)
    pipeline = (dataclasses.replace(ROUND_WEIGHTS, after=()),)
    (record,) = run_pipeline(model_graph, config, example_inputs=examples, calibration=calibration, pipeline=pipeline)
    return record


def weight_names(model_graph: ModelGraph) -> list[str]:
    return [parameters_of(node)[0].name for node in model_graph.calls(linear.overload)]


def num_levels(weight: torch.Tensor, group_size: int) -> int:
    """The most different values in a group of input channels."""
    groups = weight.unflatten(-1, (-1, group_size)).flatten(0, 1)
    return max(len(set(group.tolist())) for group in groups)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_all_layers_but_the_head_go_to_their_grids(name: str) -> None:
    """GPT-2's weights lie [K, N]; Gemma's head is its embedding."""
    model_graph, examples = recognized(name)
    before = dict(model_graph.weights)
    record = rounded(model_graph, examples)
    *layers, head = model_graph.calls(linear.overload)
    assert record.matches == len(layers) and 0.01 < (record.max_error or 0) < 0.5
    for node in layers:
        weight, _, is_transposed = parameters_of(node)
        found = model_graph.weights[weight.name]
        assert found.shape == before[weight.name].shape and found.dtype == before[weight.name].dtype
        assert num_levels(found.t() if is_transposed else found, 32) <= 16
        assert not torch.equal(found, before[weight.name])
    assert set(model_graph.stored_integers) == {parameters_of(node)[0].name for node in layers}
    assert model_graph.weights[parameters_of(head)[0].name] is before[parameters_of(head)[0].name]


def errors_of_layers(recipe: Recipe) -> float:
    """The mean square by which the logits move over the calibration samples."""
    model_graph, examples = recognized()
    inputs = [[sample[name] for name in examples] for sample in CALIBRATION.samples]
    exact = [outputs(model_graph, each)[0] for each in inputs]
    rounded(model_graph, examples, recipe)
    found = [outputs(model_graph, each)[0] for each in inputs]
    return sum(float((one - other).square().mean()) for one, other in zip(found, exact, strict=True))


def test_gptq_moves_the_outputs_less_than_a_search_and_that_less_than_the_nearest_codes() -> None:
    nearest, search, gptq = (
        errors_of_layers(W4A16(32, True, method)) for method in (ScaleSearch(num_candidates=1), ScaleSearch(), GPTQ())
    )
    assert search < 0.95 * nearest
    assert gptq < 0.95 * search


def test_true_sequential_sees_the_layers_before_as_they_are_rounded() -> None:
    """Without it no weight depends on how another is rounded."""

    def weights(recipe: Recipe) -> dict[str, torch.Tensor]:
        model_graph, examples = recognized()
        rounded(model_graph, examples, recipe)
        return {name: model_graph.weights[name] for name in weight_names(model_graph)}

    for is_sequential in (False, True):
        method = W4A16(32, True, GPTQ(true_sequential=is_sequential))
        whole, late = weights(LayerRecipes((("mlp.*", method),))), weights(LayerRecipes((("layers.1.mlp.*", method),)))
        (last,) = (name for name in whole if "layers_1_mlp_down" in name)
        assert torch.equal(whole[last], late[last]) == (not is_sequential)


def test_rows_are_rounded_alike_whatever_part_they_are_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def weights() -> dict[str, torch.Tensor]:
        model_graph, examples = recognized("gpt2")
        rounded(model_graph, examples)
        return dict(model_graph.weights)

    whole = weights()
    monkeypatch.setattr(weight_grids, "_CHUNK_ELEMENTS", 1000)
    parts = weights()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_recipes_of_layers_and_switches_are_kept_to() -> None:
    recipe = LayerRecipes((("mlp.*", FOUR_BITS), ("*", W8A16())))
    model_graph, examples = recognized()
    record = rounded(model_graph, examples, recipe, disable=("round_weights#1",))
    assert (record.matches, record.skipped) == (5, 1)
    assert len(model_graph.stored_integers) == 5 and all("mlp" in name for name in model_graph.stored_integers)


def test_a_weight_of_two_layers_is_left_to_the_nearest() -> None:
    model_graph, examples = recognized()
    one, other = (node for node in model_graph.calls(linear.overload) if "q_proj" in parameters_of(node)[0].name)
    model_graph.weights[parameters_of(other)[0].name] = model_graph.weights[parameters_of(one)[0].name]
    record = rounded(model_graph, examples)
    assert [miss.reason for miss in record.near_misses] == [
        "its weight is also that of another layer, whose inputs are others"
    ] * 2


def test_what_is_missing_or_wrong_is_an_error_before_any_work() -> None:
    model_graph, examples = recognized()
    with pytest.raises(ConfigError, match="needs samples") as caught:
        rounded(model_graph, examples, calibration=None)
    assert caught.value.field == "calibration"
    with pytest.raises(ConfigError, match="does not divide") as caught:
        rounded(model_graph, examples, W4A16(8192, True, GPTQ()))
    assert caught.value.field == "group_size"
    with pytest.raises(ConfigError, match=r"no linear: 'mlp\.doun'") as caught:
        rounded(model_graph, examples, LayerRecipes((("mlp.doun", FOUR_BITS),)))
    model_graph.frozen = False
    with pytest.raises(ConfigError, match="are the user's") as caught:
        rounded(model_graph, examples)
    assert caught.value.field == "rounding"


def test_inputs_that_are_no_numbers_name_their_layer() -> None:
    model_graph, examples = recognized()
    model_graph.weights["p_model_model_layers_0_mlp_up_proj_weight"].data[5, 5] = float("nan")
    with pytest.raises(NumericalError, match=r"input of model\.model\.layers\.0\.mlp\.down_proj is") as caught:
        rounded(model_graph, examples, LayerRecipes((("down_proj", FOUR_BITS),)))
    assert caught.value.field == "calibration"


def divergence(llm: LLM, expected: torch.Tensor, tokens: list[int]) -> float:
    found = llm.logits(tokens).log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def test_llm_serves_the_codes_and_saves_them(tmp_path: Any) -> None:
    """Its logits lose less than those of the nearest codes, are the same once saved; smoothing goes with rounding."""
    ids = torch.randint(0, 256, (5000,), generator=torch.Generator().manual_seed(1))
    tokens, calibration = ids[:60].tolist(), ids[60:]
    with torch.inference_mode():
        expected = byte_model()(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)

    def served(quantization: Recipe | str, **options: Any) -> LLM:
        return LLM(byte_model(), byte_tokenizer(), num_blocks=64, quantization=quantization, **options)

    llm = served("w4a16-g32-gptq", calibration=calibration, verify=True)
    (record,) = (each for each in llm.report.passes if each.name == "round_weights")
    assert record.matches == 14
    assert divergence(llm, expected, tokens) < 0.9 * divergence(served("w4a16-g32-sym"), expected, tokens)
    llm.save(tmp_path / "saved")
    assert torch.equal(LLM(tmp_path / "saved", num_blocks=64).logits(tokens), llm.logits(tokens))
    both = served(W8A8(rounding=GPTQ(), smooth_alpha=0.5), calibration=calibration)
    assert divergence(both, expected, tokens) < divergence(llm, expected, tokens) / 3
