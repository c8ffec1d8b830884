"""Reading bytes of weight files into memory we own: no memory map, so a file that shrinks is an error, not a crash."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

from infercomp.runtime.errors import ModelLoadError

CHUNK_BYTES = 1 << 20
Place = Callable[[torch.Tensor], torch.Tensor]
"""Takes a tensor that was read, and returns its values in memory that somebody has chosen."""


def as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def open_weight_file(path: Path) -> tuple[BinaryIO, int]:
    """The file opened for reading, and its size in bytes."""
    try:
        stream = path.open("rb")
    except OSError as error:
        raise ModelLoadError(
            f"The weight file cannot be opened: {error.strerror}.",
            where=str(path),
            remedy="check that the file exists and may be read",
        ) from error
    return stream, os.fstat(stream.fileno()).st_size


def read_fully(stream: BinaryIO, offset: int, buffer: memoryview, where: str) -> None:
    """Fills ``buffer`` with the bytes at ``offset``, or raises a ModelLoadError that names ``where``."""
    stream.seek(offset)
    num_bytes_done = 0
    while num_bytes_done < len(buffer):
        num_bytes = stream.readinto(buffer[num_bytes_done:])  # type: ignore[attr-defined]
        if not num_bytes:
            raise ModelLoadError(
                f"The file ends {len(buffer) - num_bytes_done} bytes too early.",
                where=where,
                remedy="copy or download the file again; it is truncated or was changed while being read",
            )
        num_bytes_done += num_bytes
