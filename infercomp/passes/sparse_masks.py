"""Which weights of a linear are kept, N of every M consecutive ones, and what the kept ones become.

Letters: N output channels and K input channels of a weight [N, K]; n of m are kept.
"""

from __future__ import annotations

import torch

from .gptq import factor_of_inverse
from .n_m_sparsity import NM


def n_m_mask(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Bool [N, K], true for the ``n`` largest scores [N, K] of every ``m`` consecutive ones; of equal ones the first.

    A last group of fewer has as many kept, or all that it has: zeros that pad it are the first to go.
    """
    num_rows, num_channels = scores.shape
    padded = scores.new_full((num_rows, -(-num_channels // m) * m), -torch.inf)
    padded[:, :num_channels] = scores
    groups = padded.unflatten(1, (-1, m))
    order = torch.sort(groups, dim=-1, descending=True, stable=True).indices
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :n], True)
    return kept.flatten(1)[:, :num_channels]


def scores_of(weight: torch.Tensor, second_moment: torch.Tensor | None, sparsity: NM) -> torch.Tensor:
    """|w| [N, K], float32, or, for all scores but the magnitude, |w| ||x|| with the mean of x xᵀ over tokens [K, K]."""
    if sparsity.score == "magnitude":
        return weight.float().abs()
    assert second_moment is not None
    return weight.float().abs() * second_moment.diagonal().float().sqrt()


def masked(weight: torch.Tensor, second_moment: torch.Tensor | None, sparsity: NM) -> torch.Tensor:
    """``weight`` [N, K] with zeros where the score is low."""
    return torch.where(n_m_mask(scores_of(weight, second_moment, sparsity), sparsity.n, sparsity.m), weight, 0)


def sparsegpt(weight: torch.Tensor, second_moment: torch.Tensor, sparsity: NM) -> torch.Tensor:
    """``weight`` [N, K] with zeros, the kept ones changed so that the outputs change least (Frantar & Alistarh 2023).

    Group by group from the left those weights go whose w² / d² is least, d being the diagonal of the Cholesky factor of
    H's inverse, H the ``second_moment`` [K, K] of the inputs. The channels to the right make up for what they take from
    the outputs. Raises NumericalError where H cannot be inverted.
    """
    factor = factor_of_inverse(second_moment, sparsity.damp, "the Hessian of SparseGPT")
    num_channels, step = weight.shape[1], max(sparsity.m, sparsity.block_size // sparsity.m * sparsity.m)
    # A channel at a time: each is a row here, so that it lies in memory as a whole.
    rest = weight.t().to(factor.dtype, copy=True)
    for start in range(0, num_channels, step):
        end = min(start + step, num_channels)
        block, errors = rest[start:end], torch.empty_like(rest[start:end])
        for position in range(end - start):
            channel = start + position
            if position % sparsity.m == 0:
                group = slice(position, min(position + sparsity.m, end - start))
                pivots = factor.diagonal()[start:end][group, None]
                kept = n_m_mask((block[group] / pivots).square().t(), sparsity.n, sparsity.m).t()
            row, is_kept = factor[channel, channel:end], kept[position % sparsity.m]
            errors[position] = torch.where(is_kept, 0, block[position]) / row[0]
            block[position:].addr_(row, errors[position], alpha=-1)
            block[position][~is_kept] = 0
        rest[end:] -= factor[start:end, end:].t() @ errors
    return rest.t().to(weight.dtype)
