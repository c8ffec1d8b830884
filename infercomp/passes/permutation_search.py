"""The order of input channels that keeps the most when N of every M consecutive are kept (Pool & Yu 2021).

*Channel Permutations for N:M Sparse Neural Networks*, NeurIPS 2021. M consecutive channels are a stripe: what it keeps
depends neither on the order of its columns nor on its place, so that only which columns share a stripe is searched.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
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
# They are summed where they still lie in a cache.
_DIFFERENCES_AT_ONCE = 1 << 21
_ROWS_AT_ONCE = 256


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

    ``scores`` [rows, columns] are finite and not negative. The search runs on the CPU and holds the scores and a table
    [columns, columns], both in float32, or float64 where the scores are; whether a move gains, float64 decides.
    ``progress`` is told of each regression. Raises ValueError where n and m are out of range, where m does not divide
    the columns, and for scores of another shape, below zero or not finite.
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

    order: int64 [C]; columns: [C, R], in that order; kept: float64 [S]; gains: [C, C], what the stripe of place i gains
    with the column of place j in the place of i; best: [S, S], what the best swap of a column of one stripe with one of
    the other gains both, -inf for a stripe with itself; shared: bool [S, S], for a < b whether the columns of these two
    stripes, as they are now, have been shared out in all ways.
    """

    order: torch.Tensor
    columns: torch.Tensor
    kept: torch.Tensor
    gains: torch.Tensor
    best: torch.Tensor
    shared: torch.Tensor
    pattern: NMPattern

    @staticmethod
    def of(scores: torch.Tensor, pattern: NMPattern) -> Stripes:
        num_columns = scores.shape[1]
        num_stripes = num_columns // pattern.m
        dtype = torch.promote_types(scores.dtype, torch.float32)
        columns = scores.detach().t().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
        kept, gains = torch.empty(num_stripes, dtype=torch.float64), columns.new_empty(num_columns, num_columns)
        best = columns.new_full((num_stripes, num_stripes), -math.inf)
        shared = torch.zeros(num_stripes, num_stripes, dtype=torch.bool)
        stripes = Stripes(torch.arange(num_columns), columns, kept, gains, best, shared, pattern)
        stripes.measure(torch.arange(num_stripes))
        return stripes

    @property
    def num_stripes(self) -> int:
        return len(self.kept)

    def copy(self) -> Stripes:
        tensors = {field.name: getattr(self, field.name).clone() for field in dataclasses.fields(self)[:-1]}
        return Stripes(**tensors, pattern=self.pattern)

    def measure(self, changed: torch.Tensor) -> None:
        """Bring all but ``order`` and ``columns`` up to date with the columns of the stripes ``changed``.

        In a row of a stripe, t being the nth largest of all but column p, p adds max(p - t, 0) to what is kept, and so
        would another column in its place.
        """
        n, m = self.pattern
        in_stripes = self.columns.unflatten(0, (-1, m))[changed]
        *_, last_kept, next_in_size = (each[:, None] for each in _largest(in_stripes.unbind(1), n + 1))
        thresholds = torch.where(in_stripes >= last_kept, next_in_size, last_kept)
        lost = (in_stripes - thresholds).relu_().sum(dim=2).flatten()
        places = places_of(changed, m)
        self.gains[places] = _sums_above(thresholds.flatten(0, 1), self.columns) - lost[:, None]
        self.kept[changed] = self._kept_by(in_stripes)
        of_both = self.gains[places] + self.gains[:, places].t()
        best = of_both.unflatten(1, (-1, m)).unflatten(0, (-1, m)).amax(dim=(1, 3))
        self.best[changed], self.best[:, changed] = best, best.t()
        self.best[changed, changed] = -math.inf
        self.shared[changed] = False
        self.shared[:, changed] = False

    def rearrange(self, places: torch.Tensor, sources: torch.Tensor) -> None:
        """Put into ``places`` the columns that are now in ``sources``, which are the same places in another order."""
        self.order[places] = self.order[sources]
        self.columns[places] = self.columns[sources]
        self.gains[:, places] = self.gains[:, sources]
        self.measure((places // self.pattern.m).unique())

    def rearrange_where_it_gains(self, places: torch.Tensor, sources: torch.Tensor) -> bool:
        """The same for those pairs of stripes [P, 2m] that keep more then; False if none does."""
        m = self.pattern.m
        before = self.kept[places[:, ::m] // m].sum(dim=1)
        after = self._kept_by(self.columns[sources].unflatten(1, (2, m)).flatten(0, 1)).view(-1, 2).sum(dim=1)
        gaining = after - before > _LEAST_GAIN * before
        if not bool(gaining.any()):
            return False
        self.rearrange(places[gaining].flatten(), sources[gaining].flatten())
        return True

    def _kept_by(self, in_stripes: torch.Tensor) -> torch.Tensor:
        """What stripes of the columns [K, m, R] keep: float64 [K]."""
        largest = _largest(in_stripes.unbind(1), self.pattern.n)
        return torch.stack(largest).sum(dim=(0, 2), dtype=torch.float64)


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
    while _swap(stripes) or (search.method == "deep" and _share_out(stripes, search.num_stripe_pairs)):
        pass


def _swap(stripes: Stripes) -> bool:
    """Make the best swap of each of the stripe pairs that gain most, no stripe in two pairs; False if none gains."""
    m = stripes.pattern.m
    pairs = (stripes.best.triu(1) > 0).nonzero()
    pairs = pairs[_gaining(stripes, pairs, stripes.best[pairs[:, 0], pairs[:, 1]])]
    places = (pairs[:, :, None] * m + torch.arange(m)).flatten(1)
    first, second = places[:, :m, None], places[:, None, m:]
    swaps = (stripes.gains[first, second] + stripes.gains[second, first]).flatten(1).argmax(dim=1, keepdim=True)
    columns = torch.cat((swaps // m, swaps % m + m), dim=1)
    return stripes.rearrange_where_it_gains(places, places.scatter(1, columns, places.gather(1, columns.flip(1))))


def _share_out(stripes: Stripes, num_pairs: int) -> bool:
    """Share out in the best way the columns of the stripe pairs whose best swap loses least; False if none gains."""
    m = stripes.pattern.m
    is_open = torch.ones_like(stripes.shared).triu(1) & ~stripes.shared
    promise, flat = stripes.best.where(is_open, -math.inf).flatten().topk(min(num_pairs, stripes.best.numel()))
    flat = flat[promise > -math.inf]
    if not len(flat):
        return False
    pairs = torch.stack((flat // stripes.num_stripes, flat % stripes.num_stripes), dim=1)
    stripes.shared[pairs[:, 0], pairs[:, 1]] = True
    places, ways = (pairs[:, :, None] * m + torch.arange(m)).flatten(1), _ways(m)
    kept, chosen_ways = _kept_in_ways(stripes, places, ways).max(dim=1)
    chosen = _gaining(stripes, pairs, kept - stripes.kept[pairs].sum(dim=1))
    return stripes.rearrange_where_it_gains(places[chosen], places[chosen].gather(1, ways[chosen_ways[chosen]]))


def _gaining(stripes: Stripes, pairs: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
    """Which of ``pairs`` [P, 2] gain: largest gain first, no stripe in two of them."""
    indices = (gains > 0).nonzero().flatten()
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
        largest = _largest([columns[:, halves[:, :, place]] for place in range(m)], n)
        kept.append(torch.stack(largest).sum(dim=(0, 3, 4), dtype=torch.float64))
    return torch.cat(kept)


def _largest(values: Sequence[torch.Tensor], count: int) -> list[torch.Tensor]:
    """Elementwise, the ``count`` largest of ``values``, the largest first."""
    largest: list[torch.Tensor] = []
    for value in values:
        for index, each in enumerate(largest):
            largest[index], value = each.maximum(value), each.minimum(value)
        if len(largest) < count:
            largest.append(value)
    return largest


def _sums_above(thresholds: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """[P, C]: the sum over rows of max(x - t, 0), for each of ``thresholds`` [P, R] and each of ``columns`` [C, R]."""
    sums = thresholds.new_zeros(len(thresholds), len(columns))
    at_once = max(1, _DIFFERENCES_AT_ONCE // (len(columns) * _ROWS_AT_ONCE))
    space = thresholds.new_empty(at_once * len(columns) * _ROWS_AT_ONCE)
    for rows, others in zip(thresholds.split(_ROWS_AT_ONCE, 1), columns.split(_ROWS_AT_ONCE, 1), strict=True):
        for row, total in zip(rows.split(at_once), sums.split(at_once), strict=True):
            differences = space[: len(row) * others.numel()].view(len(row), *others.shape)
            total += torch.sub(others, row[:, None], out=differences).relu_().sum(dim=2)
    return sums


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
