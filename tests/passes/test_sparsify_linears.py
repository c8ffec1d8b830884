"""sparsify_linears: exactly N of every M weights are left, by each score, and what they cost the outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_testing import copied
from hypothesis import given, settings
from hypothesis import strategies as st
from small_llm import byte_model, byte_tokenizer
from sparse_models import THROUGH, TOKENS, captured, counts, of_layers, outputs, sparse

import infercomp
from infercomp import GOBO, GPTQ, LLM, NM, W3A16, W4A16, W8A8, ConfigError
from infercomp.account import size_of
from infercomp.codegen.model_graph import aten
from infercomp.codegen.ops import linear
from infercomp.codegen.ops.group_codes import unpacked_codes
from infercomp.config import parse_options
from infercomp.passes import sparse_masks
from infercomp.passes.config import PassConfig
from infercomp.passes.linear_recipes import LinearRecipe
from infercomp.passes.n_m_sparsity import nm_of
from infercomp.passes.pipeline import run_pipeline
from infercomp.passes.sparse_masks import masked, n_m_mask, sparsegpt
from infercomp.runtime.errors import NumericalError
from infercomp.serving import capture_for_serving, position_limit

FIRST_READERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
patterns = st.integers(2, 16).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m)))


@given(patterns, st.integers(1, 9), st.integers(1, 80), st.integers(0, 999))
def test_a_mask_keeps_the_largest_n_of_every_m(
    pattern: tuple[int, int], rows: int, num_channels: int, seed: int
) -> None:
    n, m = pattern
    scores = torch.rand(rows, num_channels, generator=torch.Generator().manual_seed(seed))
    kept = n_m_mask(scores, n, m)
    for start in range(0, num_channels, m):
        group, of_scores = kept[:, start : start + m], scores[:, start : start + m]
        expected = min(n, group.shape[1])
        assert (group.sum(1) == expected).all()
        least_kept = torch.where(group, of_scores, 2).amin(1)
        assert (torch.where(group, -1, of_scores).amax(1) < least_kept).all()
    assert torch.equal(n_m_mask(torch.zeros(1, m), n, m)[0], torch.arange(m) < n)


def layer(seed: int, rows: int = 12, num_channels: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and inputs [T, K] whose channels differ in size and go together."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(num_channels, num_channels, generator=generator) / 8 + torch.eye(num_channels)
    inputs = torch.randn(300, num_channels, generator=generator) @ mixed
    inputs = inputs * (3 * torch.rand(num_channels, generator=generator)).exp()
    return torch.randn(rows, num_channels, generator=generator), inputs


def error(weight: torch.Tensor, other: torch.Tensor, inputs: torch.Tensor) -> float:
    return float((inputs.double() @ (weight - other).double().t()).square().sum())


@settings(max_examples=10)
@given(st.integers(0, 999), st.sampled_from([(2, 4), (1, 4), (4, 8), (3, 5)]))
def test_each_score_leaves_less_error_than_the_one_before(seed: int, pattern: tuple[int, int]) -> None:
    weight, inputs = layer(seed, num_channels=80)
    moment = inputs.t() @ inputs / len(inputs)
    found = [masked(weight, None, NM(*pattern)), masked(weight, moment, NM(*pattern, "wanda"))]
    found.append(sparsegpt(weight, moment, NM(*pattern, "sparsegpt")))
    assert all((counts(each, pattern[1]) == pattern[0]).all() for each in found)
    assert torch.equal(found[1][found[1] != 0], weight[found[1] != 0])
    errors = [error(weight, each, inputs) for each in found]
    assert errors[0] > errors[1] > errors[2]


def test_the_size_of_blocks_changes_only_the_order_of_sums() -> None:
    weight, inputs = layer(3)
    moment = (inputs.t() @ inputs / len(inputs)).double()
    whole, blocks = (sparsegpt(weight.double(), moment, NM(2, 4, "sparsegpt", block_size=size)) for size in (64, 8))
    torch.testing.assert_close(whole, blocks, rtol=1e-9, atol=1e-12)


def test_sparsegpt_is_the_best_there_is_for_its_mask() -> None:
    """With one group of two, what is left is the least-squares fit of the outputs with the other channel alone."""
    weight, inputs = layer(5, rows=4, num_channels=2)
    moment = (inputs.t() @ inputs / len(inputs)).double()
    found = sparsegpt(weight.double(), moment, NM(1, 2, "sparsegpt", damp=1e-12))
    for row, expected in zip(found, weight.double(), strict=True):
        if row[1] == 0:
            continue  # the channel to the left is kept, and nothing to the right of it is there to make up
        fitted = torch.linalg.lstsq(inputs[:, 1:].double(), inputs.double() @ expected[:, None]).solution
        torch.testing.assert_close(row[1:], fitted[0], rtol=1e-6, atol=1e-9)


def test_progress_names_layers_where_no_text_is_read() -> None:
    names: list[str] = []

    @contextlib.contextmanager
    def progress(num_items: int) -> Iterator[Callable[[str], None]]:
        names.append(f"{num_items} in all")
        yield names.append

    run_pipeline(copied(captured(False)), PassConfig(sparsity=NM(2, 4)), pipeline=THROUGH, progress=progress)
    assert names[0] == f"{len(names) - 1} in all"
    assert names[1:5] == [f"model.model.layers.0.{each}" for each in FIRST_READERS]


def test_inputs_that_depend_on_each_other_are_named() -> None:
    with pytest.raises(NumericalError, match="the Hessian of SparseGPT has no Cholesky factor") as caught:
        sparsegpt(torch.randn(2, 4), torch.full((4, 4), -1.0), NM(2, 4, "sparsegpt"))
    assert caught.value.field == "damp"


@pytest.mark.parametrize("score", ["magnitude", "wanda", "sparsegpt"])
def test_all_linears_but_the_head(score: str) -> None:
    model_graph, record = sparse(NM(2, 4, score))
    weights = of_layers(model_graph)
    assert record.matches == len(weights) == 7 * len({name.split("_layers_")[1][0] for name in weights})
    assert all((counts(each, 4) == 2).all() for each in weights.values())
    assert (model_graph.weights["p_model_lm_head_weight"] != 0).all()
    assert [miss.reason for miss in record.near_misses] == ["it is the LM head, which stays dense"]


@pytest.mark.parametrize("score", ["magnitude", "wanda", "sparsegpt"])
def test_channels_in_another_order_keep_more(score: str) -> None:
    plain, _ = sparse(NM(2, 4, score))
    model_graph, _ = sparse(NM(2, 4, score, permute=True))
    weights = of_layers(model_graph)
    assert all((counts(each, 4) == 2).all() for each in weights.values())
    readers = {node.args[0] for node in model_graph.calls(linear.overload)}
    gathers = [node for node in readers if node.target == aten.index_select.default]
    # Of two layers: what q, k and v read, and gate and up; the orders of o and down are folded.
    assert len(gathers) == 2 * 2 and len(readers) == 2 * len(gathers) + 1
    if score == "magnitude":
        kept = [sum(float(each.abs().sum()) for each in of_layers(graph).values()) for graph in (plain, model_graph)]
        assert kept[1] > 1.01 * kept[0]


def test_an_order_alone_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """All weights kept: what is left is the order, an identity in float64; planted: weights in no such order."""
    monkeypatch.setattr(sparse_masks, "n_m_mask", lambda scores, n, m: torch.ones_like(scores, dtype=torch.bool))
    dense, permuted = (outputs(sparse(each, in_float64=True)[0]) for each in (None, NM(2, 4, permute="greedy")))
    assert (dense - permuted).abs().max() <= 1e-9 * dense.abs().max()
    monkeypatch.setattr(torch.Tensor, "index_select", lambda tensor, *_: tensor)
    wrong = outputs(sparse(NM(2, 4, permute="greedy"), in_float64=True)[0])
    assert (dense - wrong).abs().max() > 1e-3 * dense.abs().max()


def test_one_layer_can_be_left_out() -> None:
    dense, _ = sparse(None)
    model_graph, record = sparse("2:4", calibration=None, disable=("sparsify_linears#1",))
    same = [name for name, each in of_layers(model_graph).items() if torch.equal(each, dense.weights[name])]
    assert (record.skipped, len(same)) == (1, 1)


@pytest.mark.parametrize("recipe", [W8A8(), W4A16(32), W3A16(32)])
def test_zeros_stay_zeros_in_integers(recipe: LinearRecipe) -> None:
    model = byte_model()
    model_graph, _ = capture_for_serving(model, position_limit(model))
    run_pipeline(model_graph, PassConfig(sparsity="2:4", quantization=recipe, disable=("compress_weights",)))
    codes = {name: each for name, each in model_graph.weights.items() if "_int" in name and "layers" in name}
    assert len(codes) == 14
    for name, each in codes.items():
        zero = model_graph.weights.get(name.rpartition("_")[0] + "_zero")
        if zero is not None:
            each = unpacked_codes(each, recipe.weight_bits).unflatten(1, (-1, 32)).int() - zero[..., None].int()
            each = each.flatten(1)
        assert (counts(each, 4) <= 2).all() and counts(each, 4).float().mean() > 1.5


def test_a_shifted_group_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: groups that begin one channel late."""
    monkeypatch.setattr(sparse_masks, "n_m_mask", lambda scores, n, m: n_m_mask(scores.roll(1, 1), n, m).roll(-1, 1))
    found = masked(layer(0)[0], None, NM(2, 4))
    assert not (counts(found, 4) == 2).all()


def test_it_is_served_saved_and_composed_with_integers(tmp_path: Path) -> None:
    tokens = TOKENS[:50].tolist()
    dense = LLM(byte_model(), num_blocks=8).logits(tokens)
    llm = LLM(byte_model(), byte_tokenizer(), num_blocks=8, sparsity=NM(3, 4, "wanda"), calibration=TOKENS)
    found = llm.logits(tokens)
    assert 0.01 < float((found - dense).norm() / dense.norm()) < 1
    assert size_of(llm._served).density == pytest.approx(0.75, abs=1e-3)
    llm.save(tmp_path / "sparse")
    assert torch.equal(LLM(tmp_path / "sparse", num_blocks=8).logits(tokens), found)
    saved = LLM(byte_model(), num_blocks=8, quantization="w4a16-g32-sym", quantize_lm_head=False)
    saved.save(tmp_path / "integers")
    (tmp_path / "integers" / "infercomp.json").unlink()
    with pytest.raises(ConfigError, match="quantised already") as caught:
        LLM(tmp_path / "integers", sparsity="2:4")
    assert caught.value.field == "sparsity"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"sparsity": "4:2"}, "n"),
        ({"sparsity": "2:17"}, "m"),
        ({"sparsity": "two of four"}, "sparsity"),
        ({"sparsity": 24}, "sparsity"),
        ({"sparsity": '{"n": 2, "m": 4, "scores": "wanda"}'}, "scores"),
        ({"sparsity": '{"n": 2, "m": 4, "score": "random"}'}, "score"),
        ({"sparsity": '{"n": 2, "m": 4, "tail": "drop"}'}, "tail"),
        ({"sparsity": '{"n": 2, "m": 4, "damp": 0}'}, "damp"),
        ({"sparsity": '{"n": 2, "m": 4, "permute": "shuffle"}'}, "permute"),
        ({"sparsity": '{"n": 2, "m": 4, "permute": true, "tail": "pad"}'}, "tail"),
    ],
)
def test_a_field_out_of_range_is_named(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PassConfig(**options)
    assert caught.value.field == field


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="m 5 does not divide the") as caught:
        sparse("3:5")
    assert caught.value.field == "m"
    model_graph, _ = sparse(NM(3, 5, tail="pad"))
    assert all((counts(each, 5) == 3).all() for each in of_layers(model_graph).values())
    with pytest.raises(ConfigError, match="needs samples") as caught:
        sparse(NM(2, 4, "wanda"), calibration=None)
    assert caught.value.field == "calibration"
    for recipe in (GOBO(), W4A16(32, True, GPTQ())):
        with pytest.raises(ConfigError, match="zeros would be lost") as caught:
            sparse("2:4", quantization=recipe)
        assert caught.value.field == "quantization"


def test_text_stands_for_a_value_and_back() -> None:
    assert infercomp.NM is NM
    assert nm_of(" 2:4 ") == NM(2, 4) == nm_of(NM(2, 4).to_json())
    options = [parse_options({"sparsity": each}, {}) for each in ("2:4", NM(2, 4), NM(2, 4).to_json())]
    assert len({each.fingerprint() for each in options}) == 1
    assert parse_options({}, {"INFERCOMP_SPARSITY": "1:2"}).passes.nm == NM(1, 2)
