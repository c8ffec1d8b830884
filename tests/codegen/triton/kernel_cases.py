"""Each family against its definition, on any device: the interpreter's CPU tensors or a GPU's.

A case makes inputs, launches the emitted kernel, and compares with the definition evaluated in float64 on
the same (rounded) inputs. What a kernel may err by is stated in units of the output's dtype.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from infercomp.codegen.ops import (
    gated_activation,
    layer_norm,
    quantize_per_token,
    rms_norm,
    rotary_embedding,
)
from infercomp.codegen.triton import emit
from infercomp.codegen.triton.module import load_kernel
from infercomp.codegen.triton.specs import (
    GatedActivationSpec,
    Grid,
    KernelSpec,
    MatmulSpec,
    NormSpec,
    QuantizeSpec,
    RotaryWriteKvSpec,
    WriteKvSpec,
)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def launch(spec: KernelSpec, grid: Grid, *arguments: object) -> None:
    load_kernel(emit(spec)).launch(grid, *arguments)


def normal(*shape: int, dtype: str, device: str, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(*shape, generator=generator).to(device, DTYPES[dtype])


def assert_near(found: torch.Tensor, exact: torch.Tensor, *, units: float = 1.0, noise: float = 1e-6) -> None:
    """Within ``units`` of the output's rounding, and ``noise`` of the largest value for float32 sums."""
    scale = float(exact.abs().max()) + 1e-30
    epsilon = torch.finfo(found.dtype).eps
    error = (found.double() - exact).abs()
    allowed = units * epsilon * exact.abs() + (noise + 0.25 * units * epsilon) * scale
    assert torch.isfinite(found).all(), "not finite"
    assert bool((error <= allowed).all()), f"off by {float(error.max()):.3g} where values reach {scale:.3g}"


def random_weight(spec: MatmulSpec, device: str, generator: torch.Generator) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The kernel's weight tensors by argument order, and the weight [N or 2N, K] that they mean, float64."""
    rows, inner = spec.num_columns * spec.num_accumulators, spec.num_inner
    if spec.weight_format == "same" and not spec.is_integer:
        weight = normal(rows, inner, dtype=spec.input_dtype, device=device, generator=generator)
        given = weight.t().contiguous() if spec.is_transposed else weight
        return [given], weight.double()
    if spec.weight_format == "i8":
        weight = torch.randint(-127, 128, (rows, inner), generator=generator, dtype=torch.int8).to(device)
        scale = torch.rand(rows, generator=generator).to(device) + 0.5
        given = weight.t().contiguous() if spec.is_transposed else weight
        return [given, scale], weight.double() * scale.double()[:, None]
    nibbles = torch.randint(0, 16, (rows, inner), generator=generator, dtype=torch.uint8).to(device)
    groups = (rows, inner // spec.group_size)
    scale = (torch.rand(groups, generator=generator) + 0.5).to(device, DTYPES[spec.group_scale_dtype])
    zero = torch.randint(0, 16, groups, generator=generator, dtype=torch.uint8).to(device)
    packed = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
    shift = zero.double() if spec.has_zero else torch.full(groups, 8.0, device=device, dtype=torch.float64)
    weight = (nibbles.double().unflatten(1, (-1, spec.group_size)) - shift[..., None]) * scale.double()[..., None]
    return [packed, scale, *([zero] if spec.has_zero else [])], weight.flatten(1)


def run_matmul(spec: MatmulSpec, num_rows: int, inputs: dict[str, torch.Tensor], device: str) -> torch.Tensor:
    """Launch a product, and its second stage if it is split; ``inputs`` by argument name."""
    output = torch.full((num_rows, spec.num_columns), math.nan, device=device, dtype=DTYPES[spec.output_dtype])
    partials_dtype = torch.int32 if spec.is_integer else torch.float32
    partials = torch.empty(spec.partials_shape(num_rows), device=device, dtype=partials_dtype)
    named = {**inputs, "output": output, "partials": partials, "num_rows": num_rows}
    launch(spec, spec.grid(num_rows, 3), *(named[argument.name] for argument in spec.arguments()))
    if spec.num_splits > 1:
        reduction = spec.reduction()
        launch(reduction, reduction.grid(num_rows), *(named[argument.name] for argument in reduction.arguments()))
    return output


def check_matmul(spec: MatmulSpec, num_rows: int, device: str, seed: int = 0, noise: float = 1e-6) -> None:
    """The product alone, or gated by silu; other epilogues have their own test."""
    generator = torch.Generator().manual_seed(seed)
    tensors, weight = random_weight(spec, device, generator)
    names = ["weight", "weight_scale", "weight_zero"]
    inputs: dict[str, torch.Tensor] = dict(zip(names, tensors, strict=False))
    if spec.is_integer:
        x = torch.randint(-127, 128, (num_rows, spec.num_inner), generator=generator, dtype=torch.int8).to(device)
        inputs["input_scale"] = torch.rand(num_rows, generator=generator).to(device) * 1e-4
        exact_input = x.double() * inputs["input_scale"].double()[:, None]
    else:
        x = normal(num_rows, spec.num_inner, dtype=spec.input_dtype, device=device, generator=generator)
        x = (x.float() / weight.abs().mean().item() / math.sqrt(spec.num_inner)).to(x.dtype)
        exact_input = x.double()
    if spec.weight_format == "u4" and not spec.is_single_row:
        weight = weight.to(DTYPES[spec.input_dtype]).double()  # matrix instructions take the input's dtype
    inputs["input"] = x
    exact = exact_input @ weight.t()
    if spec.is_gated:
        gate, up = exact.split(spec.num_columns, dim=1)
        exact = torch.nn.functional.silu(gate) * up
    assert_near(run_matmul(spec, num_rows, inputs, device), exact, noise=noise)


def check_norm(spec: NormSpec, num_rows: int, device: str, seed: int = 0) -> None:
    """RMS or layer norm, with all that a spec may add to it."""
    generator = torch.Generator().manual_seed(seed)
    width, dtype = spec.num_columns, DTYPES[spec.dtype]
    x, residual = (normal(num_rows, width, dtype=spec.dtype, device=device, generator=generator) for _ in range(2))
    weight, bias = (normal(width, dtype=spec.dtype, device=device, generator=generator) for _ in range(2))
    output = torch.empty(num_rows, width, device=device, dtype=torch.int8 if spec.is_quantized else dtype)
    named = {"output": output, "input": x, "residual": residual, "weight": weight, "bias": bias}
    named["summed"] = torch.full_like(x, math.nan)
    named["output_scale"] = torch.empty(num_rows, device=device)
    named["output_sums"] = torch.empty(num_rows, width // (spec.group_size or width), device=device, dtype=torch.int32)
    launch(spec, spec.grid(num_rows), *(named[argument.name] for argument in spec.arguments()))
    summed = x + residual if spec.has_residual else x
    if spec.has_residual:
        assert torch.equal(named["summed"], summed)
    wide_weight = weight.double() if spec.has_weight else None
    if spec.is_layer_norm:
        exact = layer_norm.definition(summed.double(), wide_weight, bias.double() if spec.has_bias else None, spec.eps)
    else:
        exact = rms_norm.definition(summed.double(), wide_weight, spec.eps, spec.unit_offset)
    if not spec.is_quantized:
        assert_near(output, exact)
        return
    # The norm before the quantisation may err by a rounding, which may move a code by one step.
    _, exact_scale, _ = quantize_per_token.definition(exact.to(dtype), spec.num_columns)
    assert_near(named["output_scale"], exact_scale.double().squeeze(1), units=4 * torch.finfo(dtype).eps / 1e-7)
    steps = (output.double() * named["output_scale"].double()[:, None] - exact).abs() / exact_scale.double()
    assert float(steps.max()) <= 0.5 + 127 * torch.finfo(dtype).eps, "not the nearest step"
    if spec.group_size:
        assert torch.equal(named["output_sums"], group_sums(output, spec.group_size))


def group_sums(codes: torch.Tensor, group_size: int) -> torch.Tensor:
    return codes.unflatten(-1, (-1, group_size)).sum(-1, dtype=torch.int32)


def check_quantize(spec: QuantizeSpec, num_rows: int, device: str, seed: int = 0) -> None:
    """Bit for bit what the definition says, rows of zeros, infinities and NaN too."""
    generator = torch.Generator().manual_seed(seed)
    x = normal(num_rows + 3, spec.num_columns, dtype=spec.dtype, device=device, generator=generator)
    x[0], x[1, 0], x[2, -1] = 0, math.inf, math.nan
    output = torch.empty(x.shape, dtype=torch.int8, device=device)
    scale = torch.empty(num_rows + 3, device=device)
    group_size = spec.group_size or spec.num_columns
    sums = torch.empty(num_rows + 3, spec.num_columns // group_size, dtype=torch.int32, device=device)
    launch(spec, spec.grid(num_rows + 3), output, scale, *([sums] if spec.group_size else []), x)
    codes, exact_scale, exact_sums = quantize_per_token.definition(x, group_size)
    assert torch.equal(output, codes)
    assert torch.equal(scale.nan_to_num(-1.0), exact_scale.squeeze(1).nan_to_num(-1.0))
    assert not spec.group_size or torch.equal(sums, exact_sums)


def check_gated_activation(spec: GatedActivationSpec, num_rows: int, device: str, seed: int = 0) -> None:
    """gate and up are the halves of merged rows."""
    generator = torch.Generator().manual_seed(seed)
    spec = replace(spec, gate_row_stride=2 * spec.num_columns, up_row_stride=2 * spec.num_columns)
    merged = normal(num_rows, 2 * spec.num_columns, dtype=spec.dtype, device=device, generator=generator) * 3
    gate, up = merged.split(spec.num_columns, dim=1)
    output = torch.empty(num_rows, spec.num_columns, device=device, dtype=merged.dtype)
    launch(spec, spec.grid(num_rows), output, gate, up)
    assert_near(output, gated_activation.definition(gate.double(), up.double(), spec.activation))


def shuffled_slots(num_tokens: int, num_slots: int, device: str, generator: torch.Generator) -> torch.Tensor:
    return torch.randperm(num_slots, generator=generator)[:num_tokens].to(device)


def check_write_kv(spec: WriteKvSpec, num_tokens: int, device: str, seed: int = 0) -> None:
    """Bits arrive where they should and nowhere else."""
    generator = torch.Generator().manual_seed(seed)
    num_blocks, block_size = num_tokens // 4 + 2, 4
    widths = (spec.head_dim, spec.value_width // spec.num_kv_heads)
    new = [
        normal(num_tokens, spec.num_kv_heads, width, dtype=spec.dtype, device=device, generator=generator)
        for width in widths
    ]
    shapes = [(num_blocks, block_size, spec.num_kv_heads, width) for width in widths]
    caches = [normal(*shape, dtype=spec.dtype, device=device, generator=generator) for shape in shapes]
    expected = [cache.clone() for cache in caches]
    slots = shuffled_slots(num_tokens, num_blocks * block_size, device, generator)
    for cache, rows in zip(expected, new, strict=True):
        cache.view(-1, *cache.shape[2:]).index_copy_(0, slots, rows)
    launch(spec, spec.grid(num_tokens), *caches, *new, slots)
    assert all(torch.equal(found, wanted) for found, wanted in zip(caches, expected, strict=True))


def check_rotary_write_kv(spec: RotaryWriteKvSpec, num_tokens: int, device: str, seed: int = 0) -> None:
    """q, k and v are parts of one merged row."""
    generator = torch.Generator().manual_seed(seed)
    width = spec.head_dim if spec.value_dim is None else spec.value_dim
    sizes = [spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim, spec.num_kv_heads * width]
    stride = sum(sizes)
    spec = replace(spec, query_row_stride=stride, key_row_stride=stride, value_row_stride=stride)
    merged = normal(num_tokens, stride, dtype=spec.dtype, device=device, generator=generator)
    query, key, value = merged.split(sizes, dim=1)
    angles = torch.rand(num_tokens, spec.rotary_dim, generator=generator) * 6
    cos, sin = (each.to(device, DTYPES[spec.angle_dtype]) for each in (angles.cos(), angles.sin()))
    output = torch.full((num_tokens, spec.num_heads, spec.head_dim), math.nan, device=device, dtype=query.dtype)
    num_slots = num_tokens + 5
    key_cache = torch.full((num_slots, spec.num_kv_heads, spec.head_dim), math.nan, device=device, dtype=query.dtype)
    value_cache = torch.full((num_slots, spec.num_kv_heads, width), math.nan, device=device, dtype=query.dtype)
    slots = shuffled_slots(num_tokens, num_slots, device, generator)
    launch(spec, spec.grid(num_tokens), output, key_cache, value_cache, query, key, value, cos, sin, slots)

    def turned(rows: torch.Tensor) -> torch.Tensor:
        heads = rows.double().unflatten(1, (-1, spec.head_dim))
        wide_cos, wide_sin = cos.double()[:, None], sin.double()[:, None]
        return rotary_embedding.definition(heads, wide_cos, wide_sin, spec.is_interleaved)

    assert_near(output, turned(query))
    assert_near(key_cache[slots], turned(key))
    assert torch.equal(value_cache[slots], value.unflatten(1, (-1, width)))
