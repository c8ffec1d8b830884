"""Memory that costs nothing until it is written to."""

from __future__ import annotations

import math
import mmap

import torch


def untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros on the CPU whose pages the system provides one by one as they are written to."""
    num_elements = math.prod(shape)
    if num_elements == 0:
        return torch.zeros(shape, dtype=dtype)
    pages = mmap.mmap(-1, num_elements * dtype.itemsize)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
