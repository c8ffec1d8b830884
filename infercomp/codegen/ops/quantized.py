"""Linear layers on integers: activations quantised per token, weights per output channel, by rounding to nearest.

Letters: K input channels, N output channels, G groups of input channels.
A weight is int8 [N, K] in [-127, 127] with one float32 scale a row: w = scale * code. Weights with a scale for each
group are in grouped.py.

The ``*_linear`` on quantised activations are meant to be computed bit for bit: sums of integers are
exact, and each float32 operation that is written here is rounded on its own, in the order written.
A kernel must not contract a product and a sum into a fused multiply-add.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .op import compute_dtype, op

# Below it a row counts as zero: 127 / 1e-30 is still a float32, and 1e-30 / 127 no subnormal.
SMALLEST_MAXIMUM = 1e-30
# 1024 * 127 * 128 < 2**24: a float32 matmul over so many channels of int8 is exact in any order.
_EXACT_CHANNELS = 1024


def nearest_int8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row on its own symmetric grid: int8 codes [..., K] and the step [..., 1]."""
    rows = values.to(torch.float32)
    maximum = rows.abs().amax(-1, keepdim=True)
    is_zero, is_finite = maximum < SMALLEST_MAXIMUM, maximum.isfinite()
    inverse = torch.where(is_zero, 0.0, torch.div(maximum.new_tensor(127.0), maximum))
    codes = torch.where(is_finite, torch.round(rows * inverse), 0.0).to(torch.int8)
    scale = torch.where(is_zero, 1.0, maximum * maximum.new_tensor(1.0 / 127.0))
    return codes, torch.where(is_finite, scale, torch.nan)


def _fake_quantize_per_token(input: torch.Tensor, group_size: int):  # type: ignore[no-untyped-def]
    rows = input.shape[:-1]
    return (
        input.new_empty(input.shape, dtype=torch.int8),
        input.new_empty(*rows, 1, dtype=torch.float32),
        input.new_empty(*rows, input.shape[-1] // group_size, dtype=torch.int32),
    )


@op("quantize_per_token(Tensor input, int group_size) -> (Tensor, Tensor, Tensor)", fake=_fake_quantize_per_token)
def quantize_per_token(input: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token-wise dynamic quantisation (ZeroQuant, Yao et al. 2022) of input [..., K], whose row is x:

        maximum = max |x|;  inverse = 127 / maximum;  q = round_half_even(x * inverse);  scale = maximum * (1 / 127)

    in float32, the division rounded correctly, 1 / 127 the float32 nearest to it. Returns q int8 [..., K]
    in [-127, 127], scale float32 [..., 1], and sums int32 [..., G] of q over each group of consecutive
    channels, which kernels with asymmetric weights need. A row whose maximum is below 1e-30 has q = 0 and
    scale = 1; a row that holds an infinity or a NaN has q = 0 and scale = NaN, so that its results are NaN.
    """
    codes, scale = nearest_int8(input)
    return codes, scale, codes.unflatten(-1, (-1, group_size)).sum(-1, dtype=torch.int32)


def _fake_quantize_per_tensor(input: torch.Tensor, step: torch.Tensor, group_size: int):  # type: ignore[no-untyped-def]
    return _fake_quantize_per_token(input, group_size)


@op(
    "quantize_per_tensor(Tensor input, Tensor step, int group_size) -> (Tensor, Tensor, Tensor)",
    fake=_fake_quantize_per_tensor,
)
def quantize_per_tensor(
    input: torch.Tensor, step: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Static quantisation of input [..., K], whose row is x, on one grid for all rows, ``step`` float32 [1] above 0:

        inverse = 1 / step;  q = min(max(round_half_even(x * inverse), -127), 127);  scale = step

    in float32, the division rounded correctly. Returns what quantize_per_token returns, the scale being the same on
    every row; a row that holds an infinity or a NaN has q = 0 and scale = NaN here too.
    """
    rows = input.to(torch.float32)
    is_finite = rows.abs().amax(-1, keepdim=True).isfinite()
    codes = torch.round(rows * torch.div(step.new_tensor(1.0), step)).clamp(-127, 127)
    codes = torch.where(is_finite, codes, 0.0).to(torch.int8)
    scale = torch.where(is_finite, step, torch.nan)
    return codes, scale, codes.unflatten(-1, (-1, group_size)).sum(-1, dtype=torch.int32)


def fake_integer_linear(q: torch.Tensor, scale: torch.Tensor, sums: torch.Tensor, weight: torch.Tensor, *rest):  # type: ignore[no-untyped-def]
    return q.new_empty(*q.shape[:-1], weight.shape[0], dtype=rest[-1])


def _exact_product(q: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """q [..., K] times weight [N, K] in int32, exact whatever the order of the sums."""
    parts = zip(q.split(_EXACT_CHANNELS, -1), weight.split(_EXACT_CHANNELS, -1), strict=True)
    products = [F.linear(left.float(), right.float()).to(torch.int32) for left, right in parts]
    return sum(products[1:], start=products[0])


def finished(product: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """With the bias, rounded once."""
    return (product if bias is None else product + bias.to(product.dtype)).to(dtype)


@op(
    "int8_linear(Tensor q, Tensor scale, Tensor sums, Tensor weight, Tensor weight_scale, Tensor? bias,"
    " ScalarType dtype) -> Tensor",
    fake=fake_integer_linear,
)
def int8_linear(
    q: torch.Tensor,
    scale: torch.Tensor,
    sums: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(float32(q Wᵀ) * scale) * weight_scale + bias -> [..., N] in ``dtype``; q Wᵀ exact in int32.

    q [..., K], scale [..., 1] and sums [..., G] are what quantize_per_token returns; weight int8 [N, K],
    weight_scale float32 [N], bias [N]. ``sums`` is for kernels whose instruction takes unsigned weights.
    """
    product = _exact_product(q, weight).to(scale.dtype)
    return finished((product * scale) * weight_scale, bias, dtype)


def fake_weight_linear(input: torch.Tensor, weight: torch.Tensor, *_):  # type: ignore[no-untyped-def]
    return input.new_empty(*input.shape[:-1], weight.shape[0])


@op(
    "int8_weight_linear(Tensor input, Tensor weight, Tensor weight_scale, Tensor? bias) -> Tensor",
    fake=fake_weight_linear,
)
def int8_weight_linear(
    input: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """(input Wᵀ) * weight_scale + bias, input [..., K] in floats, weight int8 [N, K], weight_scale float32 [N].

    Computed in float32 (float64 for float64 inputs) in any order, rounded once to the input's dtype.
    """
    x = input.to(compute_dtype(input))
    return finished(F.linear(x, weight.to(x.dtype)) * weight_scale.to(x.dtype), bias, input.dtype)


def _fake_int8_embedding(weight: torch.Tensor, weight_scale: torch.Tensor, indices: torch.Tensor, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return weight.new_empty(*indices.shape, weight.shape[1], dtype=dtype)


@op(
    "int8_embedding(Tensor weight, Tensor weight_scale, Tensor indices, ScalarType dtype) -> Tensor",
    fake=_fake_int8_embedding,
)
def int8_embedding(
    weight: torch.Tensor, weight_scale: torch.Tensor, indices: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Rows ``indices`` [...] of an int8 table [N, K] times their scales float32 [N], in ``dtype`` -> [..., K].

    Lets an embedding whose table is also the LM head's weight be held once, in integers.
    """
    return (weight[indices].to(weight_scale.dtype) * weight_scale[indices][..., None]).to(dtype)


def _fake_quantize_weight_int8(weight: torch.Tensor):  # type: ignore[no-untyped-def]
    return weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty(weight.shape[0], dtype=torch.float32)


@op("quantize_weight_int8(Tensor weight) -> (Tensor, Tensor)", fake=_fake_quantize_weight_int8)
def quantize_weight_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [N, K] in floats -> int8 [N, K] and scale float32 [N]: rows rounded as quantize_per_token rounds."""
    codes, scale = nearest_int8(weight)
    return codes, scale.squeeze(-1)
