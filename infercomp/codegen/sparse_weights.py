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
_PATTERNS = range(1 << GROUP)


def _kept(pattern: int) -> list[int]:
    """The two channels that are kept, where the bits of ``pattern`` say which of four are not zero."""
    return sorted(sorted(range(GROUP), key=lambda channel: pattern >> channel & 1 == 0)[:KEPT])


_KEPT = torch.tensor([_kept(pattern) for pattern in _PATTERNS])
_NIBBLES = (_KEPT[:, 0] | _KEPT[:, 1] << 2).to(torch.uint8)
_IS_DENSE = torch.tensor([pattern.bit_count() > KEPT for pattern in _PATTERNS])
PAIRS_OF_PLACES = _NIBBLES.unique()
"""The six nibbles that a group may have."""


def _patterns(weight: Tensor) -> Tensor:
    """Which of each four consecutive inputs of weight [N, K] are not zero: bits 0 to 3 of int32 [N, K/4]."""
    words = (weight != 0).contiguous().view(torch.int32)
    pairs = words | words >> 7
    return pairs.bitwise_or_(pairs >> 14).bitwise_and_(15)


def is_dense_group(weight: Tensor) -> Tensor:
    """Whether more than two of each four consecutive inputs of weight [N, K] are not zero, [N, K/4]; K in fours."""
    return _looked_up(_IS_DENSE, _patterns(weight))


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
    patterns = _patterns(weight)
    is_dense = _looked_up(_IS_DENSE, patterns)
    if bool(is_dense.any()):
        row, group = is_dense.nonzero()[0].tolist()
        count = int(patterns[row, group]).bit_count()
        what = f"inputs {GROUP * group} to {GROUP * group + 3} of output {row} have {count} nonzeros"
        raise ConfigError(f"{what}, and 2:4 keeps two", remedy="mask the weight, or keep it dense", field="weight")
    nibbles = _looked_up(_NIBBLES, patterns)
    values = weight.unflatten(1, (-1, GROUP)).gather(-1, _looked_up(_KEPT, patterns)).flatten(1)
    return values.masked_fill_(values == 0, 0), nibbles[:, ::2] | nibbles[:, 1::2] << 4


def _looked_up(table: Tensor, patterns: Tensor) -> Tensor:
    rows = table.to(patterns.device).index_select(0, patterns.flatten())
    return rows.view(*patterns.shape, *table.shape[1:])


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
