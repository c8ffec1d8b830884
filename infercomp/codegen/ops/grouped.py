"""Linear layers on weights whose groups of input channels share a scale: codes of 3, 4 or 8 bits (group_codes.py).

Letters: K input channels, N output channels, b bits, g channels of a group, G = K / g groups. A weight is uint8
[N, b K / 8] with a float16 scale [N, G] and a zero [N, G], which is uint8 or float16, or None for the middle code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .group_codes import middle_code, nearest_grid, num_codes, packed_codes, restored, unpacked_codes
from .op import compute_dtype, op
from .quantized import fake_integer_linear, fake_weight_linear, finished


def _group_products(q: torch.Tensor, codes: torch.Tensor, group_size: int) -> torch.Tensor:
    """q [..., K] times codes [N, K] for each group alone [G, ..., N]: integers below 2**24, so exact in float32."""
    num_outputs, num_channels = codes.shape
    shape = (q.numel() // num_channels, num_channels // group_size, group_size)
    rows = q.reshape(shape).float().transpose(0, 1)  # [G, T, g]
    columns = codes.unflatten(-1, shape[1:]).float().permute(1, 2, 0)  # [G, g, N]
    return (rows @ columns).reshape(shape[1], *q.shape[:-1], num_outputs)


@op(
    "group_linear(Tensor q, Tensor scale, Tensor sums, Tensor weight, Tensor weight_scale, Tensor? weight_zero,"
    " Tensor? bias, int bits, int group_size, ScalarType dtype) -> Tensor",
    fake=fake_integer_linear,
)
def group_linear(
    q: torch.Tensor,
    scale: torch.Tensor,
    sums: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Groups ascending, from total = 0 in float32, with product = float32(q Wᵀ of g) and sum = float32(sums[g]):

        total += weight_scale[n, g] * (product - zero[n, g] * sum)                     zeros in uint8, or None
        total += weight_scale[n, g] * product;  total += weight_zero[n, g] * sum       zeros in float16

    then total * scale + bias -> [..., N] in ``dtype``.

    q [..., K], scale [..., 1] and sums [..., G] are what quantize_per_token returns for this group_size, at most 8192
    and for 8 bits 512; the weight is that of the module's head, bias [N]. The difference in the brackets is exact.
    """
    products = _group_products(q, unpacked_codes(weight, bits), group_size)
    has_values = weight_zero is not None and weight_zero.is_floating_point()
    zeros = torch.full_like(weight_scale, middle_code(bits)) if weight_zero is None else weight_zero
    zeros, scales = zeros.to(scale.dtype), weight_scale.to(scale.dtype)
    total = torch.zeros_like(products[0], dtype=scale.dtype)
    for group, product in enumerate(products.to(scale.dtype)):
        shift = zeros[:, group] * sums[..., group, None].to(scale.dtype)
        if has_values:
            total = (total + scales[:, group] * product) + shift
        else:
            total = total + scales[:, group] * (product - shift)
    return finished(total * scale, bias, dtype)


@op(
    "group_weight_linear(Tensor input, Tensor weight, Tensor weight_scale, Tensor? weight_zero, Tensor? bias,"
    " int bits, int group_size) -> Tensor",
    fake=fake_weight_linear,
)
def group_weight_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    """input [..., K] in floats times a weight of groups (the module's head), plus bias [N] -> [..., N].

    Computed in float32 (float64 for float64 inputs) in any order, rounded once to the input's dtype.
    """
    x = input.to(compute_dtype(input))
    floats = restored(unpacked_codes(weight, bits), weight_scale, weight_zero, bits, x.dtype)
    return finished(F.linear(x, floats), bias, input.dtype)


def _fake_group_embedding(weight: torch.Tensor, *rest):  # type: ignore[no-untyped-def]
    _, _, indices, bits, dtype = rest
    return weight.new_empty(*indices.shape, num_codes(weight, bits), dtype=dtype)


@op(
    "group_embedding(Tensor weight, Tensor weight_scale, Tensor? weight_zero, Tensor indices, int bits,"
    " ScalarType dtype) -> Tensor",
    fake=_fake_group_embedding,
)
def group_embedding(
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    indices: torch.Tensor,
    bits: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rows ``indices`` [...] of a table of groups (see the head), computed in float32, in ``dtype`` -> [..., K]."""
    codes = unpacked_codes(weight[indices], bits)
    zeros = None if weight_zero is None else weight_zero[indices]
    return restored(codes, weight_scale[indices], zeros, bits, compute_dtype(weight_scale)).to(dtype)


def _fake_quantize_weight_groups(weight: torch.Tensor, bits: int, group_size: int, symmetric: bool):  # type: ignore[no-untyped-def]
    num_rows, num_channels = weight.shape
    packed = weight.new_empty(num_rows, num_channels * bits // 8, dtype=torch.uint8)
    scale = weight.new_empty(num_rows, num_channels // group_size, dtype=torch.float16)
    return packed, scale, torch.empty_like(scale, dtype=torch.uint8)


@op(
    "quantize_weight_groups(Tensor weight, int bits, int group_size, bool symmetric) -> (Tensor, Tensor, Tensor)",
    fake=_fake_quantize_weight_groups,
)
def quantize_weight_groups(
    weight: torch.Tensor, bits: int, group_size: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """weight [N, K] in floats -> packed uint8 [N, b K / 8], scale float16 [N, G], zero uint8 [N, G].

    Codes are chosen for the scale and the zero as they are stored, by ``group_codes.nearest_grid``. All zeros of
    ``symmetric`` are the middle code, and None says the same.
    """
    codes, scale, zero = nearest_grid(weight, bits, group_size, symmetric)
    return packed_codes(codes, bits), scale.half(), zero.to(torch.uint8)
