"""Tensors in weight memory: the same numbers, none over another, and alive as long as they are held."""

from __future__ import annotations

import mmap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infercomp.runtime.weight_memory import WeightMemory

DTYPES = (torch.uint8, torch.int8, torch.bfloat16, torch.float32)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 300), st.sampled_from(DTYPES)), max_size=12))
def test_all_tensors_stay_what_they_are(wanted: list[tuple[int, int, torch.dtype]]) -> None:
    memory = WeightMemory(chunk_bytes=100_000)
    tensors = [torch.randint(0, 100, (rows, columns)).to(dtype) for rows, columns, dtype in wanted]
    moved = [memory.empty(tensor.shape, tensor.dtype).copy_(tensor) for tensor in tensors]
    # What holds the memory is counted, and no cycle: it goes at once, if it goes.
    del memory
    for tensor, found in zip(tensors, moved, strict=True):
        assert found.is_contiguous() and found.dtype == tensor.dtype and torch.equal(found, tensor)
        assert found.numel() == 0 or found.data_ptr() % 64 == 0


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no large pages on request")
def test_tensors_lie_side_by_side() -> None:
    memory = WeightMemory()
    first, second = (memory.empty((1000, 64), torch.uint8) for _ in range(2))
    assert second.data_ptr() - first.data_ptr() == first.numel()
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
