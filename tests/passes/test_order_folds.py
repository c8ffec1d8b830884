"""order_folds: orders of channels that are folded into other weights change nothing, in any family."""

from __future__ import annotations

import functools

import pytest
import torch
from families import DECODERS, VOCAB_SIZE
from graph_testing import captured, copied
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_models import CALIBRATION, of_layers
from torch import nn

from infercomp import NM
from infercomp.codegen.model_graph import ModelGraph, aten
from infercomp.passes import order_folds, sparse_masks
from infercomp.passes.calibration import Calibration, stream
from infercomp.passes.config import PassConfig
from infercomp.passes.order_folds import OrderFold
from infercomp.passes.permutation_search import PermutationSearch
from infercomp.passes.pipeline import PIPELINE, run_pipeline
from infercomp.passes.record import PassRecord
from infercomp.serving import capture_for_serving, position_limit

BEFORE = PIPELINE[: [each.name for each in PIPELINE].index("sparsify_linears")]
SPARSIFY = PIPELINE[len(BEFORE)]
ORDERED = NM(2, 4, permute="greedy")
IDS = torch.randint(3, VOCAB_SIZE, (1, 20), generator=torch.Generator().manual_seed(3))
SAMPLE = {"input_ids": IDS, "position_ids": torch.arange(20)[None]}


@functools.cache
def recognized(family: str) -> ModelGraph:
    model = DECODERS[family].build(DECODERS[family].attn_implementations[0]).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    model_graph, _ = capture_for_serving(model, position_limit(model))
    run_pipeline(model_graph, PassConfig(), pipeline=BEFORE)
    return model_graph


def ordered(family: str) -> tuple[ModelGraph, PassRecord]:
    model_graph = copied(recognized(family))
    pipeline = (type(SPARSIFY)(SPARSIFY.name, SPARSIFY.run, SPARSIFY.numeric_class),)
    (record,) = run_pipeline(model_graph, PassConfig(sparsity=ORDERED), pipeline=pipeline)
    return model_graph, record


def logits(model_graph: ModelGraph) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    (output,) = model_graph.output_node().args[0]
    names = {name: SAMPLE[name] for name in model_graph.input_names if name in SAMPLE}
    stream(model_graph, [names], {output: lambda values: seen.extend(values)})
    return seen[0]


def error(family: str) -> float:
    exact, found = logits(recognized(family)), logits(ordered(family)[0])
    return float((exact - found).norm() / exact.norm())


@pytest.fixture
def all_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of the pass is the order."""
    monkeypatch.setattr(sparse_masks, "n_m_mask", lambda scores, n, m: torch.ones_like(scores, dtype=torch.bool))


# Inputs of linears whose order is folded, of two layers, and those that are gathered.
FOLDS = {
    "llama": (4, 4), "mistral": (4, 4), "qwen2": (4, 4), "qwen3": (4, 4), "gemma2": (4, 4), "gemma3": (4, 4),
    "phi3": (0, 8), "gpt2": (2, 6), "opt": (4, 4), "gpt_neox": (2, 6), "gptj": (4, 2), "falcon": (2, 4),
    "bloom": (2, 6), "mpt": (2, 6),
}  # fmt: skip


@pytest.mark.parametrize("family", DECODERS)
def test_an_order_is_an_identity_in_every_family(family: str, all_are_kept: None) -> None:
    model_graph, record = ordered(family)
    exact, found = logits(recognized(family)), logits(model_graph)
    assert (exact - found).norm() <= 1e-9 * exact.norm()
    gathers = [node for node in model_graph.calls(aten.index_select.default) if "channel_order" in node.args[2].name]  # type: ignore[union-attr]
    reasons = [miss.reason for miss in record.near_misses if "gathered in order" in miss.reason]
    assert len(reasons) == len(gathers)
    changed = {
        name
        for name, tensor in recognized(family).weights.items()
        if not torch.equal(tensor, model_graph.weights[name])
    }
    assert changed
    inputs = {
        node.args[0] for node in recognized(family).graph.nodes if node.name in {site.node for site in record.sites}
    }
    assert (len(inputs) - len(gathers), len(gathers)) == FOLDS[family], (family, reasons)


@pytest.mark.parametrize(("family", "planted"), [("opt", "bias"), ("llama", "heads")])
def test_a_planted_bug_is_noticed(
    family: str, planted: str, all_are_kept: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if planted == "bias":
        original = order_folds.OrderFold.apply

        def without_bias(fold: OrderFold, model_graph: ModelGraph, order: torch.Tensor) -> None:
            biases = {each.bias.name for each in fold.producers if each.bias is not None}
            kept = {name: model_graph.weights[name] for name in biases}
            original(fold, model_graph, order)
            model_graph.weights |= kept

        monkeypatch.setattr(OrderFold, "apply", without_bias)
    else:
        # The order of the last query head that shares a value head, as if it were the first one's.
        monkeypatch.setattr(
            OrderFold,
            "of_rows",
            lambda fold, order: (
                order[: fold.num_heads * order.numel() // (fold.num_heads * fold.num_repeats)]
                % (order.numel() // fold.num_repeats)
            ),
        )
    assert error(family) > 1e-3


@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from([4, 8]), st.integers(1, 5), st.integers(0, 999))
def test_orders_stay_within_heads_and_are_those_of_the_rows(
    num_heads: int, num_repeats: int, head_dim: int, num_rows: int, seed: int
) -> None:
    fold = OrderFold((), num_heads, num_repeats)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_rows, num_heads * num_repeats * head_dim, generator=generator)
    order = fold.search(scores, (2, 4), PermutationSearch("greedy"))
    assert torch.equal(order.sort().values, torch.arange(len(order)))
    values = torch.rand(num_heads, 1, head_dim, generator=generator)
    read = values.expand(-1, num_repeats, -1).flatten()
    rows = values.flatten()[fold.of_rows(order)].view(num_heads, 1, head_dim)
    assert torch.equal(rows.expand(-1, num_repeats, -1).flatten(), read[order])


class Mlp(nn.Module):
    def __init__(self, is_read_twice: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)
        self.is_read_twice = is_read_twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.gelu(self.first(x) * 0.5)
        y = self.second(hidden)
        return torch.cat([y, hidden], -1) if self.is_read_twice else y + 1


@pytest.mark.parametrize("is_read_twice", [False, True])
def test_a_value_that_is_read_elsewhere_is_gathered(is_read_twice: bool, all_are_kept: None) -> None:
    module, x = Mlp(is_read_twice).double(), torch.randn(1, 3, 16, dtype=torch.float64)
    model_graph = captured(module, x)
    names = {"recognize_linear", "sparsify_linears"}
    pipeline = tuple(type(each)(each.name, each.run, each.numeric_class) for each in PIPELINE if each.name in names)
    records = run_pipeline(model_graph, PassConfig(sparsity=ORDERED), pipeline=pipeline)
    seen: list[torch.Tensor] = []
    (output,) = model_graph.output_node().args[0]
    stream(model_graph, [{model_graph.input_names[0]: x}], {output: lambda values: seen.extend(values)})
    torch.testing.assert_close(seen[0], module(x), rtol=1e-12, atol=1e-12)
    reasons = [miss.reason for miss in records[-1].near_misses]
    assert any("is also read elsewhere" in reason for reason in reasons) == is_read_twice
    assert len(model_graph.calls(aten.index_select.default)) == (2 if is_read_twice else 1)


def test_what_is_kept_with_folds_is_more_than_without_an_order() -> None:
    from sparse_models import sparse

    plain, folded = (of_layers(sparse(each, CALIBRATION)[0]) for each in (NM(2, 4), ORDERED))
    kept = [{name: float(each.abs().sum()) for name, each in weights.items()} for weights in (plain, folded)]
    assert all(kept[1][name] >= kept[0][name] * (1 - 1e-6) for name in kept[0])
    assert isinstance(CALIBRATION, Calibration)
