"""torch's dtypes by name."""

from __future__ import annotations

import torch


def dtype_named(name: str) -> torch.dtype:
    """``"bfloat16"`` is ``torch.bfloat16``; raises ValueError for a name of no dtype."""
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype):
        raise ValueError(f"no dtype is called {name!r}")
    return found
