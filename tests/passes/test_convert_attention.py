"""convert_attention: equal heads merge with no error, alike heads are found and aligned, mistakes are named."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import transformers
from families import DECODERS, VOCAB_SIZE, enliven
from graph_testing import captured
from hypothesis import given, settings
from hypothesis import strategies as st
from small_llm import byte_model, byte_tokenizer
from torch import nn

from infercomp import LLM, GroupedQuery, SamplingParams
from infercomp.codegen.model_graph import ModelGraph, shape_of
from infercomp.codegen.ops import attention
from infercomp.config import parse_options
from infercomp.passes import head_merging
from infercomp.passes.calibration import Calibration
from infercomp.passes.config import PassConfig
from infercomp.passes.convert_attention import CONVERT_ATTENTION
from infercomp.passes.grouped_query import MERGES, grouped_query_of
from infercomp.passes.head_alignment import Turns, aligned, alike, nearest_turns
from infercomp.passes.pipeline import PIPELINE, run_pipeline
from infercomp.passes.record import PassRecord
from infercomp.runtime.errors import ConfigError
from infercomp.serving import capture_for_serving, position_limit

BEFORE = PIPELINE[: [each.name for each in PIPELINE].index("convert_attention")]
GENERATOR = torch.Generator().manual_seed(3)
SAMPLES = tuple(
    {"input_ids": torch.randint(3, VOCAB_SIZE, (1, 60), generator=GENERATOR), "position_ids": torch.arange(60)[None]}
    for _ in range(2)
)
TEXT = ["The quick brown fox jumps over the lazy dog. " * 8]


def recognized(model: nn.Module) -> tuple[ModelGraph, dict[str, torch.Tensor]]:
    """The graph as the pass meets it, and example inputs."""
    model_graph, examples = capture_for_serving(model, position_limit(model))
    run_pipeline(model_graph, PassConfig(), pipeline=BEFORE)
    return model_graph, examples


def convert(
    model_graph: ModelGraph,
    examples: dict[str, torch.Tensor] | None,
    kv_heads: GroupedQuery,
    calibration: Calibration | None = None,
    **options: Any,
) -> PassRecord:
    """Run the pass, measured in float64 against the graph before it where there are examples."""
    if kv_heads.needs_calibration and calibration is None:
        calibration = Calibration(SAMPLES)
    (record,) = run_pipeline(
        model_graph,
        PassConfig(kv_heads=kv_heads, verify=examples is not None, **options),
        example_inputs=examples,
        calibration=calibration,
        evaluation=SAMPLES[:1],
        pipeline=(dataclasses.replace(CONVERT_ATTENTION, after=()),),
    )
    return record


def llama(num_kv_heads: int = 4, family: str = "llama", **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    known = {**DECODERS[family].config_arguments, "num_key_value_heads": num_kv_heads, **arguments}
    model = transformers.AutoModelForCausalLM.from_config(DECODERS[family].config_class(**known))
    enliven(model)
    return model.double().eval().requires_grad_(False)


def attentions(model: nn.Module) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


@torch.no_grad()
def make_heads_equal(model: nn.Module, source_of: list[int]) -> None:
    """Head h of keys and values becomes head ``source_of[h]``, weights and biases."""
    for each in attentions(model):
        for linear in (each.k_proj, each.v_proj):
            for parameter in linear.parameters():
                parameter.copy_(parameter.unflatten(0, (len(source_of), -1))[source_of].flatten(0, 1))


@torch.no_grad()
def turn_heads(model: nn.Module, seed: int = 5) -> None:
    """Turn each head of keys by an angle for each rotary pair, or by signs behind a norm, and each head of values by
    any orthogonal map, and undo it in the queries and behind attention: the model stays what it is."""
    generator = torch.Generator().manual_seed(seed)
    for each in attentions(model):
        size = each.head_dim
        num_heads = each.v_proj.weight.shape[0] // size
        repeats = each.q_proj.weight.shape[0] // size // num_heads
        turns = Turns(size, tuple(range(size // 2)), tuple(range(size // 2, size)), hasattr(each, "k_norm"))
        for head in range(num_heads):
            drawn = torch.randn(2, size, size, dtype=torch.float64, generator=generator)
            key, value = nearest_turns(drawn[0], turns), nearest_turns(drawn[1], Turns(size))
            rows = slice(head * size, (head + 1) * size)
            for linear, change in ((each.k_proj, key), (each.v_proj, value)):
                for parameter in linear.parameters():
                    parameter[rows] = change.t() @ parameter[rows]
            for query_head in range(head * repeats, (head + 1) * repeats):
                rows = slice(query_head * size, (query_head + 1) * size)
                for parameter in each.q_proj.parameters():
                    parameter[rows] = key.t() @ parameter[rows]
                each.o_proj.weight[:, rows] = each.o_proj.weight[:, rows] @ value


def planted(family: str, source_of: list[int]) -> tuple[ModelGraph, dict[str, torch.Tensor]]:
    """Heads that are equal but for how each of them is turned."""
    model = llama(len(source_of), family)
    make_heads_equal(model, source_of)
    turn_heads(model)
    return recognized(model)


def kv_head_counts(model_graph: ModelGraph) -> list[int]:
    return [int(shape_of(node.args[1])[1]) for node in model_graph.calls(attention.overload)]  # type: ignore[arg-type]


@pytest.mark.parametrize("merge", MERGES)
def test_equal_heads_merge_with_no_error(merge: str) -> None:
    model = llama(4, "qwen2")
    make_heads_equal(model, [0, 0, 2, 2])
    model_graph, examples = recognized(model)
    record = convert(model_graph, examples, GroupedQuery(2, merge))
    assert record.max_error is not None and record.max_error <= 1e-9
    assert kv_head_counts(model_graph) == [2, 2]
    assert len(record.layer_errors) == 2 and max(each.relative_error for each in record.layer_errors) <= 1e-9
    shapes = {tuple(tensor.shape) for name, tensor in model_graph.weights.items() if "k_proj_weight" in name}
    assert shapes == {(16, 32)}


@pytest.mark.parametrize(
    ("family", "source_of"), [("llama", [0, 0, 0, 0]), ("qwen2", [0, 1, 0, 1]), ("qwen3", [0, 1, 1, 0])], ids=str
)
def test_alike_heads_are_found_wherever_they_are_and_however_they_are_turned(family: str, source_of: list[int]) -> None:
    groups = len(set(source_of))
    model_graph, examples = planted(family, source_of)
    record = convert(model_graph, examples, GroupedQuery(groups, "aligned"))
    assert record.matches == 2
    # What draws a map to the identity, a millionth, is all that is left of the heads' turns.
    assert record.max_error is not None and record.max_error <= 1e-4
    model_graph, examples = planted(family, source_of)
    by_mean = convert(model_graph, examples, GroupedQuery(groups, "mean"))
    assert by_mean.max_error is not None and by_mean.max_error > 0.1


@pytest.mark.parametrize("bug", ["merged", "query_order"])
def test_a_planted_bug_is_seen(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if bug == "merged":
        right = head_merging.HeadPlan.merged
        monkeypatch.setattr(
            head_merging.HeadPlan,
            "merged",
            lambda plan, heads, maps: right(plan, heads, None if maps is None else maps.mT),
        )
    else:
        monkeypatch.setattr(head_merging.HeadPlan, "query_order", lambda plan, count: list(range(count)))
    model_graph, examples = planted("llama", [0, 1, 0, 1])
    record = convert(model_graph, examples, GroupedQuery(2, "aligned"))
    assert record.max_error is not None and record.max_error > 0.01


# Biases; heads beside those of queries, in fused weights that lie one way or the other; partial rotary; no rotary.
FAMILIES = ("opt", "gpt2", "gpt_neox", "gptj", "phi3", "bloom")


@pytest.mark.parametrize("name", FAMILIES)
def test_aligning_alone_is_an_identity_wherever_heads_lie(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were no heads merged, turning and reordering them would change nothing."""
    family = DECODERS[name]
    model = family.build(family.attn_implementations[0]).double()
    model_graph, examples = recognized(model)
    before = kv_head_counts(model_graph)

    def turned(key_moments: torch.Tensor, value_moments: torch.Tensor, turns: Turns, *_: Any, **__: Any) -> Any:
        count = len(key_moments)
        maps = nearest_turns(torch.randn_like(key_moments[0]), turns)
        values = nearest_turns(torch.randn_like(value_moments[0]), Turns(value_moments.shape[-1]))
        groups = tuple((head,) for head in (range(count) if name == "bloom" else range(count - 1, -1, -1)))
        return head_merging.HeadPlan(groups, torch.ones(count), maps, values)

    monkeypatch.setattr("infercomp.passes.convert_attention.plan_by_moments", turned)
    record = convert(model_graph, examples, GroupedQuery(1, "aligned"))
    assert record.matches == 2 and kv_head_counts(model_graph) == before
    assert record.max_error is not None and record.max_error <= 1e-9


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1 << 16), num_heads=st.integers(2, 5), pairs=st.integers(0, 3), rest=st.integers(0, 3))
def test_maps_are_orthogonal_and_undo_turns(seed: int, num_heads: int, pairs: int, rest: int) -> None:
    if pairs + rest == 0:
        rest = 1
    turns = Turns(2 * pairs + rest, tuple(range(0, 2 * pairs, 2)), tuple(range(1, 2 * pairs, 2)))
    generator = torch.Generator().manual_seed(seed)
    one = torch.randn(200, turns.size, dtype=torch.float64, generator=generator)
    drawn = torch.randn(num_heads, turns.size, turns.size, dtype=torch.float64, generator=generator)
    hidden = nearest_turns(drawn, turns)
    heads = torch.einsum("ta,hab->htb", one, hidden)
    moments = torch.einsum("hta,itb->hiab", heads, heads)
    maps = aligned(moments, turns)
    identity = torch.eye(turns.size, dtype=torch.float64).expand_as(maps)
    assert torch.allclose(maps @ maps.mT, identity, atol=1e-9)
    laid = torch.einsum("hta,hab->htb", heads, maps)
    assert torch.allclose(laid, laid[:1].expand_as(laid), atol=1e-4)


def test_groups_are_of_heads_that_are_near() -> None:
    apart = torch.ones(6, 6)
    for one, other in ((0, 5), (1, 3), (2, 4)):
        apart[one, other] = apart[other, one] = 0.1
    assert alike(apart, 3) == [[0, 5], [1, 3], [2, 4]]
    assert alike(torch.ones(4, 4), 2) == [[0, 1], [2, 3]]


def test_first_and_random_take_heads_whole() -> None:
    model = llama(4)
    whole = attentions(model)[0].k_proj.weight.detach().unflatten(0, (4, -1))
    taken = {}
    for wanted in (GroupedQuery(1, "first"), GroupedQuery(1, "random", 1), GroupedQuery(1, "random", 1)):
        model_graph, _ = recognized(model)
        convert(model_graph, None, wanted)
        (name,) = (each for each in model_graph.weights if "layers_0_self_attn_k_proj" in each)
        found = [head for head in range(4) if torch.equal(whole[head], model_graph.weights[name])]
        assert taken.setdefault(wanted, found) == found and len(found) == 1
    assert taken[GroupedQuery(1, "first")] == [0]


def test_one_match_may_be_left_out_and_layers_of_few_heads_stay() -> None:
    model_graph, examples = recognized(llama(4))
    record = convert(model_graph, examples, GroupedQuery(2), disable=("convert_attention#1",))
    assert (record.matches, record.skipped, kv_head_counts(model_graph)) == (1, 1, [2, 4])
    model_graph, examples = recognized(llama(2))
    record = convert(model_graph, examples, GroupedQuery(2))
    assert record.matches == 0 and "2 heads of keys and values already" in record.near_misses[0].reason


@pytest.mark.parametrize("groups", [3, 8])
def test_groups_that_do_not_divide_are_refused_before_anything_changes(groups: int) -> None:
    model_graph, _ = recognized(llama(4))
    before = dict(model_graph.weights)
    with pytest.raises(ConfigError, match=f"kv_heads={groups} does not divide the 4 heads") as caught:
        convert(model_graph, None, GroupedQuery(groups))
    assert caught.value.field == "kv_heads" and "1, 2, 4" in str(caught.value.remedy)
    assert all(model_graph.weights[name] is tensor for name, tensor in before.items())


def test_what_is_missing_is_named() -> None:
    model_graph, _ = recognized(llama(4))
    with pytest.raises(ConfigError, match="need samples") as caught:
        run_pipeline(
            model_graph,
            PassConfig(kv_heads=GroupedQuery(1, "aligned")),
            pipeline=(dataclasses.replace(CONVERT_ATTENTION, after=()),),
        )
    assert caught.value.field == "calibration"
    model_graph.frozen = False
    with pytest.raises(ConfigError, match="are the user's") as caught:
        convert(model_graph, None, GroupedQuery(1))
    assert caught.value.field == "kv_heads"
    without = captured(lambda x: x * 2, torch.ones(3))
    without.frozen = True
    with pytest.raises(ConfigError, match="no attention was recognised") as caught:
        convert(without, None, GroupedQuery(1))
    assert caught.value.field == "kv_heads"


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ('{"groups": 0}', "groups"),
        ('{"groups": 1, "merge": "median"}', "merge"),
        ('{"groups": 1, "seed": -1}', "seed"),
        ('{"groups": 1, "heads": 2}', "heads"),
        ('{"merge": "mean"}', "kv_heads"),
        ("many", "kv_heads"),
        ("true", "groups"),
        (3, "kv_heads"),
    ],
)
def test_a_wrong_option_names_its_field(value: Any, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_options({"kv_heads": value}, {})
    assert caught.value.field == field


def test_json_is_the_same_value_and_fingerprint() -> None:
    wanted = GroupedQuery(2, "random", 7)
    assert grouped_query_of(wanted.to_json()) == wanted and grouped_query_of("2") == GroupedQuery(2)
    given_as = [parse_options({"kv_heads": each}, {}) for each in (wanted, wanted.to_json())]
    assert given_as[0].fingerprint() == given_as[1].fingerprint() != parse_options({}, {}).fingerprint()


def test_llm_serves_fewer_heads_from_a_smaller_cache_and_is_saved(tmp_path: Any) -> None:
    options: dict[str, Any] = {"num_blocks": 64, "block_size": 4}
    whole = LLM(byte_model(), byte_tokenizer(), **options)
    llm = LLM(
        byte_model(),
        byte_tokenizer(),
        kv_heads=GroupedQuery(1, "aligned"),
        quantization="w8a8",
        calibration=TEXT,
        evaluation=TEXT,
        **options,
    )
    sizes = [sum(spec.bytes_per_token for spec in each._served.form.cache_specs) for each in (whole, llm)]
    assert sizes[0] == 2 * sizes[1]
    assert llm.report.matches_of("convert_attention") == 2 and llm.report.matches_of("merge_linears") == 4
    assert {"model.model.layers.0.self_attn", "model.model.layers.0.mlp.down_proj"} <= set(llm.report.layer_errors)
    params = SamplingParams(max_tokens=8, temperature=0.0)
    before = llm.generate("The quick", params)[0].outputs[0].token_ids
    llm.save(tmp_path / "saved")
    saved = LLM(tmp_path / "saved", kv_heads=GroupedQuery(1, "aligned"), **options)
    assert saved.generate("The quick", params)[0].outputs[0].token_ids == before
    with pytest.raises(ConfigError) as caught:
        LLM(tmp_path / "saved", kv_heads="1", **options)
    assert caught.value.field == "kv_heads"


def test_saved_floats_are_a_checkpoint_of_transformers(tmp_path: Any) -> None:
    llm = LLM(byte_model(), byte_tokenizer(), kv_heads="1", num_blocks=64, block_size=4)
    llm.save(tmp_path / "saved")
    tokens = list(range(3, 40))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.config.num_key_value_heads == 1
    with torch.inference_mode():
        expected = loaded(input_ids=torch.tensor([tokens])).logits[0]
    assert torch.allclose(llm.logits(tokens), expected, atol=1e-3, rtol=1e-3)


def test_calibration_is_asked_for_where_it_is_needed_and_nowhere_else() -> None:
    with pytest.raises(ConfigError, match="the option kv_heads needs calibration data") as caught:
        LLM(byte_model(), byte_tokenizer(), kv_heads=GroupedQuery(1, "aligned"))
    assert caught.value.field == "calibration"
    with pytest.raises(ConfigError, match="calibration data") as caught:
        LLM(byte_model(), byte_tokenizer(), kv_heads=GroupedQuery(1), calibration=TEXT)
    assert caught.value.field == "calibration"
