"""The header of a GGUF file, read once and checked: no size in it is believed before it fits into the file."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from infercomp.loading.weight_bytes import open_weight_file
from infercomp.runtime.errors import ModelLoadError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_STRING, _ARRAY = 8, 9
_SCALAR_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# The least bytes an entry can take: key length + type + one byte; name length + dimensions + type + offset.
_MIN_FIELD_BYTES, _MIN_TENSOR_BYTES = 8 + 4 + 1, 8 + 4 + 4 + 8
_REMEDY = "copy or download the file again; it is truncated or not a valid GGUF file"


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file: ``shape`` in torch order, ``offset`` in bytes from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class GgufFile:
    """The metadata and the tensor table of one GGUF file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        return self.metadata["general.architecture"]


def read_gguf_file(path: Path) -> GgufFile:
    """Reads metadata and tensor table; a ModelLoadError names the file and the field or tensor at fault."""
    stream, num_file_bytes = open_weight_file(path)
    with stream:
        cursor = _Cursor(stream, num_file_bytes, path)
        num_tensors, num_fields = _read_preamble(cursor)
        metadata = _read_metadata(cursor, num_fields)
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise cursor.error("The alignment must be a power of two.", "general.alignment")
        return GgufFile(path, metadata, _read_tensors(cursor, num_tensors, alignment))


class _Cursor:
    """Reads forward through the header, never past the end of the file."""

    def __init__(self, stream: BinaryIO, num_file_bytes: int, path: Path) -> None:
        self._stream = stream
        self._path = path
        self.num_file_bytes = num_file_bytes
        self.position = 0

    def error(self, what: str, field: str) -> ModelLoadError:
        return ModelLoadError(what, where=f"{self._path}, {field}", remedy=_REMEDY, field=field)

    def reserve(self, num_bytes: int, field: str) -> None:
        """Raises unless ``num_bytes`` more bytes are there; to be called before anything of that size is made."""
        num_bytes_left = self.num_file_bytes - self.position
        if num_bytes > num_bytes_left:
            raise self.error(f"The header wants {num_bytes} more bytes where {num_bytes_left} are left.", field)

    def take(self, num_bytes: int, field: str) -> bytes:
        self.reserve(num_bytes, field)
        data = self._stream.read(num_bytes)
        if len(data) != num_bytes:
            raise self.error("The file became shorter while it was read.", field)
        self.position += num_bytes
        return data

    def numbers(self, format_letters: str, field: str) -> tuple[Any, ...]:
        layout = "<" + format_letters
        return struct.unpack(layout, self.take(struct.calcsize(layout), field))

    def string(self, field: str) -> str:
        (num_bytes,) = struct.unpack("<Q", self.take(8, field))
        try:
            return self.take(num_bytes, field).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error("A string is not valid UTF-8.", field) from error


def _read_preamble(cursor: _Cursor) -> tuple[int, int]:
    if cursor.take(4, "magic") != _MAGIC:
        raise cursor.error("The file does not start with the GGUF magic bytes.", "magic")
    (version,) = cursor.numbers("I", "version")
    if version not in _VERSIONS:
        raise cursor.error(f"GGUF version {version} is not one of {_VERSIONS} (little endian).", "version")
    num_tensors, num_fields = cursor.numbers("QQ", "tensor_count")
    cursor.reserve(num_tensors * _MIN_TENSOR_BYTES, "tensor_count")
    cursor.reserve(num_fields * _MIN_FIELD_BYTES, "metadata_kv_count")
    return num_tensors, num_fields


def _read_metadata(cursor: _Cursor, num_fields: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for index in range(num_fields):
        key = cursor.string(f"metadata field {index}")
        if key in metadata:
            raise cursor.error("The metadata field occurs twice.", key)
        (type_number,) = cursor.numbers("I", key)
        metadata[key] = _read_array(cursor, key) if type_number == _ARRAY else _read_value(cursor, type_number, key)
    if not isinstance(metadata.get("general.architecture"), str):
        raise cursor.error("The metadata does not name the model's architecture.", "general.architecture")
    return metadata


def _read_value(cursor: _Cursor, type_number: int, key: str) -> Any:
    if type_number == _STRING:
        return cursor.string(key)
    if type_number not in _SCALAR_FORMATS:
        raise cursor.error(f"The metadata field has the unknown type {type_number}.", key)
    return cursor.numbers(_SCALAR_FORMATS[type_number], key)[0]


def _read_array(cursor: _Cursor, key: str) -> list[Any]:
    element_type, num_elements = cursor.numbers("IQ", key)
    if element_type == _STRING:
        cursor.reserve(num_elements * 8, key)
        return [cursor.string(key) for _ in range(num_elements)]
    if element_type not in _SCALAR_FORMATS:
        raise cursor.error(f"The metadata array has elements of the unsupported type {element_type}.", key)
    letter = _SCALAR_FORMATS[element_type]
    cursor.reserve(num_elements * struct.calcsize("<" + letter), key)
    return list(cursor.numbers(f"{num_elements}{letter}", key))


def _read_tensors(cursor: _Cursor, num_tensors: int, alignment: int) -> dict[str, GgufTensor]:
    sizes_of_type = _quantization_sizes()
    entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for index in range(num_tensors):
        name = cursor.string(f"tensor {index}")
        if name in entries:
            raise cursor.error("The tensor occurs twice.", name)
        (num_dimensions,) = cursor.numbers("I", name)
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise cursor.error(f"The tensor has {num_dimensions} dimensions.", name)
        dimensions = cursor.numbers("Q" * num_dimensions, name)
        type_number, relative_offset = cursor.numbers("IQ", name)
        entries[name] = (dimensions[::-1], type_number, relative_offset)  # the file names the fastest axis first
    data_start = -(-cursor.position // alignment) * alignment

    def locate(name: str) -> GgufTensor:
        shape, type_number, relative_offset = entries[name]
        if type_number not in sizes_of_type:
            raise cursor.error(f"The tensor has the unknown type {type_number}.", name)
        type_name, num_block_elements, num_block_bytes = sizes_of_type[type_number]
        if math.prod(shape) == 0 or shape[-1] % num_block_elements:
            raise cursor.error(f"The shape {shape} does not divide into {type_name} blocks.", name)
        num_bytes = math.prod(shape) // num_block_elements * num_block_bytes
        offset = data_start + relative_offset
        if relative_offset % alignment or offset + num_bytes > cursor.num_file_bytes:
            what = f"The tensor's data would end at byte {offset + num_bytes} of {cursor.num_file_bytes}"
            raise cursor.error(f"{what}, or starts off the alignment of {alignment}.", name)
        return GgufTensor(name, shape, type_name, offset, num_bytes)

    return {name: locate(name) for name in entries}


def _quantization_sizes() -> dict[int, tuple[str, int, int]]:
    """GGML type number -> its name, elements per block, bytes per block."""
    from gguf.constants import GGML_QUANT_SIZES

    return {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
