"""Which heads are alike, and the orthogonal maps that lay them over one another (orthogonal Procrustes, Schönemann
1966; for several heads at once its generalised form, Gower 1975).

Heads are known by their second moments [H, H, D, D]: of heads i and j, the sum over tokens of x_iᵀ x_j, x being rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_ROUNDS = 50
_SETTLED = 1e-12
# How much a map is drawn to the identity: what no activation shows has no direction of its own.
_PULL = 1e-6


@dataclass(frozen=True)
class Turns:
    """The orthogonal maps that what is computed of a head cannot see, or can undo.

    Channels ``first[i]`` and ``second[i]`` are a rotary pair, and may be turned by one angle; channels in neither may
    be mapped at will. Where ``is_normalized`` each channel has a weight behind the map, and signs are all that is left.
    """

    size: int
    first: tuple[int, ...] = ()
    second: tuple[int, ...] = ()
    is_normalized: bool = False

    @property
    def rest(self) -> list[int]:
        return [channel for channel in range(self.size) if channel not in {*self.first, *self.second}]


def nearest_turns(moments: torch.Tensor, turns: Turns) -> torch.Tensor:
    """The maps R [..., D, D] of the kind that is allowed for which the trace of Rᵀ ``moments`` is largest.

    For moments Xᵀ Y, R is what brings X R nearest to Y.
    """
    found = torch.zeros_like(moments)
    first, second, rest = (list(each) for each in (turns.first, turns.second, turns.rest))
    diagonal = moments.diagonal(dim1=-2, dim2=-1)
    along = diagonal[..., first] + diagonal[..., second]
    across = moments[..., second, first] - moments[..., first, second]
    if turns.is_normalized:
        along, across = _signs(along), torch.zeros_like(along)
    length = torch.hypot(along, across)
    is_still = length == 0
    length = length.masked_fill(is_still, 1.0)
    cosine, sine = (along / length).masked_fill(is_still, 1.0), across / length
    found[..., first, first] = found[..., second, second] = cosine
    found[..., second, first], found[..., first, second] = sine, -sine
    if turns.is_normalized:
        found[..., rest, rest] = _signs(diagonal[..., rest])
    elif rest:
        rows = torch.tensor(rest, device=moments.device)
        left, _, right = torch.linalg.svd(moments[..., rows[:, None], rows])
        found[..., rows[:, None], rows] = left @ right
    return found


def _signs(values: torch.Tensor) -> torch.Tensor:
    return torch.where(values < 0, -1.0, 1.0).to(values)


def aligned(moments: torch.Tensor, turns: Turns) -> torch.Tensor:
    """Maps R [H, D, D] that bring the heads x_h R_h nearest to their mean, in turn with that mean."""
    heads = range(len(moments))
    pulled = moments + _pull(moments)
    nearest = nearest_turns(pulled, turns)
    # The head that all others come nearest to is what they are laid over at first.
    middle = max(heads, key=lambda head: float((nearest[:, head] * pulled[:, head]).sum()))
    maps, closeness = nearest[:, middle], 0.0
    maps[middle] = torch.eye(turns.size).to(moments)
    for _ in range(_ROUNDS):
        with_mean = torch.einsum("ijab,jbc->iac", pulled, maps)
        maps = nearest_turns(with_mean, turns)
        found = float((maps * with_mean).sum())
        if found - closeness <= _SETTLED * abs(found):
            break
        closeness = found
    return maps


def _pull(moments: torch.Tensor) -> torch.Tensor:
    size = moments.shape[-1]
    energy = moments.diagonal().diagonal(dim1=0, dim2=1).sum() / (len(moments) * size)
    return _PULL * energy * torch.eye(size).to(moments)


def distances(moments: torch.Tensor, turns: Turns) -> torch.Tensor:
    """How far each two heads are apart once they are aligned, as a part of both their squares: [H, H]."""
    closeness = (nearest_turns(moments, turns) * moments).sum((-2, -1))
    energies = torch.stack([moments[head, head].trace() for head in range(len(moments))])
    both = energies[:, None] + energies[None, :]
    return torch.where(both > 0, (both - 2 * closeness) / both, 0.0).clamp(min=0)


def alike(apart: torch.Tensor, num_groups: int) -> list[list[int]]:
    """Heads in groups of equal size whose heads are near one another: pairs are swapped while that lowers the sum of
    the distances ``apart`` [H, H] within groups, from groups of neighbours on.
    """
    size = len(apart) // num_groups
    groups = [list(range(start, start + size)) for start in range(0, len(apart), size)]
    table = ((apart + apart.t()) / 2).tolist()
    while (best := _best_swap(table, groups)) is not None:
        (one, i), (other, j) = best
        groups[one][i], groups[other][j] = groups[other][j], groups[one][i]
    return sorted(sorted(group) for group in groups)


def _best_swap(
    table: Sequence[Sequence[float]], groups: Sequence[Sequence[int]]
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    def cost(head: int, group: Sequence[int], leaving: int) -> float:
        return sum(table[head][each] for each in group if each != leaving)

    best, least = None, -1e-9
    for one, group in enumerate(groups):
        for other in range(one + 1, len(groups)):
            for i, head in enumerate(group):
                for j, partner in enumerate(groups[other]):
                    gain = cost(head, groups[other], partner) + cost(partner, group, head)
                    gain -= cost(head, group, head) + cost(partner, groups[other], partner)
                    if gain < least:
                        best, least = ((one, i), (other, j)), gain
    return best
