"""Memory for weights that every step streams: side by side in the order of their use, on large pages."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Callable, Sequence

import torch

_LARGE_PAGE = 2 << 20
_ALIGNMENT = 64


Empty = Callable[[Sequence[int], torch.dtype], torch.Tensor]
"""Makes a contiguous tensor of this shape and dtype on the CPU, its values undefined."""


def anywhere(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Memory for a tensor of which nobody cares where it lies."""
    return torch.empty(shape, dtype=dtype)


class WeightMemory:
    """Chunks of memory in which tensors are made, one after the other.

    A page of 2 MiB has one entry of the translation cache where 512 small ones have theirs, and hardware prefetching
    does not stop at its every 4 KiB. Where the system has no such pages on request, tensors lie anywhere.
    """

    def __init__(self, chunk_bytes: int = 64 << 20) -> None:
        self._chunk_bytes = chunk_bytes
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor on the CPU, its values undefined; the memory lives as long as one of its tensors does."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if not _has_large_pages() or num_bytes == 0:
            return torch.empty(shape, dtype=dtype)
        if self._used + num_bytes > self._chunk.numel():
            self._chunk, self._used = _new_chunk(max(num_bytes, self._chunk_bytes)), 0
        place = self._chunk[self._used : self._used + num_bytes].view(dtype).view(*shape)
        self._used += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return place


def _has_large_pages() -> bool:
    return hasattr(mmap, "MADV_HUGEPAGE")


def _new_chunk(num_bytes: int) -> torch.Tensor:
    """At least so many bytes, from a multiple of a large page on; a page takes no memory until it is written."""
    memory = mmap.mmap(-1, num_bytes + 2 * _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A kernel without them says so, and has small pages.
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    bytes_ = torch.frombuffer(memory, dtype=torch.uint8)
    start = -bytes_.data_ptr() % _LARGE_PAGE
    return bytes_[start : start + -(-num_bytes // _LARGE_PAGE) * _LARGE_PAGE]
