"""The order of input channels that keeps the most when N of every M consecutive are kept (Pool & Yu 2021).

*Channel Permutations for N:M Sparse Neural Networks*, NeurIPS 2021. M consecutive channels are a stripe: what it keeps
depends neither on the order of its columns nor on its place, so that only which columns share a stripe is searched.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..runtime.config import LARGEST_COUNT, describe, require_int
from ..runtime.errors import ConfigError

if TYPE_CHECKING:
    # Options name a search, and a saved model is loaded without the compiler.
    from .calibration import Progress

METHODS = ("greedy", "regressions", "deep")
_LARGEST_M = 16
_LARGEST_M_IN_FULL = 6
_NUM_WAYS = 512
_PAIRS_LOOKED_AT = 16
_LEAST_GAIN = 1e-12
_BATCH_VALUES = 1 << 19


class NMPattern(NamedTuple):
    """``n`` values kept of every ``m`` consecutive ones; 1 <= n < m <= 16."""

    n: int
    m: int


@dataclass(frozen=True)
class PermutationSearch:
    """How the order is searched. Fields out of range: ConfigError."""

    method: str = "deep"
    """Which moves are tried.

    "greedy": swaps of two columns, until none gains. "regressions": from there, random swaps that may lose, each time
    followed by those that gain; the best order stays. "deep": as "regressions", and where no swap gains, the columns of
    two stripes are shared out anew in all ways, for the stripe pairs whose best swap loses least.
    """

    num_regressions: int = 100
    """Local optima left by random swaps, for "regressions" and "deep"."""

    num_swaps_limit: int = 16
    """The most random swaps in one regression; there are one to as many."""

    num_stripe_pairs: int = 16
    """Stripe pairs shared out anew in one round of "deep"."""

    seed: int = 0
    """Of the random swaps; the same seed finds the same order."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            what = f"method must be one of {', '.join(METHODS)}, not {describe(self.method)}"
            raise ConfigError(what, field="method")
        require_int(self.num_regressions, "num_regressions", 0, LARGEST_COUNT)
        require_int(self.num_swaps_limit, "num_swaps_limit", 1, LARGEST_COUNT)
        require_int(self.num_stripe_pairs, "num_stripe_pairs", 1, LARGEST_COUNT)
        require_int(self.seed, "seed", 0, LARGEST_COUNT)


def permutation_search(
    scores: torch.Tensor, pattern: tuple[int, int], search: PermutationSearch, progress: Progress | None = None
) -> torch.Tensor:
    """The order, int64 [columns], in which ``scores[:, order]`` keeps the most found under ``pattern`` = (n, m).

    ``scores`` [rows, columns] are finite and not negative. The search runs on the CPU, in float64, and holds the scores
    and a table [columns, columns]; ``progress`` is told of each regression. Raises ValueError where n and m are out of
    range, where m does not divide the columns, and for scores of another shape, below zero or not finite.
    """
    pattern = _checked(scores, pattern)
    stripes = Stripes.of(scores, pattern)
    _improve(stripes, search)
    if search.method == "greedy" or stripes.num_stripes == 1:
        return stripes.order
    generator = torch.Generator().manual_seed(search.seed)
    if progress is None:
        return _regress(stripes, search, generator, lambda name: None)
    with progress(search.num_regressions) as begin:
        return _regress(stripes, search, generator, begin)


def retained(scores: torch.Tensor, order: torch.Tensor, n: int, m: int) -> float:
    """What is kept of ``scores`` [rows, columns], n of every m columns of ``order`` in each row: a sum in float64."""
    n, m = _checked(scores, (n, m))
    return scores[:, order].double().unflatten(1, (-1, m)).topk(n, dim=-1).values.sum().item()


@dataclass
class Stripes:
    """Columns in an order, what each stripe keeps, and what each swap of two columns would gain.

    order: int64 [C]; columns: float64 [C, R], in that order; kept: float64 [S]; gains: float64 [C, C], what the stripe
    of place i gains with the column of place j in the place of i; shared: bool [S, S], for a < b whether the columns
    of these two stripes, as they are now, have been shared out in all ways.
    """

    order: torch.Tensor
    columns: torch.Tensor
    kept: torch.Tensor
    gains: torch.Tensor
    shared: torch.Tensor
    pattern: NMPattern

    @staticmethod
    def of(scores: torch.Tensor, pattern: NMPattern) -> Stripes:
        num_columns = scores.shape[1]
        num_stripes = num_columns // pattern.m
        columns = scores.detach().t().to("cpu", torch.float64, copy=True, memory_format=torch.contiguous_format)
        kept, gains = columns.new_empty(num_stripes), columns.new_empty(num_columns, num_columns)
        shared = torch.zeros(num_stripes, num_stripes, dtype=torch.bool)
        stripes = Stripes(torch.arange(num_columns), columns, kept, gains, shared, pattern)
        stripes.measure(torch.arange(num_stripes))
        return stripes

    @property
    def num_stripes(self) -> int:
        return len(self.kept)

    def copy(self) -> Stripes:
        tensors = {field.name: getattr(self, field.name).clone() for field in dataclasses.fields(self)[:-1]}
        return Stripes(**tensors, pattern=self.pattern)

    def measure(self, changed: torch.Tensor) -> None:
        """Bring ``kept``, ``gains`` and ``shared`` up to date with the columns of the stripes ``changed``.

        With column x in the place of p, a row of a stripe keeps max(x, t) and the n - 1 largest of the others, t being
        the nth largest of the others. As max(x, t) is (x + t + |x - t|) / 2, the sums over rows are L1 distances.
        """
        n, m = self.pattern
        in_stripes = self.columns.unflatten(0, (-1, m))[changed]
        largest = in_stripes.transpose(1, 2).sort(dim=-1, descending=True).values
        last_kept, next_in_size = largest[:, None, :, n - 1], largest[:, None, :, n]
        thresholds = torch.where(in_stripes >= last_kept, next_in_size, last_kept).flatten(0, 1)
        lost = in_stripes.maximum(last_kept).sum(dim=2).flatten()
        entering = torch.cdist(thresholds, self.columns, p=1)
        entering += thresholds.sum(dim=1)[:, None] + self.columns.sum(dim=1)
        self.gains[places_of(changed, m)] = entering / 2 - lost[:, None]
        self.kept[changed] = largest[..., :n].sum(dim=(1, 2))
        self.shared[changed] = False
        self.shared[:, changed] = False

    def rearrange(self, places: torch.Tensor, sources: torch.Tensor) -> None:
        """Put into ``places`` the columns that are now in ``sources``, which are the same places in another order."""
        self.order[places] = self.order[sources]
        self.columns[places] = self.columns[sources]
        self.gains[:, places] = self.gains[:, sources]
        self.measure((places // self.pattern.m).unique())

    def swap_gains(self) -> torch.Tensor:
        """[S, M, S, M]: what swapping column i of stripe a with column j of stripe b gains; -inf unless a < b."""
        m = self.pattern.m
        both = (self.gains + self.gains.t()).unflatten(1, (-1, m)).unflatten(0, (-1, m))
        ordered = torch.ones(self.num_stripes, self.num_stripes, dtype=torch.bool).triu(1)
        return both.masked_fill_(~ordered[:, None, :, None], -math.inf)


def places_of(stripes: torch.Tensor, m: int) -> torch.Tensor:
    """The places of the columns of ``stripes``, stripe by stripe."""
    return (stripes[:, None] * m + torch.arange(m)).flatten()


def _checked(scores: torch.Tensor, pattern: tuple[int, int]) -> NMPattern:
    n, m = pattern
    if not 1 <= n < m <= _LARGEST_M:
        raise ValueError(f"n of m must satisfy 1 <= n < m <= {_LARGEST_M}, got {n} of {m}")
    if scores.dim() != 2 or not scores.shape[1] or scores.shape[1] % m:
        raise ValueError(f"scores must be [rows, columns] with columns a multiple of m = {m}, got {list(scores.shape)}")
    if not bool(scores.isfinite().all()) or bool((scores < 0).any()):
        raise ValueError("scores must be finite and not negative")
    return NMPattern(n, m)


def _improve(stripes: Stripes, search: PermutationSearch) -> None:
    """Swap columns, and share out those of stripe pairs where "deep" asks for it, until neither gains."""
    while True:
        gains = stripes.swap_gains()
        best = gains.amax(dim=(1, 3))
        if _make_swaps(stripes, gains, best):
            continue
        if search.method != "deep" or not _share_out(stripes, best, search.num_stripe_pairs):
            return


def _make_swaps(stripes: Stripes, gains: torch.Tensor, best: torch.Tensor) -> bool:
    """Make the best swap of each of the stripe pairs that gain most, no stripe in two pairs; False if none gains."""
    m = stripes.pattern.m
    pairs = (best > 0).nonzero()
    chosen = pairs[_gaining(stripes, pairs, best[pairs[:, 0], pairs[:, 1]])]
    swaps = gains[chosen[:, 0], :, chosen[:, 1], :].flatten(1).argmax(dim=1)
    first, second = chosen[:, 0] * m + swaps // m, chosen[:, 1] * m + swaps % m
    stripes.rearrange(torch.cat((first, second)), torch.cat((second, first)))
    return bool(len(chosen))


def _share_out(stripes: Stripes, best: torch.Tensor, num_pairs: int) -> bool:
    """Share out in the best way the columns of the stripe pairs whose best swap loses least; False if none gains."""
    m = stripes.pattern.m
    promise, flat = best.masked_fill(stripes.shared, -math.inf).flatten().topk(min(num_pairs, best.numel()))
    flat = flat[promise > -math.inf]
    if not len(flat):
        return False
    pairs = torch.stack((flat // stripes.num_stripes, flat % stripes.num_stripes), dim=1)
    stripes.shared[pairs[:, 0], pairs[:, 1]] = True
    places, ways = (pairs[:, :, None] * m + torch.arange(m)).flatten(1), _ways(m)
    gains, chosen_ways = _kept_in_ways(stripes, places, ways).max(dim=1)
    gains -= stripes.kept[pairs].sum(dim=1)
    chosen = _gaining(stripes, pairs, gains)
    shares = ways[chosen_ways[chosen]]
    stripes.rearrange(places[chosen].flatten(), places[chosen].gather(1, shares).flatten())
    return bool(len(chosen))


def _gaining(stripes: Stripes, pairs: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
    """Which of ``pairs`` [P, 2] gain more than rounding does: largest gain first, no stripe in two of them."""
    indices = (gains > _LEAST_GAIN * stripes.kept[pairs].sum(dim=1)).nonzero().flatten()
    indices = indices[gains[indices].argsort(descending=True, stable=True)[: _PAIRS_LOOKED_AT * stripes.num_stripes]]
    taken: set[int] = set()
    chosen = []
    for index, pair in zip(indices.tolist(), pairs[indices].tolist(), strict=True):
        if taken.isdisjoint(pair):
            taken.update(pair)
            chosen.append(index)
    return torch.tensor(chosen, dtype=torch.int64)


@functools.cache
def _ways(m: int) -> torch.Tensor:
    """[W, 2m]: ways to share out 2m columns, the first m to one stripe: all that change it, up to m = 6.

    Beyond that, ``_NUM_WAYS`` of those that exchange two columns for two, which swaps do not try, drawn once for all.
    """
    if m <= _LARGEST_M_IN_FULL:
        firsts = [(0, *rest) for rest in itertools.combinations(range(1, 2 * m), m - 1)][1:]
        return torch.tensor([[*first, *sorted(set(range(2 * m)) - set(first))] for first in firsts])
    twos = list(itertools.combinations(range(m), 2))
    drawn = torch.randperm(len(twos) ** 2, generator=torch.Generator().manual_seed(m))[:_NUM_WAYS]
    ways = torch.arange(2 * m).repeat(len(drawn), 1)
    ours, theirs = torch.tensor(twos)[drawn // len(twos)], torch.tensor(twos)[drawn % len(twos)] + m
    return ways.scatter(1, ours, theirs).scatter(1, theirs, ours)


def _kept_in_ways(stripes: Stripes, places: torch.Tensor, ways: torch.Tensor) -> torch.Tensor:
    """[P, W]: what two stripes keep with the columns of ``places`` [P, 2m] shared out in each of ``ways`` [W, 2m]."""
    n, m = stripes.pattern
    num_rows = stripes.columns.shape[1]
    halves = ways.unflatten(1, (2, m))
    kept = []
    for batch in places.split(max(1, _BATCH_VALUES // (2 * len(ways) * max(1, num_rows)))):
        columns = stripes.columns[batch]
        sums = _sum_of_largest([columns[:, halves[:, :, place]] for place in range(m)], n)
        kept.append(sums.sum(dim=(2, 3)))
    return torch.cat(kept)


def _sum_of_largest(values: list[torch.Tensor], n: int) -> torch.Tensor:
    """Elementwise, the sum of the ``n`` largest of ``values``, which are used up."""
    largest = values[:n]
    for value in values[n:]:
        for index, each in enumerate(largest):
            largest[index], value = each.maximum(value), each.minimum(value)
    return torch.stack(largest).sum(dim=0)


def _regress(
    stripes: Stripes, search: PermutationSearch, generator: torch.Generator, begin: Callable[[str], None]
) -> torch.Tensor:
    """The best order found from ``stripes`` on, by random swaps in it, each time followed by swaps that gain."""
    for index in range(search.num_regressions):
        begin(f"regression {index + 1}")
        trial = stripes.copy()
        _swap_at_random(trial, search.num_swaps_limit, generator)
        _improve(trial, search)
        if float(trial.kept.sum()) > float(stripes.kept.sum()):
            stripes = trial
    return stripes.order


def _swap_at_random(stripes: Stripes, limit: int, generator: torch.Generator) -> None:
    m, num_columns = stripes.pattern.m, len(stripes.order)
    places = torch.arange(num_columns)
    for _ in range(_below(limit, generator) + 1):
        first = _below(num_columns, generator)
        stripe = (first // m + 1 + _below(stripes.num_stripes - 1, generator)) % stripes.num_stripes
        second = stripe * m + _below(m, generator)
        places[[first, second]] = places[[second, first]]
    moved = (places != torch.arange(num_columns)).nonzero().flatten()
    stripes.rearrange(moved, places[moved])


def _below(limit: int, generator: torch.Generator) -> int:
    return int(torch.randint(limit, (), generator=generator))
