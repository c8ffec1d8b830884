"""permutation_search: against the optimum by exhaustion, random orders and sums taken anew; what it refuses."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infercomp.passes import permutation_search as module
from infercomp.passes.permutation_search import (
    METHODS,
    NMPattern,
    PermutationSearch,
    Stripes,
    permutation_search,
    retained,
)
from infercomp.runtime.errors import ConfigError

TWO_OF_FOUR = NMPattern(2, 4)
PATTERNS = st.integers(2, 6).flatmap(lambda m: st.builds(NMPattern, st.integers(1, m - 1), st.just(m)))
KINDS = ("normal", "outliers", "integers", "zeros")


def searched(method: str, num_regressions: int = 3, seed: int = 0) -> PermutationSearch:
    return PermutationSearch(method, num_regressions=num_regressions, seed=seed)


def scores_of(num_rows: int, num_columns: int, kind: str = "normal", seed: int = 0) -> torch.Tensor:
    """Magnitudes; "outliers" has columns 1e4 times larger, "integers" many ties, "zeros" whole columns of zero."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(num_rows, num_columns, generator=generator).abs()
    some = torch.rand(num_columns, generator=generator) < 0.2
    if kind == "outliers":
        scores[:, some] *= 1e4
    elif kind == "integers":
        scores = scores.round()
    elif kind == "zeros":
        scores[:, some] = 0
    return scores


def gain(scores: torch.Tensor, order: torch.Tensor, pattern: NMPattern = TWO_OF_FOUR) -> float:
    return retained(scores, order, *pattern) - retained(scores, torch.arange(scores.shape[1]), *pattern)


def kept_anew(scores: torch.Tensor, order: list[int], n: int, m: int) -> float:
    """What is kept, value by value."""
    return sum(
        sum(sorted((row[column] for column in order[start : start + m]), reverse=True)[:n])
        for row in scores.double().tolist()
        for start in range(0, len(order), m)
    )


def optima(matrices: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """What the best orders of ``matrices`` [B, R, C] keep: the first of the free columns joins any m - 1 others."""
    num_columns = matrices.shape[2]
    stripes = {
        sum(1 << column for column in stripe): matrices[:, :, stripe].double().topk(n).values.sum(dim=(1, 2))
        for stripe in itertools.combinations(range(num_columns), m)
    }

    @functools.cache
    def best(free: int) -> torch.Tensor:
        if not free:
            return torch.zeros(len(matrices), dtype=torch.float64)
        first, *others = (1 << column for column in range(num_columns) if free >> column & 1)
        joined = (first + sum(each) for each in itertools.combinations(others, m - 1))
        return torch.stack([stripes[stripe] + best(free - stripe) for stripe in joined]).amax(dim=0)

    return best((1 << num_columns) - 1)


def assert_gains_are_true(stripes: Stripes, scores: torch.Tensor) -> None:
    """Every entry of the tables is the difference of two sums that are taken anew, to their dtype's rounding."""
    n, m = stripes.pattern
    rounding = 16 * torch.finfo(scores.dtype).eps
    before = kept_anew(scores, stripes.order.tolist(), n, m)
    assert float(stripes.kept.sum()) == pytest.approx(before, rel=1e-12)
    gains = stripes.gains + stripes.gains.t()
    best = gains.unflatten(1, (-1, m)).unflatten(0, (-1, m)).amax(dim=(1, 3)).fill_diagonal_(-math.inf)
    assert stripes.best.equal(best)
    for i, j in itertools.combinations(range(len(stripes.order)), 2):
        if i // m != j // m:
            order = stripes.order.tolist()
            order[i], order[j] = order[j], order[i]
            expected = kept_anew(scores, order, n, m) - before
            assert float(gains[i, j]) == pytest.approx(expected, abs=rounding * before), (i, j)


@settings(max_examples=40)
@given(
    pattern=PATTERNS,
    num_stripes=st.integers(1, 5),
    num_rows=st.integers(0, 8),
    method=st.sampled_from(METHODS),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 99),
)
def test_an_order_is_a_permutation_that_keeps_no_less(
    pattern: NMPattern, num_stripes: int, num_rows: int, method: str, kind: str, seed: int
) -> None:
    scores = scores_of(num_rows, num_stripes * pattern.m, kind, seed)
    order = permutation_search(scores, pattern, searched(method, seed=seed))
    assert order.dtype == torch.int64
    assert order.sort().values.equal(torch.arange(scores.shape[1]))
    assert gain(scores, order, pattern) >= -1e-12 * float(scores.double().sum())
    assert retained(scores, order, *pattern) == pytest.approx(kept_anew(scores, order.tolist(), *pattern), rel=1e-12)


@settings(max_examples=20)
@given(
    pattern=PATTERNS,
    num_stripes=st.integers(2, 3),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_the_tables_hold_after_any_moves(
    pattern: NMPattern, num_stripes: int, kind: str, dtype: torch.dtype, seed: int
) -> None:
    scores = scores_of(5, num_stripes * pattern.m, kind, seed).to(dtype)
    stripes = Stripes.of(scores, pattern)
    assert_gains_are_true(stripes, scores)
    module._swap_at_random(stripes, 3, torch.Generator().manual_seed(seed))
    assert_gains_are_true(stripes, scores)
    module._improve(stripes, searched("deep"))
    assert_gains_are_true(stripes, scores)
    assert float(stripes.best.amax()) <= 16 * torch.finfo(dtype).eps * float(stripes.kept.sum())


def test_columns_taken_from_the_wrong_stripe_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the tables fails when a stripe's gains go to the places of the stripe before it."""
    scores = scores_of(5, 12)
    right = module.places_of
    monkeypatch.setattr(module, "places_of", lambda stripes, m: (right(stripes, m) - m) % 12)
    with pytest.raises(AssertionError):
        assert_gains_are_true(Stripes.of(scores, TWO_OF_FOUR), scores)


def test_a_swap_with_the_wrong_stripe_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """An order that follows in the stripe beside the one whose columns move keeps another sum than the tables say."""
    scores = scores_of(8, 32)

    def run() -> None:
        stripes = Stripes.of(scores, TWO_OF_FOUR)
        module._improve(stripes, searched("deep"))
        assert float(stripes.kept.sum()) == pytest.approx(retained(scores, stripes.order, 2, 4), rel=1e-12)

    run()
    right = Stripes.rearrange

    def in_the_next_stripe(self: Stripes, places: torch.Tensor, sources: torch.Tensor) -> None:
        order = self.order.clone()
        right(self, places, sources)
        self.order = order
        self.order[(places + 4) % 32] = order[(sources + 4) % 32]

    monkeypatch.setattr(Stripes, "rearrange", in_the_next_stripe)
    with pytest.raises(AssertionError):
        run()


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 3), (1, 4), (2, 4), (3, 5)])
def test_all_ways_to_share_out_two_stripes_are_tried(n: int, m: int) -> None:
    """Two stripes have no third to gain from: the deep search finds their optimum without a regression."""
    matrices = torch.stack([scores_of(3, 2 * m, seed=seed) for seed in range(8)])
    for matrix, optimum in zip(matrices, optima(matrices, n, m), strict=True):
        order = permutation_search(matrix, (n, m), searched("deep", num_regressions=0))
        assert retained(matrix, order, n, m) == pytest.approx(float(optimum), rel=1e-12)


@pytest.mark.parametrize("m", range(2, 17))
def test_ways_differ_and_change_both_stripes(m: int) -> None:
    ways = module._ways(m)
    assert ways.sort(dim=1).values.equal(torch.arange(2 * m).expand(len(ways), -1))
    stripes = {frozenset((frozenset(way[:m]), frozenset(way[m:]))) for way in ways.tolist()}
    assert len(stripes) == len(ways)
    assert frozenset((frozenset(range(m)), frozenset(range(m, 2 * m)))) not in stripes
    if m == 4:
        assert len(ways) == 35 - 1


def test_the_deep_search_comes_near_to_the_optimum() -> None:
    """Of 64 random 4 × 16 matrices at 2:4, it has at least 98 % of the optima's gain, summed over the matrices.

    A gain is what is kept over what the identity keeps; the optimum is over all 2,627,625 partitions into stripes.
    """
    identity = torch.arange(16)
    matrices = torch.stack([scores_of(4, 16, seed=seed) for seed in range(64)])
    optimum = float(optima(matrices, 2, 4).sum()) - sum(retained(each, identity, 2, 4) for each in matrices)
    search = searched("deep", num_regressions=2)
    gains = [gain(each, permutation_search(each, TWO_OF_FOUR, search)) for each in matrices]
    assert 0.98 * optimum <= sum(gains) <= optimum * (1 + 1e-12)


def test_the_same_seed_finds_the_same_order() -> None:
    scores = scores_of(16, 48)
    for method in METHODS:
        first, again, other = (permutation_search(scores, (2, 4), searched(method, 6, seed)) for seed in (1, 1, 2))
        assert first.equal(again)
        assert first.equal(other) == (method == "greedy")


def test_methods_find_more_than_a_thousand_random_orders() -> None:
    """On 64 × 64 scores; there, regressions add to the greedy search, whichever moves they use."""
    scores = scores_of(64, 64)
    generator = torch.Generator().manual_seed(0)
    at_random = max(gain(scores, torch.randperm(64, generator=generator)) for _ in range(1000))
    greedy, regressions, deep = (
        gain(scores, permutation_search(scores, (2, 4), searched(each, 5))) for each in METHODS
    )
    assert at_random < greedy < min(regressions, deep)


@pytest.mark.parametrize("pattern", [(1, 16), (8, 16), (15, 16), (7, 8)])
def test_wide_stripes_gain(pattern: tuple[int, int]) -> None:
    scores = scores_of(32, 64, "outliers")
    deep, greedy = (permutation_search(scores, pattern, searched(each, 1)) for each in ("deep", "greedy"))
    assert gain(scores, deep, NMPattern(*pattern)) >= gain(scores, greedy, NMPattern(*pattern)) > 0


def test_scores_stay_as_they_are_and_order_is_that_of_their_columns() -> None:
    """A large and a small column share each stripe; the scores, here a parameter, are not written to."""
    scores = torch.nn.Parameter(torch.tensor([[9.0, 9.0, 1.0, 1.0], [9.0, 9.0, 1.0, 1.0]], dtype=torch.float64))
    before = scores.detach().clone()
    order = permutation_search(scores, (1, 2), searched("greedy"))
    assert {frozenset(each) for each in order.unflatten(0, (2, 2)).tolist()} in (
        {frozenset((0, 2)), frozenset((1, 3))},
        {frozenset((0, 3)), frozenset((1, 2))},
    )
    assert scores.equal(before)


def test_progress_is_told_of_each_regression() -> None:
    names: list[str] = []

    @contextlib.contextmanager
    def progress(num_items: int) -> Iterator[Callable[[str], None]]:
        names.append(f"{num_items} in all")
        yield names.append

    permutation_search(scores_of(4, 16), (2, 4), searched("regressions", 2), progress)
    assert names == ["2 in all", "regression 1", "regression 2"]


@pytest.mark.parametrize("pattern", [(0, 4), (4, 4), (5, 4), (1, 17), (-1, 2)])
def test_patterns_out_of_range(pattern: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="1 <= n < m <= 16"):
        permutation_search(torch.ones(4, 68 * 4), pattern, PermutationSearch())


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.ones(4, 6), "multiple of m = 4"),
        (torch.ones(4, 0), "multiple of m = 4"),
        (torch.ones(8), "multiple of m = 4"),
        (-torch.ones(4, 8), "not negative"),
        (torch.full((4, 8), torch.nan), "finite"),
        (torch.full((4, 8), torch.inf), "finite"),
    ],
)
def test_scores_that_are_refused(scores: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        permutation_search(scores, (2, 4), PermutationSearch())
    with pytest.raises(ValueError, match=message):
        retained(scores, torch.arange(8), 2, 4)


@pytest.mark.parametrize(
    "fields",
    [{"method": "annealing"}, {"num_regressions": -1}, {"num_swaps_limit": 0}, {"num_stripe_pairs": 0}, {"seed": -1}],
)
def test_fields_out_of_range(fields: dict) -> None:
    with pytest.raises(ConfigError) as raised:
        PermutationSearch(**fields)
    assert raised.value.field in fields
