"""Weights as codes of a few centroids, and outliers that are kept (GOBO, Zadeh et al. 2020).

A Gaussian is fitted to all weights of a layer; those whose log density is below a threshold are outliers. The rest is
sorted into 2^bits bins of equal population, whose means are the first centroids. Then each weight goes to the nearest
centroid and centroids become the means of their weights, as in K-means, but only until the sum of the distances (L1)
falls no further. With ``fit="squares"`` it goes on as K-means does, until no weight changes its centroid, which takes
many times as long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..codegen.ops.clustered import ROWS_OF_TABLE
from ..codegen.ops.group_codes import packed_codes
from .linear_recipes import GOBO

LARGEST_SHARE_OF_OUTLIERS = 0.05
_CHANNELS_OF_WORD = 8
_SMALLEST_ROOM = 4
# Sums of distances are exact to about so much of themselves: less is no fall.
_LEAST_FALL = 1e-12


def why_not_clustered(weights: Sequence[Tensor], recipe: GOBO) -> str | None:
    """Why these weights [N, K], which lie end to end in one product, cannot be codes; None if they can."""
    for weight in weights:
        if weight.shape[0] % ROWS_OF_TABLE or weight.shape[1] % _CHANNELS_OF_WORD:
            return f"its weight {list(weight.shape)} has outputs not in 16s or inputs not in 8s, as panels take them"
        share = float(is_outlier(weight, recipe.outlier_log_density).float().mean())
        if share > LARGEST_SHARE_OF_OUTLIERS:
            return f"{share:.1%} of its weights are outliers at an outlier_log_density of {recipe.outlier_log_density}"
    return None


def is_outlier(weight: Tensor, log_density: float) -> Tensor:
    """Which weights have a lower log density in the Gaussian of the mean and standard deviation of all."""
    values = weight.detach().double()
    deviation, mean = torch.std_mean(values, correction=0)
    if deviation == 0:
        return torch.zeros_like(weight, dtype=torch.bool)
    densities = -(((values - mean) / deviation) ** 2) / 2 - torch.log(deviation * math.sqrt(2 * math.pi))
    return densities < log_density


def fitted_centroids(values: Tensor, num_bins: int, fit: str = "l1") -> tuple[Tensor, list[float]]:
    """Centroids float64 [num_bins], ascending, of values [M] (at least num_bins), and the L1 norm of each iteration."""
    ordered = values.detach().double().flatten().sort().values
    sums = torch.cat((ordered.new_zeros(1), ordered.cumsum(0)))
    edges = torch.arange(num_bins + 1) * len(ordered) // num_bins
    centroids, norms = _means(sums, edges, ordered.new_zeros(num_bins)), list[float]()
    best = centroids
    while True:
        known = edges.clone()
        edges[1:-1] = torch.searchsorted(ordered, (centroids[1:] + centroids[:-1]) / 2)
        norm = _distance(ordered, sums, edges, centroids)
        if fit == "l1" and norms and norm >= norms[-1] * (1 - _LEAST_FALL):
            return best, norms
        if fit == "squares" and norms and torch.equal(edges, known):
            return centroids, norms
        norms.append(norm)
        best, centroids = centroids, _means(sums, edges, centroids)


def _means(sums: Tensor, edges: Tensor, otherwise: Tensor) -> Tensor:
    """The mean of each bin, and what it was for a bin without values."""
    counts = edges.diff()
    return torch.where(counts > 0, sums[edges].diff() / counts.clamp(min=1), otherwise)


def _distance(ordered: Tensor, sums: Tensor, edges: Tensor, centroids: Tensor) -> float:
    """The sum over bins of the distances of their values to their centroid."""
    first, last = edges[:-1], edges[1:]
    middle = torch.searchsorted(ordered, centroids).clamp(first, last)
    below = centroids * (middle - first) - (sums[middle] - sums[first])
    above = sums[last] - sums[middle] - centroids * (last - middle)
    return float((below + above).sum())


def clusters_of(weight: Tensor, recipe: GOBO) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A weight [N, K] as ``clustered_weight_linear`` takes it: codes, table, and its outliers' counts, channels and
    excess. There is always an outlier, so that no tensor is empty: the weight furthest from the mean."""
    values = weight.detach().double()
    outliers = is_outlier(weight, recipe.outlier_log_density)
    outliers.flatten()[(values - values.mean()).abs().argmax()] = True
    centroids = fitted_centroids(values[~outliers], 2**recipe.bits, recipe.fit)[0].float()
    codes = torch.bucketize(values, (centroids[1:].double() + centroids[:-1].double()) / 2)
    table = centroids.expand(len(weight) // ROWS_OF_TABLE, -1).contiguous()
    excess = (values[outliers] - centroids[codes[outliers]].double()).float()
    columns = outliers.nonzero()[:, 1].int()
    return packed_codes(codes, 4), table, outliers.sum(1).int(), columns, excess


def outlier_room(counts: Sequence[Tensor]) -> int:
    """A power of two that is no less than the outliers of any 16 neighbouring rows, given those of each row."""
    most = max(int(of_rows.view(-1, ROWS_OF_TABLE).sum(1).max()) for of_rows in counts)
    return max(_SMALLEST_ROOM, 1 << (most - 1).bit_length())
