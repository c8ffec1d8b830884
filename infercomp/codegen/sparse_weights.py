"""Weights of which two in every four consecutive inputs are kept: values and where they were (2:4 sparsity).

Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks". Values lie in the order of their channels. A nibble of
``indices`` is a group of four, the low nibble the even group: bits 0 and 1 say which of the four the first value is,
bits 2 and 3 which the second is, and the first comes before the second.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.errors import ConfigError

GROUP = 4
KEPT = 2
CHANNELS_OF_BYTE = 2 * GROUP
_CHANNELS = torch.arange(GROUP, dtype=torch.uint8)


def _nibble(nonzeros: int) -> int:
    """The places of the two that are kept, where the bits of ``nonzeros`` say which of four are not zero."""
    first, second = sorted(sorted(range(GROUP), key=lambda channel: nonzeros >> channel & 1 == 0)[:KEPT])
    return first | second << 2


_NIBBLES = [_nibble(nonzeros) for nonzeros in range(1 << GROUP)]
PAIRS_OF_PLACES = torch.tensor(sorted(set(_NIBBLES)), dtype=torch.uint8)
"""The six nibbles that a group may have."""


def nonzeros_of_groups(weight: Tensor) -> Tensor:
    """How many of each four consecutive inputs of weight [N, K] are not zero, int64 [N, K/4]; K in fours."""
    return (weight != 0).unflatten(1, (-1, GROUP)).sum(-1)


def compress_2_of_4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K] of any dtype -> values [N, K/2] of its dtype, and indices uint8 [N, K/8].

    A group with fewer than two nonzeros keeps the zeros of its first free places too; ``restore_2_of_4`` gives back
    each nonzero bit for bit, and +0 for each zero. Raises ConfigError where K is not in eights, or where a group
    of four inputs has more than two nonzeros.
    """
    num_inputs = weight.shape[1]
    if num_inputs % CHANNELS_OF_BYTE:
        what = f"2:4 weights have inputs in eights, not {num_inputs}"
        raise ConfigError(what, remedy="keep it dense", field="weight")
    counts = nonzeros_of_groups(weight)
    if bool((counts > KEPT).any()):
        row, group = (counts > KEPT).nonzero()[0].tolist()
        what = f"inputs {GROUP * group} to {GROUP * group + 3} of output {row} have {int(counts[row, group])} nonzeros"
        raise ConfigError(f"{what}, and 2:4 keeps two", remedy="mask the weight, or keep it dense", field="weight")
    is_kept = (weight != 0).unflatten(1, (-1, GROUP)).to(torch.uint8)
    nibbles = torch.tensor(_NIBBLES, dtype=torch.uint8, device=weight.device)[(is_kept << _CHANNELS).sum(-1)]
    indices = nibbles[:, ::2] | nibbles[:, 1::2] << 4
    channels = kept_channels(indices).long().unflatten(1, (-1, KEPT))
    values = weight.unflatten(1, (-1, GROUP)).gather(-1, channels).flatten(1)
    return torch.where(values == 0, torch.zeros_like(values), values), indices


def kept_channels(indices: Tensor) -> Tensor:
    """Which input of its group of four each value is, uint8 [N, K/2], of ``indices`` uint8 [N, K/8]."""
    return torch.stack([indices >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(1)


def packed_channels(channels: Tensor) -> Tensor:
    """The ``indices`` uint8 [N, K/8] of which ``kept_channels`` makes uint8 [N, K/2]."""
    first, second, third, fourth = channels.unflatten(1, (-1, 4)).unbind(-1)
    return first | second << 2 | third << 4 | fourth << 6


def restore_2_of_4(values: Tensor, indices: Tensor) -> Tensor:
    """The weight [N, K] that ``compress_2_of_4`` made values [N, K/2] and indices uint8 [N, K/8] of."""
    groups = values.unflatten(1, (-1, KEPT))
    channels = kept_channels(indices).long().unflatten(1, (-1, KEPT))
    return groups.new_zeros(*groups.shape[:-1], GROUP).scatter(-1, channels, groups).flatten(1)
