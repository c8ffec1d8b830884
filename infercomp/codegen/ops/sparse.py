"""Linear layers of whose weight two in every four consecutive inputs are kept (2:4 sparsity, sparse_weights.py)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..sparse_weights import restore_2_of_4
from .group_codes import restored, unpacked_codes
from .op import compute_dtype, op
from .quantized import finished, int8_linear


def _fake_sparse_weight_linear(input: torch.Tensor, weight_values: torch.Tensor, *_):  # type: ignore[no-untyped-def]
    return input.new_empty(*input.shape[:-1], weight_values.shape[0])


@op(
    "sparse_weight_linear(Tensor input, Tensor weight_values, Tensor weight_indices, Tensor? weight_scale,"
    " Tensor? bias) -> Tensor",
    fake=_fake_sparse_weight_linear,
)
def sparse_weight_linear(
    input: torch.Tensor,
    weight_values: torch.Tensor,
    weight_indices: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """(input Wᵀ) * weight_scale + bias, input [..., K] in floats, W what ``sparse_weights.restore_2_of_4`` makes of
    weight_values [N, K/2] and weight_indices uint8 [N, K/8] -> [..., N].

    Values are floats and weight_scale None, or values int8 and weight_scale float32 [N]; bias [N].
    Computed in float32 (float64 for float64 inputs) in any order, rounded once to the input's dtype.
    """
    x = input.to(compute_dtype(input))
    product = F.linear(x, restore_2_of_4(weight_values, weight_indices).to(x.dtype))
    product = product if weight_scale is None else product * weight_scale.to(x.dtype)
    return (product if bias is None else product + bias.to(x.dtype)).to(input.dtype)


@op(
    "sparse_group_weight_linear(Tensor input, Tensor weight_values, Tensor weight_indices, Tensor weight_scale,"
    " Tensor? weight_zero, Tensor? bias, int bits, int group_size) -> Tensor",
    fake=_fake_sparse_weight_linear,
)
def sparse_group_weight_linear(
    input: torch.Tensor,
    weight_values: torch.Tensor,
    weight_indices: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    """input [..., K] in floats times a weight of groups of which two in every four are kept, plus bias [N] -> [..., N].

    weight_values uint8 [N, b K / 16] are the kept codes of b = 4 or 8 bits, weight_indices uint8 [N, K/8] their places;
    weight_scale float16 and weight_zero uint8 [N, G], or None for the middle code, are as group_codes.py has them for
    groups of ``group_size`` inputs, a multiple of 32, whether kept or not. What is not kept is 0.
    Computed in float32 (float64 for float64 inputs) in any order, rounded once to the input's dtype.
    """
    x = input.to(compute_dtype(input))
    kept = restored(unpacked_codes(weight_values, bits), weight_scale, weight_zero, bits, x.dtype)
    return finished(F.linear(x, restore_2_of_4(kept, weight_indices)), bias, input.dtype)


def _fake_sparse_int8_linear(q: torch.Tensor, scale: torch.Tensor, sums: torch.Tensor, values: torch.Tensor, *rest):  # type: ignore[no-untyped-def]
    return q.new_empty(*q.shape[:-1], values.shape[0], dtype=rest[-1])


@op(
    "sparse_int8_linear(Tensor q, Tensor scale, Tensor sums, Tensor weight_values, Tensor weight_indices,"
    " Tensor weight_scale, Tensor? bias, ScalarType dtype) -> Tensor",
    fake=_fake_sparse_int8_linear,
)
def sparse_int8_linear(
    q: torch.Tensor,
    scale: torch.Tensor,
    sums: torch.Tensor,
    weight_values: torch.Tensor,
    weight_indices: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``int8_linear`` with the weight [N, K] that int8 weight_values [N, K/2] and weight_indices uint8 [N, K/8] stand
    for, bit for bit: its other arguments are those of ``int8_linear``, and its result is [..., N] in ``dtype``."""
    weight = restore_2_of_4(weight_values, weight_indices)
    return int8_linear.definition(q, scale, sums, weight, weight_scale, bias, dtype)
