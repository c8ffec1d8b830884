"""quantize_kv_cache: caches of codes with a scale for each token and head, and models that are served by them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_llm import assert_idle, make_llm
from transformers import LlamaConfig, LlamaForCausalLM

from infercomp import LLM, SamplingParams
from infercomp.account import size_of
from infercomp.codegen.grouping import Planner
from infercomp.codegen.model_graph import ModelGraph, value_of
from infercomp.codegen.ops import paged_attention, write_kv
from infercomp.passes.config import PassConfig
from infercomp.passes.pipeline import run_pipeline
from infercomp.passes.record import PassRecord
from infercomp.runtime.errors import ConfigError
from infercomp.serving import _cache_specs, capture_for_serving

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


def model(head_dim: int = 16) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=4 * head_dim, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=40, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def quantized(head_dim: int = 16, **options: Any) -> tuple[ModelGraph, dict[str, PassRecord]]:
    model_graph, examples = capture_for_serving(model(head_dim), 64)
    config = PassConfig(**{"kv_cache_dtype": "int8", "verify": True, **options})
    records = run_pipeline(model_graph, config, serving=True, example_inputs=examples)
    return model_graph, {record.name: record for record in records}


def caches(model_graph: ModelGraph) -> dict[str, tuple[torch.dtype, int]]:
    values = {name: value_of(model_graph.placeholder(name)) for name in model_graph.input_names}
    return {name: (value.dtype, value.dim()) for name, value in values.items() if name.startswith("layer_")}


@pytest.mark.parametrize(("layout", "tile"), [("rows", 0), ("tiled", 4)])
def test_every_layer_has_codes_and_scales(layout: str, tile: int) -> None:
    model_graph, records = quantized(kv_cache_layout=layout)
    record = records["quantize_kv_cache"]
    assert record.matches == 2 and record.max_error is not None and 0 < record.max_error < 0.02
    codes, scales = (torch.int8, 5 if tile else 4), (torch.float32, 3)
    assert caches(model_graph) == {
        f"layer_{i}_{role}{suffix}": kind
        for i in range(2)
        for role in ("key", "value")
        for suffix, kind in (("", codes), ("_scale", scales))
    }
    for node in model_graph.calls(write_kv.overload, paged_attention.overload):
        assert node.kwargs["tile"] == tile and node.kwargs["key_scale"] is not node.kwargs["value_scale"]
    # Passes that come after it are still bit-identical.
    assert records["fuse_rotary_write"].max_error == 0.0


def test_without_the_option_nothing_happens() -> None:
    model_graph, records = quantized(kv_cache_dtype="auto", verify=False)
    assert records["quantize_kv_cache"].matches == 0
    assert {kind for kind, _ in caches(model_graph).values()} == {torch.float32}


def test_one_layer_switched_off_keeps_its_floats() -> None:
    model_graph, records = quantized(disable=("quantize_kv_cache#0",))
    assert (records["quantize_kv_cache"].matches, records["quantize_kv_cache"].skipped) == (1, 1)
    kinds = {name: kind for name, (kind, _) in caches(model_graph).items()}
    assert kinds["layer_0_key"] == torch.float32 and "layer_0_key_scale" not in kinds
    assert kinds["layer_1_key"] == torch.int8
    specs = _cache_specs(model_graph)
    assert [(spec.is_int8, spec.dtype) for spec in specs] == [(False, torch.float32), (True, torch.float32)]


def refusals(model_graph: ModelGraph, language: str) -> dict[object, str]:
    """Why calls have no kernel in this language; nothing is compiled."""
    return {node.target: reason for node, reason in Planner(model_graph, language).plan().refused.items()}


def test_heads_that_are_no_whole_words_run_as_definitions_with_the_reason() -> None:
    """Six channels are no whole words of four codes."""
    assert paged_attention.overload not in refusals(quantized(kv_cache_layout="tiled", verify=False)[0], "cpp")
    model_graph, records = quantized(head_dim=6, kv_cache_layout="tiled")
    assert records["quantize_kv_cache"].matches == 2
    assert "the head size of 4" in refusals(model_graph, "cpp")[paged_attention.overload]


def test_triton_kernels_refuse_it_with_the_reason() -> None:
    model_graph, _ = quantized(kv_cache_layout="rows", verify=False)
    reason = refusals(model_graph, "triton")[paged_attention.overload]
    assert reason == "the cache is int8, which only the C++ kernels read"


@pytest.mark.parametrize("wrong", ["int4", "INT8", "", None, 8, True])
def test_wrong_values_are_typed_errors(wrong: object) -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype must be auto or int8") as caught:
        PassConfig(kv_cache_dtype=wrong)  # type: ignore[arg-type]
    assert caught.value.field == "kv_cache_dtype"


# ---- served ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm() -> LLM:
    return make_llm(codegen="cpp", block_size=16, kv_cache_dtype="int8")


def test_the_pools_take_what_the_account_says(llm: LLM) -> None:
    specs = llm._served.form.cache_specs
    per_token = sum(2 * spec.num_kv_heads * (spec.head_dim + 4) for spec in specs)
    assert size_of(llm._served).kv_bytes_per_token == per_token
    budget = make_llm(block_size=16, kv_cache_dtype="int8", num_blocks=None, kv_cache_bytes=10 * 16 * per_token)
    assert budget.num_blocks == 10


def test_a_saved_model_gives_the_same_bits(llm: LLM, tmp_path: Path) -> None:
    llm.save(tmp_path / "saved")
    saved = LLM(str(tmp_path / "saved"), codegen="cpp")
    assert saved._served.form.cache_specs == llm._served.form.cache_specs
    tokens = list(range(1, 60))
    assert torch.equal(saved.logits(tokens), llm.logits(tokens))
    with pytest.raises(ConfigError) as caught:
        LLM(str(tmp_path / "saved"), codegen="cpp", kv_cache_layout="rows")
    assert caught.value.field == "kv_cache_layout"


def test_forks_share_their_prompt(llm: LLM) -> None:
    """Three sequences of one prompt draw what each draws with the prompt to itself, and leave nothing behind."""
    drawn = replace(GREEDY, temperature=1.0, seed=7)
    (together,) = llm.generate("Once upon a time", replace(drawn, n=3), use_tqdm=False)
    for index, output in enumerate(together.outputs):
        (alone,) = llm.generate("Once upon a time", replace(drawn, seed=7 + index), use_tqdm=False)
        assert alone.outputs[0].token_ids == output.token_ids
    assert_idle(llm)


def test_preempted_sequences_go_on_as_if_nothing_happened(llm: LLM) -> None:
    prompts = ["abc" * 5, "Once upon", "xyz" * 4]
    params = replace(GREEDY, max_tokens=40)
    expected = [each.outputs[0].token_ids for each in llm.generate(prompts, params, use_tqdm=False)]
    starved = make_llm(codegen="cpp", block_size=16, kv_cache_dtype="int8", num_blocks=6)
    assert [each.outputs[0].token_ids for each in starved.generate(prompts, params, use_tqdm=False)] == expected
    assert starved.stats.num_preemptions > 0
    assert_idle(starved)
