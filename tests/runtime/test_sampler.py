"""The sampler against Hugging Face's warpers, against the wanted distribution, and against bad logits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from infercomp.runtime.errors import NumericalError
from infercomp.runtime.request import SamplingParams
from infercomp.runtime.sampler import make_generator, sample, warp

NAN, INFINITY = float("nan"), float("inf")
GREEDY = SamplingParams(temperature=0.0)


def hugging_face_warp(row: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The three warpers in the order of ``GenerationMixin``, in float64."""
    scores = TemperatureLogitsWarper(float(params.temperature))(None, row.double()[None])
    if params.top_k > 0:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1.0:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    return scores[0]


def is_at_the_edge(row: torch.Tensor, params: SamplingParams) -> bool:
    """Whether rounding decides which token top_p removes: the cut meets a cumulative probability, or equal tokens."""
    without_top_p = SamplingParams(temperature=params.temperature, top_k=params.top_k)
    ascending = hugging_face_warp(row, without_top_p).sort().values
    cumulative = ascending.softmax(-1).cumsum(-1)
    cut = 1 - params.top_p
    if bool(((cumulative - cut).abs() < 1e-12).any()):
        return True
    first_kept = int((cumulative > cut).nonzero()[0])
    return first_kept > 0 and bool(ascending[first_kept] == ascending[first_kept - 1])


logits_rows = st.lists(
    st.one_of(st.integers(-640, 640).map(lambda i: i / 64), st.just(-INFINITY)), min_size=1, max_size=40
).filter(lambda row: max(row) > -INFINITY)


@settings(max_examples=300, deadline=None)
@given(
    row=logits_rows,
    temperature=st.sampled_from([0.25, 0.5, 0.7, 1.0, 1.3, 8.0]),
    top_k=st.integers(-1, 50),
    top_p=st.floats(0.01, 1.0),
)
def test_warping_equals_hugging_face(row: list[float], temperature: float, top_k: int, top_p: float) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    logits = torch.tensor(row)
    assume(top_p == 1.0 or not is_at_the_edge(logits, params))
    ours, theirs = warp(logits, params), hugging_face_warp(logits, params)
    assert torch.equal(ours > -INFINITY, theirs > -INFINITY), "another set of tokens is kept"
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.6, top_k=5),
        SamplingParams(temperature=1.5, top_p=0.8),
        SamplingParams(temperature=0.9, top_k=9, top_p=0.9),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(params: SamplingParams) -> None:
    """Chi-square over 4,000 draws with a fixed seed; the bound is five standard deviations above the mean."""
    num_draws = 4000
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3))
    generator = make_generator(1234)
    tokens = [sample(logits[None], [params], [generator])[0] for _ in range(num_draws)]
    counts = torch.bincount(torch.tensor(tokens), minlength=12).double()
    expected = hugging_face_warp(logits, params).softmax(-1) * num_draws
    kept = expected > 0
    assert int(counts[~kept].sum()) == 0, "a removed token was drawn"
    statistic = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
    freedom = int(kept.sum()) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_the_chi_square_would_notice_a_wrong_temperature() -> None:
    """The same statistic on draws at temperature 1.15 in place of 1.0 is far outside the bound."""
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3))
    generator = make_generator(1234)
    wrong = SamplingParams(temperature=1.15)
    tokens = [sample(logits[None], [wrong], [generator])[0] for _ in range(4000)]
    counts = torch.bincount(torch.tensor(tokens), minlength=12).double()
    expected = logits.double().softmax(-1) * 4000
    assert float(((counts - expected) ** 2 / expected).sum()) > 11 + 5 * math.sqrt(22)


def test_greedy_takes_the_largest() -> None:
    logits = torch.randn(7, 50)
    assert sample(logits, [GREEDY] * 7, [make_generator(0)] * 7) == logits.argmax(-1).tolist()
    one = SamplingParams(top_k=1, seed=1)
    assert sample(logits, [one] * 7, [make_generator(0)] * 7) == logits.argmax(-1).tolist()


@settings(max_examples=50, deadline=None)
@given(order=st.permutations(range(5)), seed=st.integers(0, 1000))
def test_a_row_does_not_depend_on_its_neighbours(order: list[int], seed: int) -> None:
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(seed))
    params = [SamplingParams(temperature=0.5 + row / 2, top_k=row * 3, seed=row) for row in range(5)]
    alone = [sample(logits[row][None], [params[row]], [make_generator(row)])[0] for row in range(5)]
    together = sample(logits[order], [params[row] for row in order], [make_generator(row) for row in order])
    assert together == [alone[row] for row in order]


@pytest.mark.parametrize(
    "bad", [[NAN, 0.0, 1.0], [0.0, INFINITY, 1.0], [-INFINITY] * 3, [NAN, -INFINITY, INFINITY]], ids=str
)
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(top_k=2, top_p=0.9)], ids=["greedy", "drawn"])
def test_a_bad_row_is_an_error_and_its_neighbours_are_not(bad: list[float], params: SamplingParams) -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0], bad, [9.0, 5.0, -INFINITY]])
    good = sample(logits[[0, 2]], [params] * 2, [make_generator(0), make_generator(2)])
    tokens = sample(logits, [params] * 3, [make_generator(row) for row in range(3)])
    assert isinstance(tokens[1], NumericalError) and tokens[1].remedy
    assert [tokens[0], tokens[2]] == good


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-8, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_temperatures_stay_finite(temperature: float, dtype: torch.dtype) -> None:
    logits = torch.tensor([[-6e4, 6e4, 0.0, 5e4]], dtype=dtype)
    token = sample(logits, [SamplingParams(temperature=temperature)], [make_generator(0)])[0]
    assert token == 1 or temperature == 100.0


def test_unseeded_generators_differ() -> None:
    assert make_generator(None).initial_seed() != make_generator(None).initial_seed()
    assert make_generator((1 << 63) + 14).initial_seed() == (1 << 63) + 14


@settings(max_examples=300)
@given(
    bits=st.lists(
        st.one_of(st.integers(0, 0xFFFF), st.sampled_from([0, 0x8000, 0x3F80, 0xBF80, 0x7F80, 0xFF80, 0x7FC0, 0xFFC0])),
        min_size=1,
        max_size=8,
    )
)
def test_greedy_over_every_bfloat16(bits: list[int]) -> None:
    row = torch.tensor(bits, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    (token,) = sample(row[None], [GREEDY], [make_generator(0)])
    wide = row.double()
    if wide.isnan().any() or not wide.max().isfinite():
        assert isinstance(token, NumericalError)
    else:
        assert token == wide.tolist().index(wide.max().item())
