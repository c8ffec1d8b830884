"""The header of a safetensors file, checked before it is believed, and its tensors, read only when asked for."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from infercomp.loading.weight_bytes import CHUNK_BYTES, Place, as_it_is, open_weight_file, read_fully
from infercomp.runtime.errors import ModelLoadError

_MAX_HEADER_BYTES = 100 << 20
_REMEDY = "copy or download the file again; it is truncated or not a valid safetensors file"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a safetensors file; ``stored[...]`` reads it, as transformers' loader asks for it."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    target_dtype: torch.dtype | None = None
    place: Place = as_it_is

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.read()[index]

    def read(self) -> torch.Tensor:
        """The values in ``target_dtype`` (default: as stored), with no second copy of the whole tensor."""
        is_cast = self.target_dtype not in (None, self.dtype) and self.dtype.is_floating_point
        values = torch.empty(self.shape, dtype=self.target_dtype if is_cast else self.dtype)
        stream, _ = open_weight_file(self.path)
        with stream:
            if not is_cast:
                self._read_bytes(stream, 0, values.view(-1))
                return self.place(values)
            num_chunk_elements = CHUNK_BYTES // self.dtype.itemsize
            for start in range(0, values.numel(), num_chunk_elements):
                part = values.view(-1)[start : start + num_chunk_elements]
                stored_part = torch.empty(part.shape, dtype=self.dtype)
                self._read_bytes(stream, start, stored_part)
                part.copy_(stored_part)
        return self.place(values)

    def _read_bytes(self, stream: Any, first_element: int, destination: torch.Tensor) -> None:
        if destination.numel():
            buffer = memoryview(destination.view(torch.uint8).numpy())
            offset = self.offset + first_element * self.dtype.itemsize
            read_fully(stream, offset, buffer, f"{self.path}, {self.name}")


def read_safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of the file by name; a ModelLoadError names the file and the tensor or field at fault."""
    stream, num_file_bytes = open_weight_file(path)
    with stream:
        prefix = stream.read(8)
        num_header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or num_header_bytes > min(_MAX_HEADER_BYTES, num_file_bytes - 8):
            raise _error(path, f"The header of {num_header_bytes} bytes does not fit the file.", "header length")
        raw_header = stream.read(num_header_bytes)
    try:
        header = json.loads(raw_header.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _error(path, f"The header is not valid JSON: {error}.", "header") from error
    if not isinstance(header, dict):
        raise _error(path, "The header is not a JSON object.", "header")
    header.pop("__metadata__", None)
    data_start = 8 + num_header_bytes
    tensors = {name: _read_entry(path, name, entry, data_start) for name, entry in header.items()}
    _require_exact_cover(path, tensors, data_start, num_file_bytes)
    return tensors


def _read_entry(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _error(path, "The header's entry lacks dtype, shape or data_offsets.", name)
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise _error(path, f"The shape {shape} or the offsets {offsets} are no lists of sizes.", name)
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        what = f"The type {entry['dtype']!r} is not supported"
        raise _error(path, f"{what}; supported are {', '.join(_DTYPES)}.", name)
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise _error(path, f"{end - begin} bytes do not hold a {entry['dtype']} tensor of shape {shape}.", name)
    return StoredTensor(path, name, dtype, tuple(shape), data_start + begin, end - begin)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _require_exact_cover(path: Path, tensors: dict[str, StoredTensor], data_start: int, num_file_bytes: int) -> None:
    """The format wants the data to be covered with no hole, no overlap and nothing left over."""
    expected_offset = data_start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.num_bytes)):
        if tensor.offset != expected_offset:
            raise _error(path, f"The data starts at byte {tensor.offset}, not {expected_offset}.", tensor.name)
        expected_offset += tensor.num_bytes
        if expected_offset > num_file_bytes:
            what = f"The data would end at byte {expected_offset} of {num_file_bytes}."
            raise _error(path, what, tensor.name)
    if expected_offset != num_file_bytes:
        raise _error(path, f"{num_file_bytes - expected_offset} bytes follow the last tensor.", "header")


def _error(path: Path, what: str, field: str) -> ModelLoadError:
    return ModelLoadError(what, where=f"{path}, {field}", remedy=_REMEDY, field=field)
