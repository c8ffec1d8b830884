"""The weights of fewer heads of keys and values, made of those that a model has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .head_alignment import Turns, aligned, alike, distances


@dataclass(frozen=True)
class HeadPlan:
    """Groups of heads, how much each head of keys and values counts in its group [H], and the maps that align them.

    ``key_maps`` and ``value_maps`` are [H, D, D], or None where heads stay as they are.
    """

    groups: tuple[tuple[int, ...], ...]
    shares: torch.Tensor
    key_maps: torch.Tensor | None = None
    value_maps: torch.Tensor | None = None

    @property
    def order(self) -> list[int]:
        return [head for group in self.groups for head in group]

    def query_order(self, num_query_heads: int) -> list[int]:
        """The query heads, in the order of the groups that their keys are in."""
        repeats = num_query_heads // len(self.shares)
        return [head * repeats + each for head in self.order for each in range(repeats)]

    def merged(self, heads: torch.Tensor, maps: torch.Tensor | None) -> torch.Tensor:
        """Rows [H, D, ...] of the heads of keys or values -> [G, D, ...]."""
        turned = mapped(heads, maps) * self.shares.to(heads).view(-1, *[1] * (heads.dim() - 1))
        return torch.stack([turned[list(group)].sum(0) for group in self.groups])

    def regrouped(self, heads: torch.Tensor, maps: torch.Tensor | None) -> torch.Tensor:
        """Rows [Hq, D, ...] of query heads, or columns of what reads them, in the order of groups and aligned."""
        repeats = len(heads) // len(self.shares)
        turned = mapped(heads, None if maps is None else maps.repeat_interleave(repeats, 0))
        return turned[self.query_order(len(heads))]


def mapped(heads: torch.Tensor, maps: torch.Tensor | None) -> torch.Tensor:
    """Rᵀ w for the rows of each head, [H, D, ...]: what a linear of weight w gives is mapped by R."""
    return heads if maps is None else torch.einsum("hab,ha...->hb...", maps.to(heads), heads)


def plan_by_name(merge: str, num_heads: int, num_groups: int, generator: torch.Generator) -> HeadPlan:
    """Neighbours in groups, of which the mean, the first or a random one is taken."""
    size = num_heads // num_groups
    groups = tuple(tuple(range(start, start + size)) for start in range(0, num_heads, size))
    drawn = torch.randint(size, (num_groups,), generator=generator).tolist()
    shares = torch.zeros(num_heads, dtype=torch.float64)
    for group, draw in zip(groups, drawn, strict=True):
        if merge == "mean":
            shares[list(group)] = 1 / size
        else:
            shares[group[0 if merge == "first" else draw]] = 1.0
    return HeadPlan(groups, shares)


def plan_by_moments(
    key_moments: torch.Tensor,
    value_moments: torch.Tensor,
    key_turns: Turns,
    num_groups: int,
    *,
    may_regroup: bool,
) -> HeadPlan:
    """Heads that are alike in groups, aligned within them, and their mean; moments are [H, H, D, D]."""
    num_heads, size = len(key_moments), len(key_moments) // num_groups
    value_turns = Turns(value_moments.shape[-1])
    groups: Sequence[Sequence[int]] = [list(range(start, start + size)) for start in range(0, num_heads, size)]
    if may_regroup and 1 < num_groups < num_heads:
        apart = distances(key_moments, key_turns) + distances(value_moments, value_turns)
        groups = alike(apart, num_groups)
    maps = []
    for moments, turns in ((key_moments, key_turns), (value_moments, value_turns)):
        whole = torch.zeros(num_heads, turns.size, turns.size, dtype=moments.dtype, device=moments.device)
        for group in groups:
            rows = torch.tensor(group, device=moments.device)
            whole[rows] = aligned(moments[rows[:, None], rows], turns)
        maps.append(whole)
    shares = torch.full((num_heads,), 1 / size, dtype=torch.float64)
    return HeadPlan(tuple(map(tuple, groups)), shares, *maps)


def head_moments(values: Sequence[torch.Tensor], rows: torch.Tensor, *, is_normalized: bool) -> torch.Tensor:
    """Second moments [H, H, D, D] of the heads at ``rows`` [H, D] of values [..., N], in float64."""
    heads, size = rows.shape
    total = torch.zeros(heads * size, heads * size, dtype=torch.float64, device=values[0].device)
    for value in values:
        found = value.flatten(0, -2)[:, rows.flatten()].double().view(-1, heads, size)
        if is_normalized:
            found = found / found.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
        flat = found.flatten(1)
        total.addmm_(flat.t(), flat)
    return total.view(heads, size, heads, size).permute(0, 2, 1, 3)
