"""Kernels compute what their definitions say, at small shapes and without a GPU.

Triton decides at import whether it interprets or compiles, so ``interpreted_*.py`` run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent
REPOSITORY = FOLDER.parents[2]
MODULES = sorted(str(path) for path in FOLDER.glob("interpreted_*.py"))


def test_interpreted() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *MODULES]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
