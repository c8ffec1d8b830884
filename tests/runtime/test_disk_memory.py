"""Weights that wait on disk: the same numbers, little of them in memory, and nothing left behind."""

from __future__ import annotations

import resource
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infercomp.runtime.disk_memory import DiskMemory, DiskWeights
from infercomp.runtime.errors import ConfigError, FallbackWarning

MEBIBYTE = 1 << 20
DTYPES = (torch.uint8, torch.bfloat16, torch.float32)


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Files cannot grow beyond so many bytes: what a full disk is like."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.tuples(st.integers(0, 400), st.integers(1, 400), st.sampled_from(DTYPES)), max_size=10),
    resident_bytes=st.sampled_from([1, 300_000, MEBIBYTE]),
    chunk_bytes=st.sampled_from([1, 500_000, MEBIBYTE]),
    seed=st.integers(0, 99),
)
def test_values_survive(
    tmp_path: Path, sizes: list[tuple[int, int, torch.dtype]], resident_bytes: int, chunk_bytes: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    memory = DiskMemory(tmp_path, resident_bytes=resident_bytes, chunk_bytes=chunk_bytes)
    tensors = [torch.randint(0, 100, (rows, columns), generator=generator).to(dtype) for rows, columns, dtype in sizes]
    weights = DiskWeights(memory, {str(number): tensor for number, tensor in enumerate(tensors)})
    for number, tensor in enumerate(tensors):
        if number % 2:
            weights[str(number)] = tensors[number] = tensor.flip(0).contiguous()
    # What holds the memory is counted: it lives as long as the tensors.
    held = dict(weights)
    del memory, weights
    for number, tensor in enumerate(tensors):
        found = held[str(number)]
        assert found.dtype == tensor.dtype and found.shape == tensor.shape and torch.equal(found, tensor)
    assert list(tmp_path.iterdir()) == []


def test_little_is_in_memory(tmp_path: Path) -> None:
    memory = DiskMemory(tmp_path, resident_bytes=8 * MEBIBYTE)
    process = psutil.Process()
    before = process.memory_info().rss
    weights, value = DiskWeights(memory, {}), torch.empty(MEBIBYTE)
    for number in range(100):
        weights[str(number)] = value.fill_(number)
    after = process.memory_info().rss
    assert all(int(weights[str(number)][-1]) == number for number in range(100))
    assert max(after, process.memory_info().rss) - before < 50 * MEBIBYTE, "of 400 MiB"


def test_names_of_one_tensor_stay_so(tmp_path: Path) -> None:
    """And what is the same memory in another shape is no longer, as it would be if it were replaced."""
    tied = torch.ones(300, 300)
    weights = DiskWeights(DiskMemory(tmp_path), {"head": tied, "table": tied.detach(), "turned": tied.t()})
    assert weights["head"].data_ptr() == weights["table"].data_ptr() != tied.data_ptr()
    assert weights["turned"].stride() == (1, 300)


def test_what_stays_where_it_is(tmp_path: Path) -> None:
    memory = DiskMemory(tmp_path)
    small, strided, large = torch.ones(100), torch.ones(400, 400).t(), torch.ones(400, 400)
    assert memory.held(small) is small and memory.held(strided) is strided
    held = memory.held(large)
    assert memory.holds(held) and not memory.holds(large) and memory.held(held) is held


def test_weights_are_brought_in(tmp_path: Path) -> None:
    memory = DiskMemory(tmp_path)
    weights = DiskWeights(memory, {"kept": torch.ones(400, 400), "other": torch.ones(400, 400)})
    weights.bring_in(["kept", "nowhere"])
    assert not memory.holds(weights["kept"]) and memory.holds(weights["other"])
    assert torch.equal(weights["kept"], weights.pop("other")) and list(weights) == ["kept"]


def test_a_full_disk_is_said_once(tmp_path: Path) -> None:
    memory = DiskMemory(tmp_path, chunk_bytes=MEBIBYTE)
    first = memory.held(torch.ones(400, 400))
    with largest_file(1000), pytest.warns(FallbackWarning, match="has no room for 2 MiB"):
        second = memory.held(torch.ones(800, 800))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        third = memory.held(torch.ones(800, 800))
    assert [memory.holds(each) for each in (first, second, third)] == [True, False, False]


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="no file can be made") as caught:
        DiskMemory(tmp_path / "file")
    assert caught.value.field == "offload_folder" and caught.value.remedy
