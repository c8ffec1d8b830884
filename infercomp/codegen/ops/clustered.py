"""Linear layers whose weights are codes of a short table of floats, and a few outliers (GOBO, Zadeh et al. 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .group_codes import unpacked_codes
from .op import compute_dtype, op

ROWS_OF_TABLE = 16
"""Output channels that share a row of the table: the half of a kernel's panel."""


def _fake_clustered_weight_linear(input: torch.Tensor, weight: torch.Tensor, *_):  # type: ignore[no-untyped-def]
    return input.new_empty(*input.shape[:-1], weight.shape[0])


def restored_clusters(
    weight: torch.Tensor, table: torch.Tensor, counts: torch.Tensor, columns: torch.Tensor, excess: torch.Tensor
) -> torch.Tensor:
    """The float32 weight [N, K] that codes, table and outliers stand for."""
    codes = unpacked_codes(weight, 4)
    restored = table.repeat_interleave(ROWS_OF_TABLE, 0).gather(1, codes.long())
    rows = torch.arange(len(weight), device=weight.device).repeat_interleave(counts)
    return restored.index_put((rows, columns.long()), excess, accumulate=True)


@op(
    "clustered_weight_linear(Tensor input, Tensor weight, Tensor table, Tensor outlier_counts, Tensor outlier_columns,"
    " Tensor outlier_excess, Tensor? bias, int outlier_room) -> Tensor",
    fake=_fake_clustered_weight_linear,
)
def clustered_weight_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    table: torch.Tensor,
    outlier_counts: torch.Tensor,
    outlier_columns: torch.Tensor,
    outlier_excess: torch.Tensor,
    bias: torch.Tensor | None,
    outlier_room: int,
) -> torch.Tensor:
    """input [..., K] in floats times w, plus bias [N] -> [..., N]; w[n, k] = table[n // 16, code[n, k]] + excess.

    weight is uint8 [N, K/2], the code of an even channel in the low nibble; table float32 [N/16, C] has C centroids,
    at most 16, for every 16 rows (equal for all rows of one layer). Row n has outlier_counts[n] (int32) outliers, whose
    channels, ascending, and what they have above their centroid lie in outlier_columns int32 and outlier_excess float32
    [outliers], row after row. ``outlier_room`` is how many outliers any 16 rows of one table row have at most.

    Computed in float32 (float64 for float64 inputs) in any order, rounded once to the input's dtype.
    """
    x = input.to(compute_dtype(input))
    restored = restored_clusters(weight, table, outlier_counts, outlier_columns, outlier_excess).to(x.dtype)
    product = F.linear(x, restored)
    return (product if bias is None else product + bias.to(x.dtype)).to(input.dtype)
