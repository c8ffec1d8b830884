"""Linear layers on integers: activations quantised per token, weights per channel or per group, by rounding to nearest.

Letters: K input channels, N output channels, g channels of a group, G = K / g groups.
An 8-bit weight is int8 [N, K] in [-127, 127] with one float32 scale a row: w = scale * code.
A 4-bit weight is uint8 [N, K/2], the low nibble first (channels 0, 2, 4 …), with a float16 scale and a
uint8 zero [N, G], or 8 for all: w = scale * (code - zero).

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
_SYMMETRIC_ZERO = 8.0
# What a stored zero counts: parts of a step. At 1 only grids through 0 are met (AWQ's); at 16 any grid is, to 1/32 of
# a step (Q4_1 of llama.cpp starts anywhere), and the sums of a group stay exact in float32 as they are.
PARTS_OF_A_STEP = 1


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


def _fake_int8_linear(q: torch.Tensor, scale: torch.Tensor, sums: torch.Tensor, weight: torch.Tensor, *rest):  # type: ignore[no-untyped-def]
    return q.new_empty(*q.shape[:-1], weight.shape[0], dtype=rest[-1])


def _exact_product(q: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """q [..., K] times weight [N, K] in int32, exact whatever the order of the sums."""
    parts = zip(q.split(_EXACT_CHANNELS, -1), weight.split(_EXACT_CHANNELS, -1), strict=True)
    products = [F.linear(left.float(), right.float()).to(torch.int32) for left, right in parts]
    return sum(products[1:], start=products[0])


def _finished(product: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    return (product if bias is None else product + bias.to(product.dtype)).to(dtype)


@op(
    "int8_linear(Tensor q, Tensor scale, Tensor sums, Tensor weight, Tensor weight_scale, Tensor? bias,"
    " ScalarType dtype) -> Tensor",
    fake=_fake_int8_linear,
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
    return _finished((product * scale) * weight_scale, bias, dtype)


def _codes(packed: torch.Tensor) -> torch.Tensor:
    """The 4-bit codes uint8 [N, K] of a packed weight [N, K/2]."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def packed_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Codes 0 … 15 of any dtype [N, K] as a packed weight uint8 [N, K/2]."""
    nibbles = codes.to(torch.uint8)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def _group_products(q: torch.Tensor, codes: torch.Tensor, group_size: int) -> torch.Tensor:
    """q [..., K] times codes [N, K] for each group alone [G, ..., N]: integers below 2**24, so exact in float32."""
    num_outputs, num_channels = codes.shape
    shape = (q.numel() // num_channels, num_channels // group_size, group_size)
    rows = q.reshape(shape).float().transpose(0, 1)  # [G, T, g]
    columns = codes.unflatten(-1, shape[1:]).float().permute(1, 2, 0)  # [G, g, N]
    return (rows @ columns).reshape(shape[1], *q.shape[:-1], num_outputs)


def _zeros(weight_zero: torch.Tensor | None, weight_scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The zeros in steps, of the shape of the scales."""
    if weight_zero is None:
        return torch.full_like(weight_scale, _SYMMETRIC_ZERO, dtype=dtype)
    return weight_zero.to(dtype) / PARTS_OF_A_STEP


@op(
    "int4_linear(Tensor q, Tensor scale, Tensor sums, Tensor weight, Tensor weight_scale, Tensor? weight_zero,"
    " Tensor? bias, int group_size, ScalarType dtype) -> Tensor",
    fake=_fake_int8_linear,
)
def int4_linear(
    q: torch.Tensor,
    scale: torch.Tensor,
    sums: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Groups ascending, ``total += weight_scale[n, g] * (float32(q Wᵀ of g) - zero[n, g] * float32(sums[g]))``
    from total = 0 in float32; then total * scale + bias -> [..., N] in ``dtype``.

    q [..., K], scale [..., 1] and sums [..., G] are what quantize_per_token returns for this group_size (at
    most 8192); weight uint8 [N, K/2], weight_scale float16 and weight_zero uint8 [N, G] (None: 8), bias [N].
    The difference in the brackets is exact.
    """
    products = _group_products(q, _codes(weight), group_size)
    zeros = _zeros(weight_zero, weight_scale, scale.dtype)
    total = torch.zeros_like(products[0], dtype=scale.dtype)
    for group, product in enumerate(products.to(scale.dtype)):
        centred = product - zeros[:, group] * sums[..., group, None].to(scale.dtype)
        total = total + weight_scale[:, group].to(scale.dtype) * centred
    return _finished(total * scale, bias, dtype)


def _fake_weight_linear(input: torch.Tensor, weight: torch.Tensor, *_):  # type: ignore[no-untyped-def]
    return input.new_empty(*input.shape[:-1], weight.shape[0])


@op(
    "int8_weight_linear(Tensor input, Tensor weight, Tensor weight_scale, Tensor? bias) -> Tensor",
    fake=_fake_weight_linear,
)
def int8_weight_linear(
    input: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """(input Wᵀ) * weight_scale + bias, input [..., K] in floats, weight int8 [N, K], weight_scale float32 [N].

    Computed in float32 (float64 for float64 inputs) in any order, rounded once to the input's dtype.
    """
    x = input.to(compute_dtype(input))
    return _finished(F.linear(x, weight.to(x.dtype)) * weight_scale.to(x.dtype), bias, input.dtype)


def _restored(
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The floats [N, K] that a 4-bit weight stands for."""
    groups = _codes(weight).unflatten(-1, (-1, group_size)).to(dtype)
    zeros = _zeros(weight_zero, weight_scale, dtype)
    return ((groups - zeros[..., None]) * weight_scale.to(dtype)[..., None]).flatten(-2)


@op(
    "int4_weight_linear(Tensor input, Tensor weight, Tensor weight_scale, Tensor? weight_zero, Tensor? bias,"
    " int group_size) -> Tensor",
    fake=_fake_weight_linear,
)
def int4_weight_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """input [..., K] in floats times a 4-bit weight uint8 [N, K/2] of groups, plus bias [N] -> [..., N].

    Computed in float32 (float64 for float64 inputs) in any order, rounded once to the input's dtype.
    """
    x = input.to(compute_dtype(input))
    restored = _restored(weight, weight_scale, weight_zero, group_size, x.dtype)
    return _finished(F.linear(x, restored), bias, input.dtype)


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


def _fake_int4_embedding(weight: torch.Tensor, *rest):  # type: ignore[no-untyped-def]
    return weight.new_empty(*rest[2].shape, 2 * weight.shape[1], dtype=rest[-1])


@op(
    "int4_embedding(Tensor weight, Tensor weight_scale, Tensor? weight_zero, Tensor indices, int group_size,"
    " ScalarType dtype) -> Tensor",
    fake=_fake_int4_embedding,
)
def int4_embedding(
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    indices: torch.Tensor,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rows ``indices`` [...] of a 4-bit table uint8 [N, K/2] of groups, in ``dtype`` -> [..., K]."""
    zeros = None if weight_zero is None else weight_zero[indices]
    return _restored(weight[indices], weight_scale[indices], zeros, group_size, compute_dtype(weight_scale)).to(dtype)


def _fake_quantize_weight_int8(weight: torch.Tensor):  # type: ignore[no-untyped-def]
    return weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty(weight.shape[0], dtype=torch.float32)


@op("quantize_weight_int8(Tensor weight) -> (Tensor, Tensor)", fake=_fake_quantize_weight_int8)
def quantize_weight_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [N, K] in floats -> int8 [N, K] and scale float32 [N]: rows rounded as quantize_per_token rounds."""
    codes, scale = nearest_int8(weight)
    return codes, scale.squeeze(-1)


def _nearest_codes(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | float) -> torch.Tensor:
    """The codes 0 … 15 nearest to groups [N, G, g], given scale and zero [N, G, 1] as they are stored."""
    steps = torch.where(scale == 0, 0.0, groups / scale)
    return torch.round(steps + zero).clamp(0, 15)


def _symmetric_int4(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The better of two steps: the value of the largest magnitude becomes -8 (llama.cpp's Q4_0), or it becomes ±7."""
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    wide, narrow = ((extreme / step).half().float() for step in (-8.0, 7.0))
    codes = [_nearest_codes(groups, scale, _SYMMETRIC_ZERO) for scale in (wide, narrow)]
    errors = [
        ((code - _SYMMETRIC_ZERO) * scale - groups).square().sum(-1, keepdim=True)
        for code, scale in zip(codes, (wide, narrow), strict=True)
    ]
    is_wide = errors[0] <= errors[1]
    scale = torch.where(is_wide, wide, narrow)
    return torch.where(is_wide, codes[0], codes[1]), scale, torch.full_like(scale, _SYMMETRIC_ZERO)


def _asymmetric_int4(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sixteen steps from the smallest value to the largest, 0 being between them."""
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 15).half().float()
    zero = torch.where(scale == 0, 0.0, -low / scale).clamp(max=15)
    zero = torch.round(zero * PARTS_OF_A_STEP) / PARTS_OF_A_STEP
    return _nearest_codes(groups, scale, zero), scale, zero


def _fake_quantize_weight_int4(weight: torch.Tensor, group_size: int, symmetric: bool):  # type: ignore[no-untyped-def]
    num_rows, num_channels = weight.shape
    packed = weight.new_empty(num_rows, num_channels // 2, dtype=torch.uint8)
    scale = weight.new_empty(num_rows, num_channels // group_size, dtype=torch.float16)
    return packed, scale, torch.empty_like(scale, dtype=torch.uint8)


@op(
    "quantize_weight_int4(Tensor weight, int group_size, bool symmetric) -> (Tensor, Tensor, Tensor)",
    fake=_fake_quantize_weight_int4,
)
def quantize_weight_int4(
    weight: torch.Tensor, group_size: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """weight [N, K] in floats -> packed uint8 [N, K/2], scale float16 [N, G], zero uint8 [N, G].

    Codes are chosen for the scale and the zero as they are stored. ``symmetric`` maps the value of the
    largest magnitude of a group to -8 or to ±7, whichever errs less; all its zeros are 8, and None says the
    same. Otherwise the grid goes from the smallest value to the largest.
    """
    groups = weight.to(torch.float32).unflatten(-1, (-1, group_size))
    codes, scale, zero = _symmetric_int4(groups) if symmetric else _asymmetric_int4(groups)
    return (
        packed_nibbles(codes.flatten(-2)),
        scale.squeeze(-1).half(),
        (zero.squeeze(-1) * PARTS_OF_A_STEP).to(torch.uint8),
    )
