"""Memory for weights that every step streams: side by side in the order of their use, on large pages."""

from __future__ import annotations

import contextlib
import mmap

import torch

_LARGE_PAGE = 2 << 20
_ALIGNMENT = 64


class WeightMemory:
    """Chunks of memory that tensors move into, one after the other.

    A page of 2 MiB has one entry of the translation cache where 512 small ones have theirs, and hardware prefetching
    does not stop at its every 4 KiB. Where the system has no such pages on request, tensors stay where they are.
    """

    def __init__(self, chunk_bytes: int = 64 << 20) -> None:
        self._chunk_bytes = chunk_bytes
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def moved(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of ``tensor`` in this memory, which lives as long as one of its tensors does."""
        num_bytes = tensor.numel() * tensor.element_size()
        if not _has_large_pages() or tensor.device.type != "cpu" or num_bytes == 0:
            return tensor
        if self._used + num_bytes > self._chunk.numel():
            self._chunk, self._used = _new_chunk(max(num_bytes, self._chunk_bytes)), 0
        place = self._chunk[self._used : self._used + num_bytes].view(tensor.dtype).view(tensor.shape)
        self._used += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return place.copy_(tensor)


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
