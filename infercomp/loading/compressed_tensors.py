"""Quantised linears as the compressed-tensors format lays them out (``int-quantized`` and ``pack-quantized``).

Of a linear ``x`` with N outputs and K inputs in groups of g (G = K / g; G = 1 for a scale a row) a file holds

    x.weight             int8 [N, K]            8 bits, ``int-quantized``: activations are rounded too
    x.weight_packed      int32 [N, b K / 32]    b bits, 3, 4 or 8: code k is the bits from b k on of a row's words
    x.weight_shape       int64 [2]              N and K, beside a packed weight
    x.weight_scale       float [N, G]
    x.input_scale        float [1]              the step of activations that are rounded on one grid for all tokens
    x.weight_zero_point  int32 [b N / 32, G]    zeros, packed along N in the same way, rounded up to whole words

Codes and zeros are unsigned there as they are here, 2^(b - 1) being the middle, so little-endian words are the bytes
of ``infercomp.codegen.ops.group_codes`` as they are; int8 weights of a scale a row get 128 added where activations are
floats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from infercomp.codegen.ops.group_codes import num_codes, packed_codes, unpacked_codes

WEIGHT, PACKED, SHAPE = ".weight", ".weight_packed", ".weight_shape"
SCALE, ZERO, INPUT_SCALE = ".weight_scale", ".weight_zero_point", ".input_scale"
_INT8_OFFSET = 128
# So many zeros fill whole words, whatever their bits.
_ZEROS_AT_ONCE = 32


class Bits(NamedTuple):
    """Of a linear's weights, and of its activations: 8 where they are rounded, 16 for floats.

    Rounded ones have a scale for each token, which is found as it comes, or all of them ``input_step``.
    """

    weight: int
    activation: int
    input_step: float | None = None


BitsOf = Callable[[str], Bits]
"""For the name of a linear."""


def stored_name(name: str, tensor: torch.Tensor, bits_of: BitsOf) -> str:
    """What the file calls a weight of a program: 8-bit weights alone are packed too."""
    if tensor.dtype != torch.int8 or not name.endswith(WEIGHT):
        return name
    layer = name.removesuffix(WEIGHT)
    return name if bits_of(layer).activation == 8 else f"{layer}{PACKED}"


def stored_tensors(weights: Mapping[str, torch.Tensor], bits_of: BitsOf) -> dict[str, torch.Tensor]:
    """What the file holds of a program's weights, given by their names in the file."""
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        layer = name.rpartition(".")[0]
        bits = bits_of(layer).weight
        stored[name] = _stored_form(name, tensor, bits)
        if name.endswith(PACKED):
            stored[f"{layer}{SHAPE}"] = torch.tensor([tensor.shape[0], _num_inputs(tensor, bits)])
        step = bits_of(layer).input_step
        if name.endswith(SCALE) and step is not None:
            # Layers of one input share it, and other tools look for one with each.
            stored[f"{layer}{INPUT_SCALE}"] = torch.tensor([step])
    return stored


def program_form(
    name: str, stored: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, bits: int
) -> torch.Tensor:
    """What ``stored_form`` was given, of this shape and dtype; ``bits`` are those of the linear's weights."""
    if name.endswith(PACKED):
        codes = as_bytes(stored)
        return (codes ^ _INT8_OFFSET).view(torch.int8) if dtype == torch.int8 else codes
    return _unpacked_rows(stored, shape[0], bits) if name.endswith(ZERO) else stored.view(shape)


def as_bytes(words: torch.Tensor) -> torch.Tensor:
    """Each row's words as its bytes, uint8 [..., bytes]; copied, as a dimension of one may have any stride."""
    return torch.empty(words.shape, dtype=words.dtype).copy_(words).view(torch.uint8)


def quantization_config(weights: Mapping[str, torch.Tensor], bits_of: BitsOf) -> dict[str, Any] | None:
    """What config.json says of the linears among a program's weights; None where none is quantised."""
    layers: dict[_Scheme, list[str]] = {}
    for name in weights:
        if name.endswith(SCALE):
            layer = name.removesuffix(SCALE)
            layers.setdefault(_scheme_of(layer, weights, bits_of(layer)), []).append(layer)
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
    is_static: bool
    group_size: int | None
    is_symmetric: bool

    @property
    def is_packed(self) -> bool:
        return self.group_size is not None or self.activation_bits != 8


def _scheme_of(layer: str, weights: Mapping[str, torch.Tensor], bits: Bits) -> _Scheme:
    integers = weights[f"{layer}{PACKED}" if f"{layer}{PACKED}" in weights else f"{layer}{WEIGHT}"]
    kept = bits.weight, bits.activation, bits.input_step is not None
    if integers.dtype == torch.int8:
        return _Scheme(*kept, None, True)
    group_size = _num_inputs(integers, bits.weight) // weights[f"{layer}{SCALE}"].shape[1]
    return _Scheme(*kept, group_size, f"{layer}{ZERO}" not in weights)


def _group(scheme: _Scheme, names: Iterable[str]) -> dict[str, Any]:
    activations = {"num_bits": 8, "type": "int", "symmetric": True}
    activations |= {"strategy": "tensor" if scheme.is_static else "token", "dynamic": not scheme.is_static}
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
        "input_activations": activations if scheme.activation_bits == 8 else None,
        "output_activations": None,
        "format": "pack-quantized" if scheme.is_packed else "int-quantized",
    }


def _num_inputs(integers: torch.Tensor, bits: int) -> int:
    num_columns: int = integers.shape[1]
    return num_columns if integers.dtype == torch.int8 else num_codes(integers, bits)


def _stored_form(name: str, tensor: torch.Tensor, bits: int) -> torch.Tensor:
    if name.endswith(PACKED):
        codes = tensor.view(torch.uint8) ^ _INT8_OFFSET if tensor.dtype == torch.int8 else tensor
        return codes.contiguous().view(torch.int32)
    if name.endswith(SCALE) and tensor.dim() == 1:
        return tensor[:, None]
    return _packed_rows(tensor, bits) if name.endswith(ZERO) else tensor


def _packed_rows(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 [N, G] as int32 [ceil(b N / 32), G]."""
    num_rows, num_groups = zeros.shape
    padded = zeros.new_zeros(num_groups, -(-num_rows // _ZEROS_AT_ONCE) * _ZEROS_AT_ONCE)
    padded[:, :num_rows] = zeros.t()
    words = packed_codes(padded, bits).view(torch.int32)
    return words[:, : -(-num_rows * bits // 32)].t().contiguous()


def _unpacked_rows(packed: torch.Tensor, num_rows: int, bits: int) -> torch.Tensor:
    words = packed.new_zeros(packed.shape[1], -(-num_rows // _ZEROS_AT_ONCE) * bits)
    words[:, : len(packed)] = packed.t()
    return unpacked_codes(as_bytes(words), bits)[:, :num_rows].t().contiguous()
