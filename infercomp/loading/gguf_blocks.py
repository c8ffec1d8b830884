"""Turning GGUF blocks into numbers: the plain and the common 4 and 8 bit types here, the rest through ``gguf``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from infercomp.loading.gguf_file import GgufTensor
from infercomp.loading.weight_bytes import CHUNK_BYTES, read_fully
from infercomp.runtime.errors import ModelLoadError

PLAIN_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_tensor(stream: BinaryIO, path: Path, tensor: GgufTensor, destination: torch.Tensor) -> None:
    """Fills the contiguous ``destination`` (of any floating type) with the tensor's values, a few rows at a time."""
    rows = destination.reshape(1, -1) if destination.dim() == 1 else destination
    num_row_bytes = tensor.num_bytes // rows.shape[0]
    num_chunk_rows = max(1, CHUNK_BYTES // num_row_bytes)
    buffer = np.empty(min(num_chunk_rows, rows.shape[0]) * num_row_bytes, dtype=np.uint8)
    where = f"{path}, {tensor.name}"
    for first_row in range(0, rows.shape[0], num_chunk_rows):
        chunk = rows[first_row : first_row + num_chunk_rows]
        raw = buffer[: chunk.shape[0] * num_row_bytes]
        read_fully(stream, tensor.offset + first_row * num_row_bytes, raw.data, where)
        _fill(chunk, raw, tensor.type_name, where)


def _fill(chunk: torch.Tensor, raw: np.ndarray, type_name: str, where: str) -> None:
    if type_name in PLAIN_TYPES:
        chunk.copy_(torch.from_numpy(raw).view(PLAIN_TYPES[type_name]).view(chunk.shape))
    elif type_name in _DEQUANTIZERS and chunk.dtype == torch.float32:
        _DEQUANTIZERS[type_name](raw, chunk.view(-1).numpy())
    else:
        chunk.copy_(torch.from_numpy(dequantize(raw, type_name, where)).view(chunk.shape))


def dequantize(raw: np.ndarray, type_name: str, where: str) -> np.ndarray:
    """The float32 values of ``raw`` blocks, flat; equal bit for bit to ``gguf.quants.dequantize``."""
    import gguf

    kind = gguf.GGMLQuantizationType[type_name]
    if type_name in _DEQUANTIZERS:
        num_block_elements, num_block_bytes = gguf.GGML_QUANT_SIZES[kind]
        values = np.empty(raw.size // num_block_bytes * num_block_elements, dtype=np.float32)
        _DEQUANTIZERS[type_name](raw, values)
        return values
    try:
        return gguf.quants.dequantize(raw, kind).reshape(-1)
    except NotImplementedError as error:
        raise ModelLoadError(
            f"Tensors of type {type_name} cannot be read.",
            where=where,
            remedy="use a file with another quantisation, such as Q4_K, Q8_0 or F16",
            field=where.rpartition(", ")[2],
        ) from error


def _scale(half_bytes: np.ndarray) -> np.ndarray:
    return half_bytes.view(np.float16).astype(np.float32)


def _dequantize_q8_0(raw: np.ndarray, values: np.ndarray) -> None:
    blocks = raw.reshape(-1, 34)  # scale f16 | 32 x int8
    np.multiply(blocks[:, 2:].view(np.int8), _scale(blocks[:, :2]), out=values.reshape(-1, 32))


def _dequantize_q4_1(raw: np.ndarray, values: np.ndarray) -> None:
    blocks = raw.reshape(-1, 20)  # scale f16, minimum f16 | 32 x uint4, element i with i + 16 in one byte
    scales = _scale(blocks[:, :4])
    halves = values.reshape(-1, 2, 16)
    np.multiply(blocks[:, 4:] & 0x0F, scales[:, :1], out=halves[:, 0])
    np.multiply(blocks[:, 4:] >> 4, scales[:, :1], out=halves[:, 1])
    halves += scales[:, 1:, None]


def _dequantize_q4_0(raw: np.ndarray, values: np.ndarray) -> None:
    blocks = raw.reshape(-1, 18)  # scale f16 | 32 x uint4 with 8 as zero
    scales = _scale(blocks[:, :2])
    halves = values.reshape(-1, 2, 16)
    np.multiply((blocks[:, 2:] & 0x0F).view(np.int8) - np.int8(8), scales, out=halves[:, 0])
    np.multiply((blocks[:, 2:] >> 4).view(np.int8) - np.int8(8), scales, out=halves[:, 1])


_DEQUANTIZERS: dict[str, Callable[[np.ndarray, np.ndarray], None]] = {
    "Q8_0": _dequantize_q8_0,
    "Q4_1": _dequantize_q4_1,
    "Q4_0": _dequantize_q4_0,
}
