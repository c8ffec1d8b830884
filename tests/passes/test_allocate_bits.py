"""allocate_bits: the Hessian against torch's own, the allocation against all others, and the model that comes of it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import pytest
import torch
from graph_testing import copied
from hypothesis import given, settings
from hypothesis import strategies as st
from small_llm import byte_model, byte_tokenizer
from torch.func import functional_call

from infercomp import LLM
from infercomp.codegen.model_graph import ModelGraph
from infercomp.codegen.ops import linear
from infercomp.passes import second_order
from infercomp.passes.allocate_bits import ALLOCATE_BITS, Group, _block_of, allocate
from infercomp.passes.calibration import Calibration
from infercomp.passes.config import PassConfig
from infercomp.passes.linear_recipes import W4A16, W8A8, W8A16
from infercomp.passes.pipeline import PIPELINE, run_pipeline
from infercomp.passes.quantizable_linears import parameters_of
from infercomp.passes.recipes import HAWQ
from infercomp.passes.record import PassRecord
from infercomp.passes.second_order import hessian_traces, largest_eigenvalues, next_token_loss
from infercomp.runtime.errors import ConfigError
from infercomp.serving import capture_for_serving, position_limit

BEFORE = PIPELINE[: [each.name for each in PIPELINE].index("allocate_bits")]
TOKENS = torch.randint(0, 256, (1000,), generator=torch.Generator().manual_seed(1))
CALIBRATION = Calibration(
    tuple({"input_ids": each[None], "position_ids": torch.arange(20)[None]} for each in TOKENS[60:].split(20)[:2])
)
CHOICES = (W8A16(), W4A16(32, True))
SMALL = "p_model_model_layers_1_self_attn_k_proj_weight"


def recognized() -> tuple[ModelGraph, dict[str, torch.Tensor]]:
    model_graph, examples = _recognized_once()
    return copied(model_graph), examples


@functools.cache
def _recognized_once() -> tuple[ModelGraph, dict[str, torch.Tensor]]:
    model_graph, examples = capture_for_serving(byte_model(), position_limit(byte_model()))
    run_pipeline(model_graph, PassConfig(), pipeline=BEFORE)
    return model_graph, examples


def dense_hessian(calibration: Calibration) -> torch.Tensor:
    """The Hessian of the eager model's loss in the weight SMALL, column by column, the mean over the samples."""
    model = byte_model()
    name = "model.layers.1.self_attn.k_proj.weight"
    weight = dict(model.named_parameters())[name].detach().clone().requires_grad_()
    total = torch.zeros(weight.numel(), weight.numel())
    for sample in calibration.samples:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            logits = functional_call(model, {name: weight}, kwargs=dict(sample)).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], sample["input_ids"][0, 1:])
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        directions = torch.eye(weight.numel()).view(-1, *weight.shape)
        (columns,) = torch.autograd.grad(gradient, weight, directions, is_grads_batched=True)
        total += columns.flatten(1)
    return total / len(calibration.samples)


def test_trace_and_eigenvalue_are_those_of_the_dense_hessian() -> None:
    model_graph, _ = recognized()
    hessian = dense_hessian(CALIBRATION).double()
    trace = hessian_traces(model_graph, CALIBRATION, [SMALL], num_probes=400, num_tokens=20)[SMALL]
    # Hutchinson's variance is twice the sum of the squares off the diagonal.
    deviation = (2 * (hessian.square().sum() - hessian.diagonal().square().sum()) / 800).sqrt()
    assert abs(trace - float(hessian.trace())) < 4 * float(deviation)
    one = Calibration(CALIBRATION.samples[:1])
    (found,) = largest_eigenvalues(model_graph, one, {"k": [SMALL]}, num_iterations=60, num_tokens=20)["k"]
    values = torch.linalg.eigvalsh(dense_hessian(one).double())
    assert found == pytest.approx(float(values[values.abs().argmax()]), rel=0.02)


def test_an_eigenvalue_of_a_block_is_that_of_its_weights_together() -> None:
    """A quadratic form of two weights, whose Hessian is known, next to those of each alone."""
    generator = torch.Generator().manual_seed(3)
    square = torch.randn(9, 9, generator=generator)
    matrix = square @ square.t()
    weights = {"a": torch.randn(2, 3, generator=generator), "b": torch.randn(3, generator=generator)}
    weights = {name: each.requires_grad_() for name, each in weights.items()}

    def eigenvalue(*names: str) -> float:
        values = torch.cat([each.flatten() for each in weights.values()])
        parts = [weights[name] for name in names]
        gradients = torch.autograd.grad(values @ matrix @ values / 2, parts, create_graph=True)
        both = ({name: weights[name] for name in names}, dict(zip(names, gradients, strict=True)))
        return second_order._eigenvalue(*both, 200, torch.Generator().manual_seed(0))

    for names, part in ((("a", "b"), slice(9)), (("a",), slice(6)), (("b",), slice(6, 9))):
        assert eigenvalue(*names) == pytest.approx(float(torch.linalg.eigvalsh(matrix[part, part])[-1]), rel=1e-4)


@pytest.mark.parametrize(
    ("layer", "block"),
    [
        ("model.layers.12.mlp.down_proj", "model.layers.12"),
        ("encoder.block.0.layer.1.wi", "encoder.block.0"),
        ("h.3", "h.3"),
        ("classifier2.out_proj", "classifier2.out_proj"),
    ],
)
def test_a_block_is_named_up_to_its_first_number(layer: str, block: str) -> None:
    assert _block_of(layer) == block


def test_a_planted_bug_in_the_loss_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss of the tokens themselves instead of those that follow has another Hessian."""

    def shifted(model_graph: ModelGraph, sample: Any, weights: Any) -> torch.Tensor:
        return next_token_loss(model_graph, {**sample, "input_ids": sample["input_ids"].roll(1, -1)}, weights)

    monkeypatch.setattr(second_order, "next_token_loss", shifted)
    with pytest.raises(AssertionError):
        test_trace_and_eigenvalue_are_those_of_the_dense_hessian()


groups = st.lists(
    st.tuples(st.integers(1, 50), st.lists(st.tuples(st.integers(2, 8), st.floats(0, 100)), min_size=2, max_size=3)),
    min_size=1,
    max_size=5,
)


@settings(max_examples=200)
@given(groups, st.floats(2, 9))
def test_the_budget_holds_and_nothing_that_still_fits_would_cost_less(drawn: Any, bits_per_weight: float) -> None:
    parts = [
        Group(size, tuple(bits * size for bits, _ in choices), tuple(cost for _, cost in choices))
        for size, choices in drawn
    ]
    num_weights = sum(group.num_weights for group in parts)
    budget = bits_per_weight * num_weights * (1 + 1e-9)
    try:
        chosen = allocate(parts, bits_per_weight)
    except ConfigError as error:
        assert error.field == "bits_per_weight"
        assert sum(min(group.bits) for group in parts) > budget
        return
    spent = sum(group.bits[i] for group, i in zip(parts, chosen, strict=True))
    assert spent <= budget
    for group, position in zip(parts, chosen, strict=True):
        for other, bits in enumerate(group.bits):
            fits = spent - group.bits[position] + bits <= num_weights * bits_per_weight
            assert not (fits and group.costs[other] < group.costs[position])


@settings(max_examples=100)
@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 1)), min_size=1, max_size=8), st.floats(4, 8))
def test_layers_of_one_size_are_allocated_as_well_as_can_be(drawn: Any, bits_per_weight: float) -> None:
    """Of two choices and equal sizes the greedy steps are the optimum, found here by trying all."""
    parts = [Group(10, (80.0, 40.0), (high * low, high)) for high, low in drawn]
    chosen = allocate(parts, bits_per_weight)
    found = sum(group.costs[i] for group, i in zip(parts, chosen, strict=True))
    possible = [
        sum(group.costs[i] for group, i in zip(parts, choice, strict=True))
        for choice in itertools.product((0, 1), repeat=len(parts))
        if sum(parts[0].bits[i] for i in choice) <= bits_per_weight * 10 * len(parts) * (1 + 1e-9)
    ]
    assert found == pytest.approx(min(possible))


def allocated(recipe: HAWQ, calibration: Calibration | None = CALIBRATION, **options: Any) -> PassRecord:
    model_graph, examples = recognized()
    config = PassConfig(quantization=recipe, verify=True, **options)
    pipeline = (dataclasses.replace(ALLOCATE_BITS, after=()),)
    (record,) = run_pipeline(model_graph, config, example_inputs=examples, calibration=calibration, pipeline=pipeline)
    return record


def test_every_input_but_the_heads_gets_a_choice() -> None:
    record = allocated(HAWQ(5.0, CHOICES, num_probes=1, num_samples=1))
    assert (record.matches, record.max_error) == (8, 0)
    record = allocated(HAWQ(5.0, CHOICES, num_probes=1, num_samples=1), disable=("allocate_bits#2",))
    assert (record.matches, record.skipped) == (7, 1)


def test_what_is_missing_or_wrong_is_an_error() -> None:
    with pytest.raises(ConfigError, match="needs samples") as caught:
        allocated(HAWQ(), calibration=None)
    assert caught.value.field == "calibration"
    with pytest.raises(ConfigError, match=r"is below the 4\.500") as caught:
        allocated(HAWQ(3.0, CHOICES, num_probes=1, num_samples=1))
    assert caught.value.field == "bits_per_weight"
    with pytest.raises(ConfigError, match="does not divide") as caught:
        allocated(HAWQ(choices=(W8A16(), W4A16(96, True))))
    assert caught.value.field == "group_size"


@pytest.mark.parametrize("sensitivity", ["trace", "eigenvalue"])
def test_a_budget_between_is_served_and_errs_between(sensitivity: str) -> None:
    tokens = TOKENS[:60].tolist()
    with torch.inference_mode():
        expected = byte_model()(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)

    def divergence(bits_per_weight: float) -> float:
        recipe = HAWQ(bits_per_weight, (W8A8(), W4A16(32, True)), sensitivity, num_probes=2, num_samples=1)
        llm = LLM(byte_model(), byte_tokenizer(), num_blocks=64, quantization=recipe, calibration=TOKENS[60:])
        found = llm.logits(tokens).log_softmax(-1)
        return float((expected.exp() * (expected - found)).sum(-1).mean())

    small, middle, large = (divergence(bits) for bits in (4.5, 6.5, 8.6))
    assert large < middle < small


def test_linears_of_the_graph_are_those_of_the_costs() -> None:
    """The name that the Hessian is asked for is a weight that a linear reads."""
    model_graph, _ = recognized()
    assert SMALL in {parameters_of(node)[0].name for node in model_graph.calls(linear.overload)}
