"""fix_activation_scales: one grid for all tokens of an input, by what calibration saw, and in the saved file."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_testing import captured as graph_of
from graph_testing import copied
from hypothesis import given
from hypothesis import strategies as st
from small_llm import byte_model, byte_tokenizer
from torch import nn

from infercomp import LLM, ConfigError
from infercomp.codegen.model_graph import ModelGraph
from infercomp.codegen.ops import quantize_per_tensor, quantize_per_token
from infercomp.loading.safetensors_file import read_safetensors_header
from infercomp.passes.calibration import Calibration, largest_magnitude, stream
from infercomp.passes.config import PassConfig
from infercomp.passes.linear_recipes import W8A8, LinearRecipe
from infercomp.passes.pipeline import PIPELINE, run_pipeline
from infercomp.passes.recipes import LayerRecipes
from infercomp.passes.record import PassRecord
from infercomp.serving import capture_for_serving, position_limit

STATIC = W8A8(activation_scale="tensor")
TOKENS = torch.randint(0, 256, (600,), generator=torch.Generator().manual_seed(1))
CALIBRATION = Calibration(
    tuple({"input_ids": each[None], "position_ids": torch.arange(60)[None]} for each in TOKENS.split(60))
)
THROUGH = PIPELINE[: [each.name for each in PIPELINE].index("quantize_linears") + 1]
NEEDED = {"recognize_linear", "fix_activation_scales", "quantize_linears"}
steps = st.floats(1e-6, 1e4).map(lambda value: torch.tensor([value]))


@functools.cache
def captured() -> ModelGraph:
    return capture_for_serving(byte_model(), position_limit(byte_model()))[0]


def quantized(
    recipe: Any, calibration: Calibration | None = CALIBRATION, **options: Any
) -> tuple[ModelGraph, dict[str, PassRecord]]:
    model_graph = copied(captured())
    config = PassConfig(quantization=recipe, **options)
    records = run_pipeline(model_graph, config, pipeline=THROUGH, calibration=calibration)
    return model_graph, {record.name: record for record in records}


@given(steps, st.integers(0, 999), st.sampled_from([torch.float32, torch.bfloat16]))
def test_codes_are_the_nearest_that_the_grid_has(step: torch.Tensor, seed: int, dtype: torch.dtype) -> None:
    rows = (torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)) * 60 * step).to(dtype)
    codes, scale, sums = quantize_per_tensor.definition(rows, step, 32)
    exact = rows.double() / step.double()
    assert (codes.double() - exact.clamp(-127, 127)).abs().max() <= 0.5 + 1e-4
    assert torch.equal(scale, step.expand(3, 1)) and codes.abs().max() <= 127
    assert torch.equal(sums, codes.view(3, 2, 32).sum(-1, dtype=torch.int32))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_row_that_is_not_finite_is_nan_and_no_other(value: float) -> None:
    rows = torch.ones(3, 64)
    rows[1, 7] = value
    codes, scale, _ = quantize_per_tensor.definition(rows, torch.tensor([0.5]), 64)
    assert scale.isnan().flatten().tolist() == [False, True, False]
    assert codes[1].eq(0).all() and codes[::2].eq(2).all()


def test_each_input_has_the_step_of_its_largest_value() -> None:
    model_graph, records = quantized(STATIC)
    calls = model_graph.calls(quantize_per_tensor.overload)
    # Of two layers: what q, k and v read, o, what gate and up read, and down; the LM head finds its own.
    assert len(calls) == 8 and len(model_graph.calls(quantize_per_token.overload)) == 1
    assert records["fix_activation_scales"].matches == 14
    exact, _ = quantized(None)
    seen: dict[int, torch.Tensor] = {}
    sources = [node for node in exact.graph.nodes if node.name in {call.args[0].name for call in calls}]
    # The first layer's norm sees what it saw in floats, and so its step can be told without the graph.
    first = sources[0]
    stream(exact, CALIBRATION.samples, {first: lambda values: seen.update({0: largest_magnitude(values, None)})})
    step = model_graph.weights[calls[0].args[1].name]  # type: ignore[union-attr]
    assert step.shape == (1,) and float(step) == pytest.approx(float(seen[0]) / 127, rel=1e-6)


@given(st.floats(0.1, 100), st.integers(1, 400), st.integers(0, 99))
def test_a_percentile_has_so_many_magnitudes_at_or_below_it(percentile: float, count: int, seed: int) -> None:
    values = torch.randn(1, count, generator=torch.Generator().manual_seed(seed))
    found = largest_magnitude([values[:, : count // 2], values[:, count // 2 :]], percentile)
    magnitudes = values.abs().flatten()
    assert found in magnitudes
    assert (magnitudes <= found).double().mean() >= percentile / 100 - 1e-9
    assert (magnitudes < found).double().mean() < percentile / 100 + 1e-9


def test_a_smaller_percentile_clips() -> None:
    largest, clipped = (
        {node.name: float(graph.weights[node.args[1].name]) for node in graph.calls(quantize_per_tensor.overload)}
        for graph, _ in (quantized(STATIC), quantized(W8A8(activation_scale="tensor", activation_percentile=99.0)))
    )
    assert all(clipped[name] < largest[name] for name in largest)


def relative_error(llm: LLM, expected: torch.Tensor) -> float:
    return float((llm.logits(TOKENS[:100].tolist()) - expected).norm() / expected.norm())


def test_one_grid_for_all_tokens_errs_more_than_one_for_each_where_one_token_is_large() -> None:
    def llm(recipe: LinearRecipe | None) -> LLM:
        model = byte_model()
        with torch.no_grad():
            model.model.embed_tokens.weight[TOKENS[3]] *= 300  # type: ignore[union-attr, operator, index]
        return LLM(model, num_blocks=16, quantization=recipe, calibration=TOKENS if recipe == STATIC else None)

    expected = llm(None).logits(TOKENS[:100].tolist())
    per_token, per_tensor = (relative_error(llm(recipe), expected) for recipe in (W8A8(), STATIC))
    assert per_token < 0.1 and per_tensor > 1.5 * per_token, (per_token, per_tensor)


@pytest.mark.parametrize("codegen", ["reference", "cpp"])
def test_it_is_served_saved_and_read_again_bit_for_bit(tmp_path: Path, codegen: str) -> None:
    tokens = TOKENS[:50].tolist()
    options: dict[str, Any] = {"quantization": "w8a8-static-smoothquant", "calibration": TOKENS, "codegen": codegen}
    llm = LLM(byte_model(), byte_tokenizer(), num_blocks=8, **options)
    found = llm.logits(tokens)
    dense = LLM(byte_model(), num_blocks=8).logits(tokens)
    assert 0 < float((found - dense).norm() / dense.norm()) < 0.1
    llm.save(tmp_path / "static")
    assert torch.equal(LLM(tmp_path / "static", num_blocks=8, codegen=codegen).logits(tokens), found)


def test_the_file_says_so_and_has_a_step_for_each_layer(tmp_path: Path) -> None:
    LLM(byte_model(), byte_tokenizer(), num_blocks=8, quantization=STATIC, calibration=TOKENS).save(tmp_path / "static")
    groups = json.loads((tmp_path / "static" / "config.json").read_text())["quantization_config"]["config_groups"]
    of_strategy = {each["input_activations"]["strategy"]: each for each in groups.values()}
    assert of_strategy["tensor"]["input_activations"]["dynamic"] is False
    assert of_strategy["token"]["targets"] == ["lm_head"]
    stored = read_safetensors_header(tmp_path / "static" / "model.safetensors")
    for layer in of_strategy["tensor"]["targets"]:
        assert stored[f"{layer}.input_scale"].read().shape == (1,)
    steps = [stored[f"model.layers.0.self_attn.{name}_proj.input_scale"].read() for name in "qkv"]
    assert torch.equal(steps[0], steps[1]) and torch.equal(steps[0], steps[2])


def test_kernels_are_the_definition_to_the_bit() -> None:
    tokens = TOKENS[:70].tolist()
    by_kernels, by_definitions = (
        LLM(byte_model(), num_blocks=8, quantization=STATIC, calibration=TOKENS, codegen=codegen).logits(tokens)
        for codegen in ("cpp", "reference")
    )
    # Norms and attention round on their own, so codes may differ by one here and there.
    assert float((by_kernels - by_definitions).norm() / by_definitions.norm()) < 0.01


def test_a_layer_switched_off_finds_a_scale_for_each_token() -> None:
    model_graph, records = quantized(STATIC, disable=("fix_activation_scales#3",))
    assert records["fix_activation_scales"].skipped == 1
    assert len(model_graph.calls(quantize_per_tensor.overload)) == 7
    assert len(model_graph.calls(quantize_per_token.overload)) == 2


def test_layers_of_other_recipes_are_left_alone() -> None:
    recipe = LayerRecipes((("*.o_proj", STATIC), ("*", W8A8())))
    model_graph, records = quantized(recipe)
    assert records["fix_activation_scales"].matches == 2 == len(model_graph.calls(quantize_per_tensor.overload))


class Twice(nn.Module):
    """One weight for two inputs, the second a hundred times the first."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(32, 32, bias=False)
        self.last = nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.shared(x.tanh()) + self.shared(100 * x)))


def test_a_weight_that_two_inputs_share_clips_neither() -> None:
    x = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
    model_graph = graph_of(Twice(), x)
    calibration = Calibration(({model_graph.input_names[0]: x},))
    pipeline = tuple(dataclasses.replace(each, after=()) for each in PIPELINE if each.name in NEEDED)
    run_pipeline(model_graph, PassConfig(quantization=STATIC), pipeline=pipeline, calibration=calibration)
    steps = [float(model_graph.weights[node.args[1].name]) for node in model_graph.calls(quantize_per_tensor.overload)]
    assert steps == [pytest.approx(100 * float(x.abs().max()) / 127)] * 2


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"activation_scale": "row"}, "activation_scale"),
        ({"activation_scale": "tensor", "activation_percentile": 0}, "activation_percentile"),
        ({"activation_scale": "tensor", "activation_percentile": 101}, "activation_percentile"),
        ({"activation_percentile": 99.9}, "activation_percentile"),
        ({"activation_scale": "tensor", "embedding_groups": 4}, "activation_scale"),
        ({"activation_scale": "tensor", "smooth_alpha": "search"}, "smooth_alpha"),
    ],
)
def test_refusals_name_the_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        W8A8(**fields)
    assert caught.value.field == field


def test_it_needs_calibration_data_and_weights_of_its_own() -> None:
    with pytest.raises(ConfigError) as caught:
        quantized(STATIC, calibration=None)
    assert caught.value.field == "calibration"
    model_graph = copied(captured())
    model_graph.frozen = False
    with pytest.raises(ConfigError) as caught:
        run_pipeline(model_graph, PassConfig(quantization=STATIC), pipeline=THROUGH, calibration=CALIBRATION)
    assert caught.value.field == "activation_scale"
