"""widen_activations: the activations that 8 bits harm, and no others, stay floats; all readers of one are alike."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from graph_testing import outputs
from small_llm import byte_model, byte_tokenizer
from torch import nn

from infercomp import LLM
from infercomp.codegen.model_graph import ModelGraph
from infercomp.codegen.ops import linear
from infercomp.passes.calibration import Calibration
from infercomp.passes.config import PassConfig
from infercomp.passes.linear_recipes import W8A8, Recipe
from infercomp.passes.pipeline import PIPELINE, run_pipeline
from infercomp.passes.recipes import LayerRecipes
from infercomp.passes.record import PassRecord
from infercomp.passes.widen_activations import WIDEN_ACTIVATIONS
from infercomp.runtime.errors import ConfigError
from infercomp.serving import capture_for_serving, position_limit

BEFORE = PIPELINE[: [each.name for each in PIPELINE].index("widen_activations")]
TOKENS = torch.randint(0, 256, (1000,), generator=torch.Generator().manual_seed(1))
CALIBRATION = Calibration(
    tuple({"input_ids": each[None], "position_ids": torch.arange(60)[None]} for each in TOKENS[60:].split(60)[:8])
)


@torch.no_grad()
def planted() -> nn.Module:
    """The second layer's MLP reads an outlier of 1,000 times, by weights as much smaller."""
    model = byte_model()
    layer = model.model.layers[1]  # type: ignore[union-attr, index]
    layer.post_attention_layernorm.weight[3] *= 1000  # type: ignore[union-attr, operator]
    for reader in (layer.mlp.gate_proj, layer.mlp.up_proj):  # type: ignore[union-attr]
        reader.weight[:, 3] /= 1000  # type: ignore[union-attr, operator, index]
    return model


def recognized() -> tuple[ModelGraph, dict[str, torch.Tensor]]:
    model_graph, examples = capture_for_serving(planted(), position_limit(planted()))
    run_pipeline(model_graph, PassConfig(), pipeline=BEFORE)
    return model_graph, examples


def widen(
    model_graph: ModelGraph,
    examples: dict[str, torch.Tensor],
    recipe: Recipe,
    calibration: Calibration | None = CALIBRATION,
    **options: Any,
) -> PassRecord:
    config = PassConfig(quantization=recipe, verify=True, **options)
    pipeline = (dataclasses.replace(WIDEN_ACTIVATIONS, after=()),)
    (record,) = run_pipeline(model_graph, config, example_inputs=examples, calibration=calibration, pipeline=pipeline)
    return record


def widened(record: PassRecord) -> set[str]:
    return {name for site in record.sites for name in site.replaced}


def test_the_bound_says_which() -> None:
    model_graph, examples = recognized()
    before = outputs(model_graph, list(examples.values()))[0]
    record = widen(model_graph, examples, W8A8(harmful_error=0.05))
    harmed = {node.name for node in model_graph.calls(linear.overload) if "layers_1_mlp_gate" in str(node.args[1])}
    harmed |= {node.name for node in model_graph.calls(linear.overload) if "layers_1_mlp_up" in str(node.args[1])}
    assert record.matches == 1 and widened(record) == harmed
    assert record.max_error == 0 and torch.equal(outputs(model_graph, list(examples.values()))[0], before)
    everything = widen(*recognized(), W8A8(harmful_error=0.0))
    assert len(widened(everything)) == 14
    assert widen(*recognized(), W8A8(harmful_error=1000.0)).matches == 0


def test_recipes_of_layers_and_switches_are_kept_to() -> None:
    recipe = LayerRecipes((("mlp.*", W8A8(harmful_error=0.0)), ("*", W8A8())))
    record = widen(*recognized(), recipe, disable=("widen_activations#1",))
    assert (record.matches, record.skipped) == (3, 1)
    assert widen(*recognized(), W8A8(), calibration=None).matches == 0


def test_without_samples_it_is_an_error() -> None:
    with pytest.raises(ConfigError, match="needs samples") as caught:
        widen(*recognized(), W8A8(harmful_error=0.1), calibration=None)
    assert caught.value.field == "calibration"


def test_a_model_with_one_harmful_tensor_is_saved_by_leaving_it_wide() -> None:
    tokens = TOKENS[:60].tolist()
    with torch.inference_mode():
        expected = byte_model()(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)

    def divergence(recipe: Recipe, **options: Any) -> float:
        llm = LLM(planted(), byte_tokenizer(), num_blocks=64, quantization=recipe, **options)
        found = llm.logits(tokens).log_softmax(-1)
        linears = [op for op in llm.report.ops if "int8_linear" in op]
        assert linears, "the other layers have 8-bit activations"
        return float((expected.exp() * (expected - found)).sum(-1).mean())

    assert divergence(W8A8(harmful_error=0.05), calibration=TOKENS[60:], verify=True) < divergence(W8A8()) / 10
