"""Linears that a GGUF file holds in integers, as ``infercomp.codegen.ops.group_codes`` has them: groups of 32 inputs.

    Q8_0    a float16 scale, 32 codes in int8                                  8 bits, 128 added to the codes
    Q4_0    a float16 scale, 32 codes of 4 bits, 8 being zero                  4 bits
    Q4_1    a float16 scale and a float16 smallest value, 32 codes of 4 bits   4 bits, the smallest values as zeros

In a block of 4 bits codes i and i + 16 share a byte, the former the low half of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch

from infercomp.codegen.ops.group_codes import packed_codes
from infercomp.loading.gguf_file import GgufFile, GgufTensor
from infercomp.loading.stored_linears import Integers, StoredLinear
from infercomp.loading.weight_bytes import open_weight_file, read_fully

GROUP = 32
_BITS = {"Q8_0": 8, "Q4_0": 4, "Q4_1": 4}
_BLOCK_BYTES = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}
_INT8_OFFSET = 128

Rows = Callable[[torch.Tensor], torch.Tensor]
"""Puts the rows of a tensor into the order that the model wants them in."""


def gguf_linears(file: GgufFile, tensors: Mapping[str, tuple[GgufTensor, Rows]]) -> dict[str, StoredLinear]:
    """Of these linears, by the names of their layers, those whose type is one of integers that the kernels read."""
    return {
        layer: StoredLinear(
            _BITS[tensor.type_name],
            16,
            GROUP,
            tensor.type_name != "Q4_1",
            (tensor.shape[0], tensor.shape[1]),
            _reader(file, tensor, rows),
        )
        for layer, (tensor, rows) in tensors.items()
        if tensor.type_name in _BITS
    }


def _reader(file: GgufFile, tensor: GgufTensor, rows: Rows) -> Callable[[], Integers]:
    def read() -> Integers:
        raw = np.empty(tensor.num_bytes, dtype=np.uint8)
        stream, _ = open_weight_file(file.path)
        with stream:
            read_fully(stream, tensor.offset, raw.data, f"{file.path}, {tensor.name}")
        blocks = raw.reshape(tensor.shape[0], -1, _BLOCK_BYTES[tensor.type_name])
        return tuple(rows(part) for part in _parts(blocks, tensor.type_name))

    return read


def _parts(blocks: np.ndarray, type_name: str) -> Iterable[torch.Tensor]:
    """Codes [N, b K / 8], scales and, of Q4_1, smallest values [N, K / 32] of blocks [N, K / 32, bytes]."""
    num_halves = 2 if type_name == "Q4_1" else 1
    payload = torch.from_numpy(blocks[..., 2 * num_halves :].copy())
    if type_name == "Q8_0":
        yield (payload.flatten(1) ^ _INT8_OFFSET).contiguous()
    else:
        yield packed_codes(torch.cat((payload & 15, payload >> 4), -1).flatten(1), 4)
    halves = np.ascontiguousarray(blocks[..., : 2 * num_halves]).view(np.float16)
    for part in range(num_halves):
        yield torch.from_numpy(halves[..., part].copy())
