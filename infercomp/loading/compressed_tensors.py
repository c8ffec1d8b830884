"""Quantised linears as the compressed-tensors format lays them out (``int-quantized`` and ``pack-quantized``).

Of a linear ``x`` with N outputs and K inputs in groups of g (G = K / g; G = 1 for a scale a row) a file holds

    x.weight             int8 [N, K]            8 bits, ``int-quantized``: activations are rounded too
    x.weight_packed      int32 [N, K / 8]       4 bits: the nibble of input k is bits 4 (k % 8) … of word k // 8
                         int32 [N, K / 4]       8 bits where activations are floats: bytes with 128 added
    x.weight_shape       int64 [2]              N and K, beside a packed weight
    x.weight_scale       float [N, G]
    x.weight_zero_point  int32 [N / 8, G]       zeros of 4 bits, packed along N in the same way

Nibbles and zeros are unsigned there as they are here, 8 being the middle, so little-endian words of eight nibbles are
the bytes of ``infercomp.codegen.ops.quantized`` as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

WEIGHT, PACKED, SHAPE = ".weight", ".weight_packed", ".weight_shape"
SCALE, ZERO = ".weight_scale", ".weight_zero_point"
_NIBBLES = 8
_INT8_OFFSET = 128


ActivationBits = Callable[[str], int]
"""For the name of a linear: 8 for activations rounded per token when they come, 16 for floats."""


def stored_name(name: str, tensor: torch.Tensor, activation_bits: ActivationBits) -> str:
    """What the file calls a weight of a program: 8-bit weights alone are packed too."""
    if tensor.dtype != torch.int8 or not name.endswith(WEIGHT):
        return name
    layer = name.removesuffix(WEIGHT)
    return name if activation_bits(layer) == 8 else f"{layer}{PACKED}"


def stored_tensors(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the file holds of a program's weights, given by their names in the file."""
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        stored[name] = _stored_form(name, tensor)
        if name.endswith(PACKED):
            stored[name.removesuffix(PACKED) + SHAPE] = torch.tensor([tensor.shape[0], _num_inputs(tensor)])
    return stored


def program_form(name: str, stored: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What ``stored_form`` was given, of this shape and dtype."""
    if name.endswith(PACKED):
        codes = as_bytes(stored)
        return (codes ^ _INT8_OFFSET).view(torch.int8) if dtype == torch.int8 else codes
    return _unpacked_rows(stored, shape[0]) if name.endswith(ZERO) else stored.view(shape)


def as_bytes(words: torch.Tensor) -> torch.Tensor:
    """Each row's words as its bytes, uint8 [..., bytes]; copied, as a dimension of one may have any stride."""
    return torch.empty(words.shape, dtype=words.dtype).copy_(words).view(torch.uint8)


def quantization_config(weights: Mapping[str, torch.Tensor], activation_bits: ActivationBits) -> dict[str, Any] | None:
    """What config.json says of the linears among a program's weights; None where none is quantised."""
    layers: dict[_Scheme, list[str]] = {}
    for name in weights:
        if name.endswith(SCALE):
            layer = name.removesuffix(SCALE)
            layers.setdefault(_scheme_of(layer, weights, activation_bits(layer)), []).append(layer)
    if not layers:
        return None
    groups = {f"group_{i}": _group(scheme, names) for i, (scheme, names) in enumerate(layers.items())}
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": [],
    }


@dataclass(frozen=True)
class _Scheme:
    bits: int
    activation_bits: int
    group_size: int | None
    is_symmetric: bool


def _scheme_of(layer: str, weights: Mapping[str, torch.Tensor], activation_bits: int) -> _Scheme:
    integers = weights[f"{layer}{PACKED}" if f"{layer}{PACKED}" in weights else f"{layer}{WEIGHT}"]
    if integers.dtype == torch.int8:
        return _Scheme(8, activation_bits, None, True)
    group_size = _num_inputs(integers) // weights[f"{layer}{SCALE}"].shape[1]
    return _Scheme(4, activation_bits, group_size, f"{layer}{ZERO}" not in weights)


def _group(scheme: _Scheme, names: Iterable[str]) -> dict[str, Any]:
    per_token = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "targets": list(names),
        "weights": {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": scheme.is_symmetric,
            "strategy": "channel" if scheme.group_size is None else "group",
            "group_size": scheme.group_size,
            "dynamic": False,
        },
        "input_activations": per_token if scheme.activation_bits == 8 else None,
        "output_activations": None,
        "format": "int-quantized" if scheme.bits == scheme.activation_bits == 8 else "pack-quantized",
    }


def _num_inputs(integers: torch.Tensor) -> int:
    num_columns: int = integers.shape[1]
    return num_columns if integers.dtype == torch.int8 else 2 * num_columns


def _stored_form(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if name.endswith(PACKED):
        codes = tensor.view(torch.uint8) ^ _INT8_OFFSET if tensor.dtype == torch.int8 else tensor
        return codes.contiguous().view(torch.int32)
    if name.endswith(SCALE) and tensor.dim() == 1:
        return tensor[:, None]
    return _packed_rows(tensor) if name.endswith(ZERO) else tensor


def _packed_rows(zeros: torch.Tensor) -> torch.Tensor:
    """uint8 [N, G] of 0..15 as int32 [ceil(N / 8), G]."""
    num_rows, num_groups = zeros.shape
    padded = torch.zeros(-(-num_rows // _NIBBLES) * _NIBBLES, num_groups, dtype=torch.uint8)
    padded[:num_rows] = zeros
    pairs = padded.t().reshape(num_groups, -1, 2)
    return (pairs[..., 0] | pairs[..., 1] << 4).contiguous().view(torch.int32).t().contiguous()


def _unpacked_rows(packed: torch.Tensor, num_rows: int) -> torch.Tensor:
    pairs = as_bytes(packed.t())
    return torch.stack((pairs & 15, pairs >> 4), -1).flatten(1).t()[:num_rows].contiguous()
