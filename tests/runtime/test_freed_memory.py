"""Memory that glibc keeps below a live block goes back to the system."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest
import torch

from infercomp.runtime import freed_memory
from infercomp.runtime.freed_memory import return_freed_memory

_MIB = 1 << 20


def resident_bytes() -> int:
    fields = Path("/proc/self/status").read_text().split()
    return int(fields[fields.index("VmRSS:") + 1]) << 10


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_freed_blocks_below_live_ones_are_returned() -> None:
    # Of a size that malloc takes from its heap, each followed by one that stays.
    blocks, kept = [], []
    for _ in range(2000):
        blocks.append(torch.ones(_MIB // 16 // 4))
        kept.append(torch.ones(64))
    full = resident_bytes()
    del blocks
    return_freed_memory()
    assert full - resident_bytes() > 100 * _MIB
    assert all(bool((each == 1).all()) for each in kept)


def test_a_library_without_the_call_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freed_memory, "_malloc_trim", lambda: None)
    return_freed_memory()
