"""Linears in integers are read as other tools wrote them; schemes without kernels are errors that name the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.naive_quantized import IntQuantizationCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from infercomp.codegen.ops import group_weight_linear, int8_weight_linear
from infercomp.loading.safetensors_file import StoredTensor, read_safetensors_header
from infercomp.loading.stored_linears import StoredLinear, stored_linears
from infercomp.runtime.errors import ModelLoadError


def restored(linear: StoredLinear) -> torch.Tensor:
    """The weight [N, K] that a linear stands for, by the definitions of our own ops."""
    identity = torch.eye(linear.shape[1])
    codes, scale, *zero = linear.read()
    if linear.group_size is None:
        return int8_weight_linear.definition(identity, codes, scale, None).t()
    return group_weight_linear.definition(
        identity, codes, scale, *(zero or [None]), None, linear.weight_bits, linear.group_size
    ).t()


def on_disk(tensors: dict[str, torch.Tensor], folder: Path) -> dict[str, StoredTensor]:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return read_safetensors_header(folder / "model.safetensors")


def compressed_tensors_config(args: QuantizationArgs, target: str = "Linear", **group: Any) -> dict[str, Any]:
    weights = args.model_dump()
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"g": {"targets": [target], "weights": weights, **group}},
    }


def grid(weight: torch.Tensor, args: QuantizationArgs) -> dict[str, torch.Tensor]:
    """Scales and zeros of least and largest values, in the tool's own signed codes."""
    groups = weight.unflatten(1, (-1, args.group_size or weight.shape[1]))
    if args.symmetric:
        return {"weight_scale": groups.abs().amax(-1) / (2 ** (args.num_bits - 1) - 0.5)}
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    middle = 2 ** (args.num_bits - 1)
    scale = (high - low).clamp(min=1e-6) / (2 * middle - 1)
    zero = (-middle - (low / scale).round()).clamp(-middle, middle - 1)
    return {"weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}


@settings(max_examples=30, deadline=None)
@given(
    num_outputs=st.integers(9, 40),  # their reader of zeros fails on a single row of words
    num_groups=st.integers(1, 3),
    bits=st.sampled_from([3, 4, 8]),
    is_symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=st.integers(0, 1 << 31),
)
def test_groups_of_compressed_tensors(
    tmp_path_factory: pytest.TempPathFactory,
    bits: int,
    num_outputs: int,
    num_groups: int,
    is_symmetric: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_outputs, 32 * num_groups, generator=generator).to(dtype)
    args = QuantizationArgs(num_bits=bits, strategy="group", group_size=32, symmetric=is_symmetric)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    given_ = {name: each.to(dtype) if "scale" in name else each for name, each in grid(weight, args).items()}
    written = PackedQuantizationCompressor.compress({"weight": weight, **given_}, scheme)
    theirs = PackedQuantizationCompressor.decompress(written, scheme)["weight"]
    stored = on_disk({f"a.b.{name}": each for name, each in written.items()}, tmp_path_factory.mktemp("ct"))
    (linear,) = stored_linears(compressed_tensors_config(args), stored, "here").values()
    assert (linear.weight_bits, linear.activation_bits, linear.group_size) == (bits, 16, 32)
    assert linear.shape == tuple(weight.shape) and linear.symmetric == is_symmetric
    # They multiply in the checkpoint's dtype and we in float32.
    assert torch.equal(restored(linear).to(dtype), theirs)


@pytest.mark.parametrize("is_packed", [True, False])
def test_eight_bits_of_compressed_tensors(is_packed: bool, tmp_path: Path) -> None:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    args = QuantizationArgs(num_bits=8, strategy="channel", symmetric=True)
    per_token = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = PackedQuantizationCompressor if is_packed else IntQuantizationCompressor
    written = compressor.compress({"weight": weight, **grid(weight, args)}, scheme)
    theirs = compressor.decompress(written, scheme)["weight"]
    stored = on_disk({f"x.{name}": each for name, each in written.items()}, tmp_path)
    config = compressed_tensors_config(args, **({} if is_packed else {"input_activations": per_token}))
    linear = stored_linears(config, stored, "here")["x"]
    assert (linear.weight_bits, linear.activation_bits) == (8, 16 if is_packed else 8)
    assert torch.equal(restored(linear), theirs)


def packed_along(values: torch.Tensor, dim: int, bits: int = 4) -> torch.Tensor:
    """Codes as int32 words of neighbours along ``dim``, as AutoGPTQ packs them: bit i of code k is bit b k + i."""
    is_set = values.to(torch.int64).movedim(dim, -1)[..., None] >> torch.arange(bits) & 1
    words = (is_set.flatten(-2).unflatten(-1, (-1, 32)) << torch.arange(32)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).movedim(-1, dim)


def gptq_tensors(
    weight_codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, stored_less: int, bits: int = 4
) -> dict[str, torch.Tensor]:
    """``weight_codes`` [K, N], ``scale`` and ``zero`` [G, N]."""
    num_inputs, num_groups = weight_codes.shape[0], scale.shape[0]
    return {
        "x.qweight": packed_along(weight_codes, 0, bits),
        "x.qzeros": packed_along((zero - stored_less) % 2**bits, 1, bits),
        "x.scales": scale.half(),
        "x.g_idx": (torch.arange(num_inputs) // (num_inputs // num_groups)).int(),
    }


@settings(max_examples=30, deadline=None)
@given(
    bits=st.sampled_from([3, 4, 8]),
    num_words=st.integers(1, 2),
    num_groups=st.integers(1, 3),
    version=st.sampled_from(["gptq", "gptq_v2"]),
    is_symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_gptq(
    tmp_path_factory: pytest.TempPathFactory,
    bits: int,
    num_words: int,
    num_groups: int,
    version: str,
    is_symmetric: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (32 * num_groups, 32 * num_words), generator=generator)
    scale = torch.rand(num_groups, 32 * num_words, generator=generator).half()
    zero = torch.randint(0, 2**bits, scale.shape, generator=generator)
    zero = torch.full_like(zero, 2 ** (bits - 1)) if is_symmetric else zero
    tensors = gptq_tensors(codes, scale, zero, stored_less=int(version == "gptq"), bits=bits)
    stored = on_disk(tensors, tmp_path_factory.mktemp("gptq"))
    config = {"quant_method": "gptq", "bits": bits, "group_size": 32, "checkpoint_format": version}
    linear = stored_linears(config, stored, "here")["x"]
    exact = (codes - zero.repeat_interleave(32, 0)).double() * scale.double().repeat_interleave(32, 0)
    assert torch.equal(restored(linear).double(), exact.t())
    assert linear.symmetric == bool((zero == 2 ** (bits - 1)).all())


def test_the_two_versions_of_gptq_are_told_apart(tmp_path: Path) -> None:
    """Planted: zeros of version 2 read as those of version 1."""
    codes, scale, zero = torch.ones(32, 8, dtype=torch.int64), torch.ones(1, 8), torch.full((1, 8), 3)
    stored = on_disk(gptq_tensors(codes, scale, zero, stored_less=0), tmp_path)
    read = {
        v: stored_linears({"quant_method": "gptq", "bits": 4, "checkpoint_format": v}, stored, "")["x"].read()
        for v in ("gptq", "gptq_v2")
    }
    assert not torch.equal(read["gptq"][2], read["gptq_v2"][2])


def test_channels_in_another_order_are_refused(tmp_path: Path) -> None:
    codes, scale, zero = torch.ones(64, 8, dtype=torch.int64), torch.ones(2, 8), torch.full((2, 8), 3)
    tensors = gptq_tensors(codes, scale, zero, stored_less=1)
    tensors["x.g_idx"] = tensors["x.g_idx"].flip(0)
    linear = stored_linears({"quant_method": "gptq", "bits": 4}, on_disk(tensors, tmp_path), "here")["x"]
    with pytest.raises(ModelLoadError) as caught:
        linear.read()
    assert caught.value.field == "desc_act"


def eight_bit_tensors() -> dict[str, torch.Tensor]:
    return {"x.weight": torch.ones(8, 32, dtype=torch.int8), "x.weight_scale": torch.ones(8, 1)}


INT8 = QuantizationArgs(num_bits=8, strategy="channel", symmetric=True)
STATIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"quant_method": "awq"}, "quant_method"),
        ({"quant_method": "gptq", "bits": 2}, "bits"),
        ({"quant_method": "compressed-tensors"}, "config_groups"),
        ({**compressed_tensors_config(INT8), "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        (compressed_tensors_config(INT8, "y"), "targets"),
        (compressed_tensors_config(INT8, input_activations={**STATIC, "symmetric": False}), "input_activations"),
        (compressed_tensors_config(INT8, input_activations=STATIC), "x.input_scale"),
        (compressed_tensors_config(QuantizationArgs(num_bits=8, type="float", strategy="channel")), "weights"),
        (compressed_tensors_config(QuantizationArgs(num_bits=8, strategy="group", group_size=16)), "format"),
        (compressed_tensors_config(QuantizationArgs(num_bits=8, strategy="channel", symmetric=False)), "weights"),
        (compressed_tensors_config(QuantizationArgs(num_bits=8, strategy="group", group_size=24)), "strategy"),
        (compressed_tensors_config(QuantizationArgs(num_bits=4, strategy="group", group_size=16)), "format"),
    ],
)
def test_a_scheme_without_kernels_names_the_field(config: dict[str, Any], field: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError) as caught:
        stored_linears(config, on_disk(eight_bit_tensors(), tmp_path), "here")
    assert caught.value.field == field and caught.value.remedy


@pytest.mark.parametrize("target", ["Linear", "x", "re:^x$", "re:.*"])
def test_targets_are_classes_names_or_patterns(target: str, tmp_path: Path) -> None:
    stored = on_disk(eight_bit_tensors(), tmp_path)
    assert set(stored_linears(compressed_tensors_config(INT8, target), stored, "here")) == {"x"}


def test_scales_beyond_float16_are_refused(tmp_path: Path) -> None:
    tensors = {"x.weight_packed": torch.zeros(8, 4, dtype=torch.int32), "x.weight_scale": torch.full((8, 1), 1e6)}
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=32, symmetric=True)
    linear = stored_linears(compressed_tensors_config(args), on_disk(tensors, tmp_path), "here")["x"]
    with pytest.raises(ModelLoadError) as caught:
        linear.read()
    assert caught.value.field == "scales"


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    stored = on_disk({"x.weight_scale": torch.ones(8, 1)}, tmp_path)
    with pytest.raises(ModelLoadError, match=r"x\.weight_packed"):
        stored_linears(compressed_tensors_config(INT8), stored, "here")
