"""Linears that a checkpoint holds in integers: compressed-tensors (``int-quantized``, ``pack-quantized``) and GPTQ.

Each is read as ``infercomp.codegen.ops`` has it: int8 [N, K] with a float32 scale a row, or codes of 3, 4 or 8 bits
with float16 scales and, where there are any, uint8 zeros [N, G]. What the kernels have no form for is an error that
names the field of ``quantization_config``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from infercomp.codegen.ops.group_codes import CODE_BITS, highest_code, middle_code, unpacked_codes
from infercomp.loading.compressed_tensors import INPUT_SCALE, PACKED, SCALE, SHAPE, WEIGHT, ZERO, as_bytes, program_form
from infercomp.loading.safetensors_file import StoredTensor
from infercomp.runtime.config import describe
from infercomp.runtime.errors import ModelLoadError

Integers = tuple[torch.Tensor, ...]
_GPTQ_SUFFIXES = (".qweight", ".qzeros", ".scales", ".g_idx")


@dataclass(frozen=True)
class StoredLinear:
    """One linear in integers: how it is quantised, its [N, K], and ``read``, which gives codes, scales and zeros.

    ``group_size`` is None for a scale a row; ``activation_bits`` is 8 where activations are rounded, each token by a
    scale of its own or all by ``input_step``.
    """

    weight_bits: int
    activation_bits: int
    group_size: int | None
    symmetric: bool
    shape: tuple[int, int]
    read: Callable[[], Integers]
    input_step: float | None = None


def stored_linears(
    quantization: Mapping[str, Any], stored: Mapping[str, StoredTensor], where: str
) -> dict[str, StoredLinear]:
    """The linears in integers by the names of their layers; ModelLoadError for a scheme that has no kernels."""
    method = quantization.get("quant_method")
    if method == "compressed-tensors":
        return _compressed_tensors(quantization, stored, where)
    if method == "gptq":
        return _gptq(quantization, stored, where)
    raise _unknown("quant_method", method, where)


def tensors_of_integers(layers: Mapping[str, StoredLinear], stored: Mapping[str, StoredTensor]) -> set[str]:
    """The names of all tensors that belong to these layers."""
    suffixes = (PACKED, SCALE, ZERO, SHAPE, WEIGHT, INPUT_SCALE, ".weight_g_idx", *_GPTQ_SUFFIXES)
    return {f"{layer}{suffix}" for layer in layers for suffix in suffixes} & stored.keys()


def _compressed_tensors(
    quantization: Mapping[str, Any], stored: Mapping[str, StoredTensor], where: str
) -> dict[str, StoredLinear]:
    groups = quantization.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise _unknown("config_groups", groups, where)
    if quantization.get("kv_cache_scheme"):
        raise _unknown("kv_cache_scheme", quantization["kv_cache_scheme"], where)
    layers = [name.removesuffix(SCALE) for name in stored if name.endswith(SCALE)]
    return {layer: _compressed_linear(layer, _group_of(layer, groups, where), stored, where) for layer in layers}


def _group_of(layer: str, groups: Mapping[str, Mapping[str, Any]], where: str) -> Mapping[str, Any]:
    """The group whose targets name the layer; a group that names the class of all linears comes last."""
    for group in groups.values():
        if any(_is_target(target, layer) for target in group.get("targets", ())):
            return group
    for group in groups.values():
        if "Linear" in group.get("targets", ()):
            return group
    raise _unknown("targets", layer, where)


def _is_target(target: str, layer: str) -> bool:
    if target.startswith("re:"):
        import re

        return re.match(target.removeprefix("re:"), layer) is not None
    return fnmatchcase(layer, target)


def _compressed_linear(
    layer: str, group: Mapping[str, Any], stored: Mapping[str, StoredTensor], where: str
) -> StoredLinear:
    weights, place = group.get("weights") or {}, f"{where}, {layer}"
    bits, is_symmetric = weights.get("num_bits"), weights.get("symmetric", True)
    if weights.get("type", "int") != "int" or bits not in CODE_BITS:
        raise _unknown("weights", f"{weights.get('type')} of {bits} bits", place)
    if f"{layer}.weight_g_idx" in stored:
        raise _unknown("actorder", "group", place)
    integers = stored.get(f"{layer}{PACKED}") or stored.get(f"{layer}{WEIGHT}")
    if integers is None:
        raise _lacks(f"{layer}{PACKED}", where)
    is_packed = integers.name.endswith(PACKED)
    shape = (integers.shape[0], integers.shape[1] * 32 // bits if is_packed else integers.shape[1])
    group_size = _group_size(weights, shape[1], bits, place)
    if group_size is None and not is_symmetric:
        raise _unknown("weights", "8 bits with a zero a row", place)
    if group_size is not None and not is_packed:
        raise _unknown("format", f"int-quantized of {bits} bits in groups", place)
    zeros = None if is_symmetric else stored.get(f"{layer}{ZERO}")
    if not is_symmetric and zeros is None:
        raise _lacks(f"{layer}{ZERO}", where)
    scale = stored[f"{layer}{SCALE}"]

    def read() -> Integers:
        dtype = torch.int8 if group_size is None else torch.uint8
        codes = program_form(integers.name, integers.read(), shape, dtype, bits) if is_packed else integers.read()
        if group_size is None:
            return codes, scale.read().float().view(-1)
        scales = _float16(scale.read(), place)
        if zeros is None:
            return codes, scales
        return codes, scales, program_form(zeros.name, zeros.read(), tuple(scales.shape), torch.uint8, bits)

    activation_bits, step = _activations(group, stored.get(f"{layer}{INPUT_SCALE}"), place)
    return StoredLinear(bits, activation_bits, group_size, is_symmetric, shape, read, step)


def _group_size(weights: Mapping[str, Any], num_inputs: int, bits: int, place: str) -> int | None:
    strategy, group_size = weights.get("strategy"), weights.get("group_size")
    if strategy == "channel" or (strategy is None and group_size in (None, -1)):
        return None if bits == 8 else num_inputs
    if strategy not in (None, "group") or not isinstance(group_size, int) or num_inputs % group_size:
        raise _unknown("strategy", f"{strategy} with group_size {group_size} of {num_inputs} inputs", place)
    return group_size


def _activations(group: Mapping[str, Any], scale: StoredTensor | None, place: str) -> tuple[int, float | None]:
    """Their bits, and the step of all tokens where it is no token's own."""
    activations = group.get("input_activations")
    if not activations:
        return 16, None
    is_static = activations.get("strategy") == "tensor" and activations.get("dynamic") is False
    kind = {"strategy": "tensor", "dynamic": False} if is_static else {"strategy": "token", "dynamic": True}
    for field, value in {"num_bits": 8, "type": "int", "symmetric": True, **kind}.items():
        if activations.get(field) != value:
            raise _unknown("input_activations", f"{field} {activations.get(field)}", place)
    if not is_static:
        return 8, None
    if scale is None:
        raise _lacks(f"{place.rpartition(', ')[2]}{INPUT_SCALE}", place)
    values = scale.read().float().flatten()
    if len(values) != 1 or not bool(values.isfinite().all() and (values > 0).all()):
        raise _unknown("input_scale", f"no positive number of {list(scale.shape)}", place)
    return 8, float(values)


def _gptq(quantization: Mapping[str, Any], stored: Mapping[str, StoredTensor], where: str) -> dict[str, StoredLinear]:
    if quantization.get("bits") not in CODE_BITS:
        raise _unknown("bits", quantization.get("bits"), where)
    layers = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    return {layer: _gptq_linear(layer, quantization, stored, where) for layer in layers}


def _gptq_linear(
    layer: str, quantization: Mapping[str, Any], stored: Mapping[str, StoredTensor], where: str
) -> StoredLinear:
    """Tensors as AutoGPTQ writes them: qweight int32 [b K / 32, N], scales [G, N], qzeros int32 [G, b N / 32] and
    g_idx [K], for b bits; codes and zeros are streams of bits, down the columns and along the rows."""
    bits = quantization["bits"]
    for suffix in (".qweight", ".scales", ".qzeros"):
        if f"{layer}{suffix}" not in stored:
            raise _lacks(f"{layer}{suffix}", where)
    weight, scale, zeros = (stored[f"{layer}{suffix}"] for suffix in (".qweight", ".scales", ".qzeros"))
    num_inputs, num_outputs = weight.shape[0] * 32 // bits, weight.shape[1]
    group_size = num_inputs // scale.shape[0]
    order = stored.get(f"{layer}.g_idx")
    # Version 1 stores a zero less one, and lets it wrap around.
    offset = 0 if quantization.get("checkpoint_format") == "gptq_v2" else 1
    codes_of_zeros = unpacked_codes(as_bytes(zeros.read()), bits)[:, :num_outputs]
    zero = ((codes_of_zeros + offset) & highest_code(bits)).t().contiguous()
    is_symmetric = bool((zero == middle_code(bits)).all())

    def read() -> Integers:
        if order is not None and not torch.equal(order.read().long(), torch.arange(num_inputs) // group_size):
            raise _unknown("desc_act", "True: groups of channels that are no neighbours", f"{where}, {layer}")
        codes = as_bytes(weight.read().t())
        scales = _float16(scale.read().t().contiguous(), f"{where}, {layer}")
        return (codes, scales) if is_symmetric else (codes, scales, zero)

    return StoredLinear(bits, 16, group_size, is_symmetric, (num_outputs, num_inputs), read)


def _float16(scales: torch.Tensor, place: str) -> torch.Tensor:
    """Scales as the kernels read them: to nearest, which moves one by 2**-11 of itself at most."""
    rounded = scales.to(torch.float16)
    is_kept = (rounded.float() - scales.float()).abs() <= 2.0**-11 * scales.float().abs()
    if not bool(is_kept.all()):
        raise _unknown("scales", "numbers beyond float16", place)
    return rounded


def _unknown(field: str, value: object, where: str) -> ModelLoadError:
    described = value if isinstance(value, str) else describe(value)
    what = f"The checkpoint is quantised in a way that has no kernels: {field} is {described}."
    remedy = "load the unquantised checkpoint and let infercomp quantise it"
    return ModelLoadError(what, where=where, remedy=remedy, field=field)


def _lacks(name: str, where: str) -> ModelLoadError:
    what = f"The files lack the tensor {name} of a quantised linear."
    return ModelLoadError(what, where=where, remedy="download the folder again", field=name)
