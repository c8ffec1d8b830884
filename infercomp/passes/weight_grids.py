"""The grids that weights are rounded to, and the choice of one among several by the error that it leaves.

Letters: N output channels, K input channels, g channels of a group, G = K / g groups. A grid stands for
w = scale * (code - zero), with codes and scales of the range and the dtype that ``codegen.ops`` stores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..codegen.ops.group_codes import highest_code, middle_code, packed_codes
from ..codegen.ops.quantized import SMALLEST_MAXIMUM
from .linear_recipes import LinearRecipe

# Every candidate takes several passes over a part of the weight, which should stay in a processor's cache.
_CHUNK_ELEMENTS = 1 << 19


@dataclass(frozen=True)
class WeightGrid:
    """The steps and the zeros of a weight [N, K], each float32 [N, G]."""

    recipe: LinearRecipe
    scale: torch.Tensor
    zero: torch.Tensor
    group_size: int

    def of_channels(self, channels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero [N, channels] of these input channels."""
        groups = channels // self.group_size
        return self.scale[:, groups], self.zero[:, groups]

    def values_of(self, codes: torch.Tensor) -> torch.Tensor:
        """What codes [N, K] stand for, float32."""
        groups = codes.unflatten(1, (-1, self.group_size)) - self.zero[:, :, None]
        return groups.mul_(self.scale[:, :, None]).flatten(1)

    def stored(self, codes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Codes [N, K] as integers of the program: codes, scales and, where the recipe has any, zeros."""
        if self.recipe.group_size is None:
            return codes.to(torch.int8), self.scale.flatten()
        packed = packed_codes(codes, self.recipe.weight_bits), self.scale.half()
        return packed if self.recipe.symmetric else (*packed, self.zero.to(torch.uint8))


def nearest_codes(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, recipe: LinearRecipe) -> torch.Tensor:
    """The codes of the points next to ``weight``, all of one shape or broadcast to it."""
    return (weight / scale).add_(zero).round_().clamp_(*_range(recipe))


def _range(recipe: LinearRecipe) -> tuple[int, int]:
    """The lowest and the highest code."""
    return (-127, 127) if recipe.group_size is None else (0, highest_code(recipe.weight_bits))


def fitted_grid(weight: torch.Tensor, recipe: LinearRecipe, hessian: torch.Tensor, shares: torch.Tensor) -> WeightGrid:
    """The grid whose nearest codes for ``weight`` [N, K] leave the least error in the outputs.

    d H dᵀ is a group's error, d being that of its weights and H its block of ``hessian`` [K, K]. ``shares`` are the
    parts of the range of a group that the grids tried reach.
    """
    group_size = recipe.group_size or weight.shape[1]
    blocks = hessian.float().unflatten(0, (-1, group_size)).unflatten(-1, (-1, group_size))
    blocks = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    rows = weight.split(max(1, _CHUNK_ELEMENTS // weight.shape[1]))
    parts = [_fitted_rows(each.float().unflatten(-1, (-1, group_size)), recipe, blocks, shares) for each in rows]
    scale, zero = (torch.cat(each).squeeze(-1) for each in zip(*parts, strict=True))
    return WeightGrid(recipe, scale, zero, group_size)


def _fitted_rows(
    groups: torch.Tensor, recipe: LinearRecipe, blocks: torch.Tensor, shares: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero [N, G, 1] for ``groups`` [N, G, g], given the groups' blocks of the Hessian [G, g, g]."""
    groups = groups.contiguous()
    best: list[torch.Tensor] = []
    for scale, zero in _candidates(groups, recipe, shares):
        difference = (nearest_codes(groups, scale, zero, recipe).sub_(zero).mul_(scale).sub_(groups)).transpose(0, 1)
        error = torch.bmm(difference, blocks).mul_(difference).sum(-1, keepdim=True).transpose(0, 1)
        found = [error, scale, zero]
        if best:
            is_less = error < best[0]
            found = [torch.where(is_less, new, old) for new, old in zip(found, best, strict=True)]
        best = found
    return best[1], best[2]


def _candidates(
    groups: torch.Tensor, recipe: LinearRecipe, shares: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Scales and zeros [N, G, 1], the whole range of each group first."""
    if recipe.group_size is None:
        extreme = groups.abs().amax(-1, keepdim=True)
        for share in shares:
            yield _whole(extreme * (share / 127)), torch.zeros_like(extreme)
    elif recipe.symmetric:
        extreme, middle = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)), middle_code(recipe.weight_bits)
        zero = torch.full_like(extreme, float(middle))
        for share in shares:
            for end in (1 - middle, -middle):
                yield _half(extreme * (share / end)), zero
    else:
        highest = highest_code(recipe.weight_bits)
        low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        for share in shares:
            scale = _half((high - low) * (share / highest))
            yield scale, torch.round((-low * share / scale).clamp(max=highest))


def _half(scale: torch.Tensor) -> torch.Tensor:
    """The scale of a group as the program holds it."""
    return _whole(scale.half().float())


def _whole(scale: torch.Tensor) -> torch.Tensor:
    """The scale, or 1 where it is zero, or would be: codes are then all the middle."""
    return torch.where(scale.abs() < SMALLEST_MAXIMUM, 1.0, scale)
