"""quantize_linears: which linears become integers and where these are held, near misses, and what models then say."""

from __future__ import annotations

import dataclasses
import pydoc_data.topics
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_testing import FileCheck, captured, count, named_inputs, outputs, text
from small_llm import assert_idle, byte_model, byte_tokenizer, make_llm
from torch import nn

from infercomp import LLM, SamplingParams
from infercomp.codegen.config import CodegenConfig
from infercomp.codegen.lower import lower
from infercomp.codegen.model_graph import ModelGraph, aten, value_of
from infercomp.codegen.ops import (
    Op,
    group_linear,
    group_weight_linear,
    int8_embedding,
    int8_linear,
    int8_weight_linear,
    linear,
    merge_weights,
    quantize_per_token,
    quantize_weight_groups,
    quantize_weight_int8,
)
from infercomp.demo_model import demo_model_path
from infercomp.loading.loader import load
from infercomp.passes.config import PassConfig
from infercomp.passes.linear_recipes import GOBO, W4A8, W4A16, W8A8, W8A16, LinearRecipe, Recipe
from infercomp.passes.pipeline import PIPELINE, run_pipeline
from infercomp.passes.recipes import RECIPES, LayerRecipes
from infercomp.passes.record import PassRecord
from infercomp.runtime.errors import ConfigError

PASSES = ("normalize", "recognize_linear", "recognize_gated_mlp", "merge_linears", "quantize_linears")
WIDTH, INNER, VOCABULARY = 128, 256, 50


class Model(nn.Module):
    """An embedding, a gated MLP and a head, tied or not; ``function`` may use them in another way."""

    def __init__(self, *, tied: bool = True, bias: bool = False, function: Callable[..., Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, INNER, bias=bias), nn.Linear(WIDTH, INNER, bias=bias)
        self.down = nn.Linear(INNER, WIDTH, bias=bias)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.function = function
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.embedding(ids)
        if self.function is not None:
            return self.function(self, h)
        h = h + self.down(F.silu(self.gate(h)) * self.up(h))
        return self.head(h / h.square().mean(-1, keepdim=True).sqrt())


def ids() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (1, 7), generator=torch.Generator().manual_seed(1))


def quantized(
    model: nn.Module,
    quantization: str | Recipe | None,
    *,
    passes: tuple[str, ...] = PASSES,
    frozen: bool = True,
    **options: Any,
) -> tuple[ModelGraph, PassRecord]:
    model_graph = captured(model, ids(), dynamic={0: 1})
    model_graph.frozen = frozen
    pipeline = tuple(dataclasses.replace(each, after=()) for each in PIPELINE if each.name in passes)
    config = PassConfig(quantization=quantization, verify=True, **options)
    records = run_pipeline(model_graph, config, example_inputs=named_inputs(model_graph, [ids()]), pipeline=pipeline)
    return model_graph, records[-1]


def error_of(model: nn.Module, model_graph: ModelGraph) -> float:
    with torch.no_grad():
        expected = model(ids())
    (found,) = outputs(model_graph, [ids()])
    assert found.dtype == expected.dtype
    return float((found - expected).norm() / expected.norm())


def test_without_the_option_nothing_happens() -> None:
    model = Model()
    model_graph, record = quantized(model, None)
    assert (record.matches, record.near_misses) == (0, ())
    assert (count(model_graph, linear), count(model_graph, merge_weights)) == (3, 1)
    assert error_of(model, model_graph) < 1e-6


ROW_OPS = {8: int8_linear, 16: int8_weight_linear}
GROUP_OPS = {8: group_linear, 16: group_weight_linear}


def op_of(recipe: LinearRecipe) -> Op:
    return (ROW_OPS if recipe.group_size is None else GROUP_OPS)[recipe.activation_bits]


OF_INTEGERS = [n for n, each in RECIPES.items() if isinstance(each, LinearRecipe) and not isinstance(each, GOBO)]


@pytest.mark.parametrize("name", OF_INTEGERS)
@pytest.mark.parametrize("bias", [False, True])
def test_fires(name: str, bias: bool) -> None:
    model, recipe = Model(bias=bias), RECIPES[name]
    assert isinstance(recipe, LinearRecipe)
    model_graph, record = quantized(model, name)
    assert (record.matches, record.near_misses) == (4, ())
    assert count(model_graph, linear) == count(model_graph, aten.embedding.default) == 0
    assert count(model_graph, merge_weights) == 3 - recipe.symmetric + bias
    body, head = op_of(recipe), ROW_OPS[recipe.activation_bits]
    assert count(model_graph, body) + count(model_graph, head) == (6 if body is head else 3)
    assert count(model_graph, head) == (3 if body is head else 1)
    assert count(model_graph, quantize_per_token) == (3 if recipe.activation_bits == 8 else 0)
    assert count(model_graph, int8_embedding) == 1
    assert 0 < record.max_error < {8: 0.02, 4: 0.15, 3: 0.3}[recipe.weight_bits]
    assert error_of(model, model_graph) < {8: 0.03, 4: 0.2, 3: 0.4}[recipe.weight_bits]


def test_the_graphs_text() -> None:
    model_graph, _ = quantized(Model(), "w4a8-g32")
    check = FileCheck().check("int8_embedding").check("quantize_per_token").check_same(", 32)")
    merges = ", ".join(f"%merge_weights_default_{i}" for i in (1, 2, 3))
    check.check("group_linear").check_same(f"{merges}, None, 4, 32")
    check.check("gated_activation").check("group_linear").check_same("%p_down_weight_int4")
    check.check("quantize_per_token").check_same(f", {WIDTH})").check("int8_linear")
    check.check_same("_weight_int8, %p_").check_same("_weight_scale, None, torch.float32").run(text(model_graph))


@pytest.mark.parametrize("name", ["w8a8", "w4a16-g32", "w4a8-g64-sym"])
def test_integers_replace_the_floats(name: str) -> None:
    model = Model()
    num_floats = sum(parameter.numel() for parameter in model.parameters())
    model_graph, _ = quantized(model, name)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model_graph.weights.values())
    assert num_bytes < num_floats * 1.1
    assert not any(tensor.dtype == torch.float32 and tensor.dim() == 2 for tensor in model_graph.weights.values())
    placeholders = {node.name for node in model_graph.graph.nodes if node.op == "placeholder"}
    assert placeholders == {*model_graph.weights, *model_graph.input_names}
    assert set(model_graph.weight_sources) <= set(model_graph.weights)


@pytest.mark.parametrize("name", ["w8a8", "w4a16-g32", "w4a16-g64-sym", "w3a16-g32"])
def test_each_part_of_a_merged_weight_has_its_integers(name: str) -> None:
    model, recipe = Model(bias=True), RECIPES[name]
    model_graph, _ = quantized(model, name)
    is_int8 = recipe.group_size is None
    parts = (("int8", ""), ("scale", "_scale"), ("zero", "_zero_point"))
    parts = parts if is_int8 else ((f"int{recipe.weight_bits}", "_packed"), *parts[1:])
    for layer in ("gate", "up", "down"):
        weight = getattr(model, layer).weight.detach()
        arguments = [] if is_int8 else [recipe.weight_bits, recipe.group_size, recipe.symmetric]
        expected = (quantize_weight_int8 if is_int8 else quantize_weight_groups)(weight, *arguments)
        for (part, source), tensor in list(zip(parts, expected, strict=False))[: 3 - recipe.symmetric]:
            assert torch.equal(model_graph.weights[f"p_{layer}_weight_{part}"], tensor)
            assert model_graph.weight_sources[f"p_{layer}_weight_{part}"] == f"{layer}.weight{source}"
    assert ("p_gate_weight_zero" in model_graph.weights) == (not recipe.symmetric)
    op = op_of(recipe).overload
    merged = next(node for node in model_graph.calls(op) if value_of(node).shape[-1] == 2 * INNER)
    merges = [source for source in merged.all_input_nodes if source.target == merge_weights.overload]
    sources = {tuple(model_graph.weight_sources[each.name] for each in merge.args[0]) for merge in merges}
    suffixes = [source for _, source in parts[: 3 - recipe.symmetric]]
    expected_sources = {tuple(f"{layer}.weight{suffix}" for layer in ("gate", "up")) for suffix in suffixes}
    assert sources == expected_sources | {("gate.bias", "up.bias")}


@pytest.mark.parametrize("name", ["w8a8", "w4a16-g32"])
@pytest.mark.parametrize("codegen", ["reference", "cpp"])
def test_integers_are_held_once(name: str, codegen: str) -> None:
    """Binding leaves no integers beside those that the step reads: they are views of the merge, or gone."""
    model_graph, _ = quantized(Model(tied=False, bias=True), name)
    bound = lower(model_graph, CodegenConfig(codegen=codegen)).bind_releasing(model_graph.weights)
    read = {tensor.untyped_storage().data_ptr() for tensor in bound._weights}
    held = {tensor.untyped_storage().data_ptr() for tensor in model_graph.weights.values()}
    assert held <= read
    is_left = any(node.endswith(("int8", "int4")) for node in model_graph.weights)
    assert is_left == (codegen == "reference")


def test_large_weights_are_quantized_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = quantized(Model(), "w4a8-g32")
    monkeypatch.setattr("infercomp.passes.quantize_linears._CHUNK_ELEMENTS", 1000)
    parts, _ = quantized(Model(), "w4a8-g32")
    assert whole.weights.keys() == parts.weights.keys()
    assert all(torch.equal(whole.weights[name], parts.weights[name]) for name in whole.weights)


def test_linears_of_one_input_share_its_quantization() -> None:
    model_graph, record = quantized(Model(), "w8a8", disable=("merge_linears",))
    assert record.matches == 5
    assert (count(model_graph, int8_linear), count(model_graph, quantize_per_token)) == (4, 3)


def test_an_embedding_of_its_own_stays() -> None:
    model = Model(tied=False)
    model_graph, record = quantized(model, "w8a8")
    assert (record.matches, count(model_graph, aten.embedding.default)) == (3, 1)
    assert torch.equal(model_graph.weights["p_embedding_weight"], model.embedding.weight)
    assert "p_head_weight" not in model_graph.weights


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_may_stay_with_its_embedding(tied: bool) -> None:
    model = Model(tied=tied)
    model_graph, record = quantized(model, "w4a8-g32", quantize_lm_head=False)
    (miss,) = record.near_misses
    assert miss.reason == "it is the LM head, and quantize_lm_head is off"
    assert (record.matches, count(model_graph, linear), count(model_graph, aten.embedding.default)) == (2, 1, 1)
    (head,) = model_graph.calls(linear.overload)
    assert torch.equal(model_graph.weights[head.args[1].name], model.head.weight)


@pytest.mark.parametrize("quantize_lm_head", [False, True])
def test_the_head_is_found_behind_casts_and_pointwise_calls(quantize_lm_head: bool) -> None:
    model = Model(tied=False, function=lambda m, h: torch.tanh(m.head(h).double() / 30) * 30)
    model_graph, record = quantized(model, "w4a8-g32", quantize_lm_head=quantize_lm_head)
    assert (record.matches, count(model_graph, int8_linear)) == (quantize_lm_head, quantize_lm_head)


def test_one_match_may_be_left_out() -> None:
    model = Model()
    model_graph, record = quantized(model, "w8a8", disable=("quantize_linears#1",))
    assert (record.matches, record.skipped) == (3, 1)
    (left,) = model_graph.calls(linear.overload)
    assert left.args[1].name == "p_down_weight"
    assert error_of(model, model_graph) < 0.03


def test_a_disabled_embedding_keeps_its_floats() -> None:
    model_graph, _ = quantized(Model(), "w8a8", disable=("quantize_linears#3",))
    (embedding,) = model_graph.calls(aten.embedding.default)
    assert embedding.args[0].name in model_graph.weights
    assert count(model_graph, int8_linear) == 3


NEAR_MISSES: dict[str, tuple[Callable[..., Any], str]] = {
    "weight is computed": (lambda m, h: F.linear(h, m.down.weight.t() * 2), "its weight is computed"),
    "weight is used elsewhere": (lambda m, h: m.gate(h) + m.gate.weight.sum(), "its weight is also used elsewhere"),
    "weight is also an input": (
        lambda m, h: m.gate(h).sum() + F.linear(m.gate.weight, m.up.weight),
        "its weight is also used elsewhere",
    ),
}


@pytest.mark.parametrize(("function", "reason"), NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_miss_is_left_and_recorded(function: Callable[..., Any], reason: str) -> None:
    model = Model(tied=False, function=function)
    model_graph, record = quantized(model, "w4a8-g32")
    assert reason in {miss.reason.split(",")[0] for miss in record.near_misses}
    assert count(model_graph, linear) == len(record.near_misses) == 1
    assert error_of(model, model_graph) < 0.2


def narrow_model(num_channels: int) -> Model:
    function = lambda m, h: torch.softmax(F.linear(h[..., :num_channels], m.narrow.weight), -1)  # noqa: E731
    model = Model(tied=False, function=function)
    model.narrow = nn.Linear(num_channels, 4, bias=False)
    return model


@pytest.mark.parametrize("frozen", [False, True])
def test_groups_that_do_not_divide_are_refused(frozen: bool) -> None:
    with pytest.raises(ConfigError, match="32 does not divide the 48 input channels of narrow") as caught:
        quantized(narrow_model(48), "w4a8-g32", frozen=frozen)
    assert caught.value.field == "group_size"
    left_out = LayerRecipes((("narrow", None), ("*", W4A8())))
    with pytest.raises(ConfigError, match="layers names no linear"):
        quantized(Model(tied=False), left_out)
    model_graph, record = quantized(narrow_model(48), left_out, frozen=frozen)
    assert [miss.reason for miss in record.near_misses] == ["the recipe leaves it in floats"]
    assert count(model_graph, linear) == 1


def test_layers_have_recipes_of_their_own() -> None:
    model = Model(tied=False)
    recipe = LayerRecipes((("head", None), ("down", W8A16()), ("*", W4A16(64, True))))
    model_graph, record = quantized(model, recipe)
    assert (record.matches, [miss.reason for miss in record.near_misses]) == (2, ["the recipe leaves it in floats"])
    (merged,), (down,), (head,) = (
        model_graph.calls(op.overload) for op in (group_weight_linear, int8_weight_linear, linear)
    )
    assert (value_of(merged).shape[-1], merged.args[-1]) == (2 * INNER, 64)
    assert (down.args[1].name, head.args[1].name) == ("p_down_weight_int8", "p_head_weight")
    assert error_of(model, model_graph) < 0.2


def test_a_tied_head_is_known_by_both_names_and_has_8_bits() -> None:
    for name in ("head", "embedding"):
        recipe = LayerRecipes(((name, W4A16()),))
        model_graph, record = quantized(Model(), recipe)
        assert (count(model_graph, int8_weight_linear), count(model_graph, int8_embedding)) == (1, 1)
        assert {miss.reason for miss in record.near_misses} == {"the recipe leaves it in floats"}


def test_a_pattern_that_no_layer_fits_is_refused_where_the_model_is_whole() -> None:
    recipe = LayerRecipes((("doun", W8A8()), ("*", W4A8())))
    with pytest.raises(ConfigError, match=r"no linear: 'doun'\n.*nearest is down$") as caught:
        quantized(Model(), recipe)
    assert caught.value.field == "layers"
    model_graph, record = quantized(Model(), recipe, frozen=False, quantize_lm_head=False)
    assert "no linear of this graph fits the recipe's 'doun'" in {miss.reason for miss in record.near_misses}
    assert count(model_graph, group_linear) == 2


def test_parts_of_one_product_need_one_recipe() -> None:
    recipe = LayerRecipes((("gate", W8A8()), ("*", W4A8())))
    with pytest.raises(ConfigError, match="gate and up are computed as one product and need one recipe") as caught:
        quantized(Model(), recipe)
    assert caught.value.field == "layers"
    model_graph, _ = quantized(Model(), recipe, disable=("merge_linears",))
    assert (count(model_graph, int8_linear), count(model_graph, group_linear)) == (2, 2)


def test_a_linear_without_groups_takes_any_number_of_channels() -> None:
    model = narrow_model(47)
    model_graph, record = quantized(model, "w8a8")
    assert (record.matches, count(model_graph, int8_linear)) == (1, 1)
    assert error_of(model, model_graph) < 0.05


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["w8a8", "w4a16-g32"])
def test_a_weight_stored_the_other_way(name: str, frozen: bool) -> None:
    model = Model(tied=False, function=lambda m, h: torch.softmax(torch.addmm(m.bias, h[0], m.matrix), -1))
    model.bias, model.matrix = nn.Parameter(torch.randn(96)), nn.Parameter(torch.randn(WIDTH, 96))
    model_graph, record = quantized(model, name, frozen=frozen)
    assert (record.matches, count(model_graph, linear)) == (1, 0)
    assert error_of(model, model_graph) < 0.3


@pytest.mark.parametrize("name", ["w8a8", "w4a8-g32", "w4a16-g64-sym", "w3a16-g64-sym"])
def test_weights_of_the_user_are_quantized_in_the_graph(name: str) -> None:
    """The same numbers as from integers that are held, and a change of a parameter is seen."""
    model = Model(bias=True)
    held, _ = quantized(model, name, quantize_lm_head=False)
    model_graph, record = quantized(model, name, frozen=False, quantize_lm_head=False)
    quantize_op = quantize_weight_int8 if name == "w8a8" else quantize_weight_groups
    assert (record.matches, count(model_graph, quantize_op)) == (2, 2)
    assert {f"p_{each}_weight" for each in ("gate", "up", "down")} <= set(model_graph.weights)
    assert torch.equal(outputs(model_graph, [ids()])[0], outputs(held, [ids()])[0])
    with torch.no_grad():
        model.down.weight.mul_(-3)
    assert error_of(model, model_graph) < 0.2 < error_of(model, held)


def test_two_linears_of_one_weight_share_its_integers() -> None:
    for frozen in (False, True):
        model = Model(tied=False, function=lambda m, h: torch.softmax(m.gate(h) + m.gate(h.exp()), -1))
        model_graph, record = quantized(model, "w8a8", frozen=frozen)
        assert (record.matches, record.near_misses) == (2, ())
        first, second = model_graph.calls(int8_linear.overload)
        assert first.args[3:5] == second.args[3:5]


# Groups of 64 fit the 64 channels in this model's MLP, and not the 32 of the others.
SERVED = {
    **{name: RECIPES[name] for name in ("w8a8", "w8a16", "w4a8-g32")},
    "w4a16-g64-sym": LayerRecipes((("mlp.down_proj", W4A16(64, True)), ("lm_head", W8A16()))),
}


@pytest.mark.parametrize("name", SERVED)
def test_llm_serves_integers(name: str) -> None:
    llm = make_llm(quantization=SERVED[name], verify=True)
    prompts = [{"prompt_token_ids": list(range(start, start + 9))} for start in (3, 40, 90)]
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    together = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    assert together == [llm.generate(prompt, params)[0].outputs[0].token_ids for prompt in prompts]
    assert_idle(llm)
    (record,) = (each for each in llm.report.passes if each.name == "quantize_linears")
    assert record.matches > 0 and 0 < record.max_error < (0.03 if name.startswith("w8") else 0.2)
    if name.startswith("w8"):
        tokens = prompts[0]["prompt_token_ids"]
        with torch.inference_mode():
            expected = byte_model()(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
        found = llm.logits(tokens).log_softmax(-1)
        assert (expected.exp() * (expected - found)).sum(-1).mean() < 0.01


def test_llm_holds_no_float_weights() -> None:
    """But for its embedding, which this model does not share with its head."""
    weights = make_llm(quantization="w8a8")._served._bound._weights
    (embedding,) = (tensor for tensor in weights if tensor.is_floating_point() and tensor.numel() > 1024)
    assert embedding.shape == (len(byte_tokenizer()), 32)


@pytest.mark.parametrize("name", ["w8a8", "w4a16-g32"])
def test_torch_compile_quantizes(name: str) -> None:
    model, tokens = byte_model(), torch.arange(3, 20)[None]
    with torch.inference_mode():
        compiled = torch.compile(model, backend="infercomp", options={"quantization": name, "strict": True})
        for _ in range(2):
            expected = model(input_ids=tokens, use_cache=False).logits
            found = compiled(input_ids=tokens, use_cache=False).logits
            error = float((found - expected).norm() / expected.norm())
            assert 1e-5 < error < (0.05 if name == "w8a8" else 0.6)
            model.model.layers[0].mlp.down_proj.weight.mul_(-2.0)


@pytest.fixture(scope="module")
def demo_tokens() -> list[int]:
    """The first 512 tokens of prose that every CPython has."""
    topics = pydoc_data.topics.topics
    return load(demo_model_path()).tokenizer(topics["assert"] + topics["with"])["input_ids"][:512]


@pytest.fixture(scope="module")
def demo_log_probabilities(demo_tokens: list[int]) -> torch.Tensor:
    model = load(demo_model_path()).model
    with torch.inference_mode():
        return model(input_ids=torch.tensor([demo_tokens])).logits[0].log_softmax(-1)


# Mean KL divergence to float32 over the text. The model's weights, of 4 bits in groups of 32 that start anywhere, lose
# nothing at 8 bits; what w8a8 loses it loses to the activations.
LARGEST_DIVERGENCE = {"w8a8": 0.06, "w8a16": 0.01, "w4a8-g32": 0.4, "w4a16-g32": 0.4}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGEST_DIVERGENCE)
def test_the_demo_model_still_knows(
    name: str, demo_tokens: list[int], demo_log_probabilities: torch.Tensor, record_property: Callable[..., None]
) -> None:
    llm = LLM(demo_model_path(), quantization=name, num_blocks=64)
    answer = llm.generate("The capital of France is", SamplingParams(temperature=0.0, max_tokens=8))[0].outputs[0].text
    assert "Paris" in answer
    found = llm.logits(demo_tokens).log_softmax(-1)
    divergence = float((demo_log_probabilities.exp() * (demo_log_probabilities - found)).sum(-1).mean())
    record_property("mean_divergence", divergence)
    print(f"{name}: mean KL divergence {divergence:.4f} over {len(demo_tokens)} tokens, answers {answer!r}")
    assert divergence <= LARGEST_DIVERGENCE[name]
