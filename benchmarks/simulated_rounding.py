"""What quantisation papers compare with and infercomp does not offer: weights rounded, and left in floats."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from infercomp import GOBO
from infercomp.passes.cluster_weights import fitted_centroids, is_outlier

Change = Callable[[Tensor], Tensor]
"""A linear's weight [N, K] as a method leaves it."""


def layer_wise(bits: int) -> Change:
    """One symmetric grid for a whole layer."""
    return lambda weight: _on_grid(weight, weight.abs().amax(), bits)


def head_wise(bits: int, num_heads: int) -> Change:
    """A grid for the output channels of each head (Q-BERT, Shen et al. 2020), so many groups in every layer."""

    def change(weight: Tensor) -> Tensor:
        heads = weight.unflatten(0, (num_heads, -1))
        return _on_grid(heads, heads.abs().amax((1, 2), keepdim=True), bits).flatten(0, 1)

    return change


def _on_grid(weight: Tensor, largest: Tensor, bits: int) -> Tensor:
    top = 2 ** (bits - 1) - 1
    step = largest / top
    return (weight / step).round().clamp(-top - 1, top) * step


def linear_bins(bits: int) -> Change:
    """GOBO's outliers are kept, the rest gets 2^bits levels that are evenly spread (GOBO, table 5: linear)."""

    def change(weight: Tensor) -> Tensor:
        outliers = is_outlier(weight, GOBO().outlier_log_density)
        low, high = weight[~outliers].aminmax()
        step = (high - low) / (2**bits - 1)
        return torch.where(outliers, weight, ((weight - low) / step).round().clamp(0, 2**bits - 1) * step + low)

    return change


def without_outliers(bits: int) -> Change:
    """GOBO's centroids, and none of its outliers."""
    return lambda weight: nearest(weight, fitted_centroids(weight, 2**bits)[0])


def nearest(weight: Tensor, centroids: Tensor) -> Tensor:
    codes = torch.bucketize(weight.double(), (centroids[1:] + centroids[:-1]) / 2)
    return centroids[codes].to(weight.dtype)
