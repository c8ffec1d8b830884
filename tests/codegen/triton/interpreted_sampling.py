"""Run by ``test_interpreted.py`` in a process where Triton interprets kernels instead of compiling them."""

from __future__ import annotations

import pytest
import torch
from codegen.triton import sampling_cases
from codegen.triton.sampling_cases import check_gumbel, check_inverse_cdf, check_unusable_rows, run_sampling
from hypothesis import given, settings
from hypothesis import strategies as st

from infercomp.codegen.triton.specs import SamplingSpec
from infercomp.runtime.request import SamplingParams

PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 3, 20, 1000]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 1e-6]),
)


@given(params=st.lists(PARAMS, min_size=1, max_size=3), with_ties=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=6)
def test_inverse_cdf_draws_what_the_sampler_draws(params: list[SamplingParams], with_ties: bool, seed: int) -> None:
    spec = SamplingSpec(logits_dtype="fp32", vocabulary_size=30, tile_tokens=16)
    logits = torch.randn(len(params), 30, generator=torch.Generator().manual_seed(seed)) * 2
    check_inverse_cdf(spec, params, logits.round() if with_ties else logits, seed)


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=0.7, top_k=5, top_p=0.8)])
def test_gumbel_draws_from_the_distribution(params: SamplingParams) -> None:
    spec = SamplingSpec(logits_dtype="fp32", vocabulary_size=20, method="gumbel", tile_tokens=32)
    row = torch.randn(20, generator=torch.Generator().manual_seed(5))
    check_gumbel(spec, params, row, 24)


@pytest.mark.parametrize("method", ["greedy", "inverse_cdf", "gumbel"])
def test_rows_that_are_not_numbers_are_marked(method: str) -> None:
    check_unusable_rows(SamplingSpec(logits_dtype="fp32", vocabulary_size=20, method=method, tile_tokens=16), "cpu")


def test_greedy_takes_the_first_of_equal_logits() -> None:
    spec = SamplingSpec(logits_dtype="fp32", vocabulary_size=40, method="greedy", tile_tokens=16)
    logits = torch.zeros(2, 40)
    logits[1, [9, 30]] = 3.0
    assert run_sampling(spec, logits, [SamplingParams()] * 2, torch.zeros(2)) == [0, 9]


@pytest.mark.parametrize(
    ("fixed", "bug"),
    [
        ("num_reaching >= top_k", "num_reaching > top_k"),
        ("below <= removable", "below >= removable"),
        ("tie_rank > num_removed_ties", "tie_rank > 0"),
        ("/ temperature", "/ 1.0"),
    ],
)
def test_a_planted_bug_is_caught(fixed: str, bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SamplingSpec(logits_dtype="fp32", vocabulary_size=30, tile_tokens=32)
    text = sampling_cases.emit(spec)
    assert fixed in text
    monkeypatch.setattr(sampling_cases, "emit", lambda _: text.replace(fixed, bug))
    params = [SamplingParams(temperature=0.5, top_k=6), SamplingParams(temperature=0.5, top_p=0.5)] * 2
    logits = torch.arange(30).float().expand(4, -1).div(4).floor() / 2  # four equal logits at every step
    with pytest.raises(AssertionError):
        for seed in range(3):
            check_inverse_cdf(spec, params, logits, seed)
