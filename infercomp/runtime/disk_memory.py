"""Memory that lies on disk: weights wait there while a model is calibrated layer by layer, so that it need not fit.

Tensors are views of files that have no name any more, and so leave nothing behind, however the process ends. What is
used least recently leaves memory, and comes back page by page as it is read: whoever holds a tensor notices nothing.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from weakref import WeakValueDictionary

import torch

from .errors import ConfigError, FallbackWarning

_PAGE = mmap.ALLOCATIONGRANULARITY
# Smaller tensors stay where they are.
_FEWEST_BYTES = 1 << 16


class DiskMemory:
    """Files in ``folder`` of ``chunk_bytes`` or of one tensor, of which about ``resident_bytes`` are in memory.

    Where the disk is full, tensors stay in ordinary memory from then on, with a FallbackWarning. Raises ConfigError for
    a folder in which no file can be made.
    """

    def __init__(self, folder: Path, *, resident_bytes: int = 64 << 20, chunk_bytes: int = 256 << 20) -> None:
        self._folder = folder
        self._resident_bytes = resident_bytes
        self._chunk_bytes = chunk_bytes
        self._chunk: mmap.mmap | None = None
        self._used = 0
        self._is_full = not (hasattr(mmap, "MADV_DONTNEED") and hasattr(os, "posix_fallocate"))
        # By address: tensors come and go, and a chunk goes with the last of its own.
        self._chunks: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()
        self._recent: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            what = f"no file can be made in {folder}: {error.strerror}"
            raise ConfigError(what, remedy="name another folder, or None", field="offload_folder") from None

    def held(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same values in this memory; the tensor itself where it is small, strided, on a GPU, or here already."""
        with self._lock:
            if not self._takes(tensor):
                return tensor
            place = self._place(tensor.shape, tensor.dtype)
            if place is None:
                return tensor
            self._touch(place)
            return place.copy_(tensor.detach())

    def used(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, which is used now; others leave memory where there are too many."""
        with self._lock:
            if _address(tensor) in self._chunks:
                self._touch(tensor)
        return tensor

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cpu" and _address(tensor) in self._chunks

    def _takes(self, tensor: torch.Tensor) -> bool:
        is_plain = tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.nbytes >= _FEWEST_BYTES
        return is_plain and not self.holds(tensor)

    def _place(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor | None:
        num_bytes = shape.numel() * dtype.itemsize
        if not self._is_full and (self._chunk is None or self._used + num_bytes > len(self._chunk)):
            self._chunk, self._used = self._new_chunk(max(num_bytes, self._chunk_bytes)), 0
        if self._is_full or self._chunk is None:
            return None
        start, self._used = self._used, -(-(self._used + num_bytes) // _PAGE) * _PAGE
        place = torch.frombuffer(self._chunk, dtype=dtype, count=shape.numel(), offset=start).view(shape)
        self._chunks[_address(place)] = self._chunk
        return place

    def _new_chunk(self, num_bytes: int) -> mmap.mmap | None:
        try:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                # All of it at once: a disk that is full later on would end the process at a write to memory.
                os.posix_fallocate(file.fileno(), 0, num_bytes)
                return mmap.mmap(file.fileno(), num_bytes)
        except OSError as error:
            what = f"weights stay in memory: {self._folder} has no room for {num_bytes >> 20} MiB ({error.strerror})"
            warnings.warn(what, FallbackWarning, stacklevel=4)
            self._is_full = True
            return None

    def _touch(self, tensor: torch.Tensor) -> None:
        address = _address(tensor)
        self._recent[address] = tensor.untyped_storage().nbytes()
        self._recent.move_to_end(address)
        while len(self._recent) > 1 and sum(self._recent.values()) > self._resident_bytes:
            self._page_out(*self._recent.popitem(last=False))

    def _page_out(self, address: int, num_bytes: int) -> None:
        chunk = self._chunks.get(address)
        if chunk is not None:
            start = address - torch.frombuffer(chunk, dtype=torch.uint8).data_ptr()
            chunk.madvise(mmap.MADV_DONTNEED, start, num_bytes)


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class DiskWeights(MutableMapping[str, torch.Tensor]):
    """Weights by name whose values wait in ``memory``; one that is looked up is there until others are."""

    def __init__(self, memory: DiskMemory, weights: Mapping[str, torch.Tensor]) -> None:
        self._memory = memory
        self._tensors: dict[str, torch.Tensor] = {}
        # Names of one tensor stay names of one tensor.
        held: dict[object, torch.Tensor] = {}
        for name, tensor in weights.items():
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name
            held[key] = self._tensors[name] = held[key] if key in held else memory.held(tensor)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._memory.used(self._tensors[name])

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        self._tensors[name] = self._memory.held(tensor)

    def __delitem__(self, name: str) -> None:
        del self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def bring_in(self, names: Iterable[str]) -> None:
        """Move weights of these names, of those that there are, into ordinary memory."""
        for name in names:
            if name in self._tensors and self._memory.holds(self._tensors[name]):
                self._tensors[name] = self._tensors[name].clone()
