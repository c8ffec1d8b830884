"""Settings for all tests: Hypothesis has no deadline, as graphs are captured and machines are shared.

Tests that are not about kernels run definitions, as hundreds of small models would wait for the C++
compiler; those of kernels say ``codegen="cpp"``, and test_default_codegen.py what happens by default.
"""

from __future__ import annotations

import gc
import logging
import os

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("infercomp", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("infercomp")

os.environ.setdefault("INFERCOMP_CODEGEN", "reference")

# torch writes a line a tensor here, which pytest would collect and print with every failure.
logging.getLogger("torch.__trace").propagate = False

# Each takes half a minute and more: begun last, one would leave a second process with nothing to do.
BEGIN_FIRST = frozenset(
    f"test_{name}.py"
    for name in (
        "artifact", "backend", "bench", "caches", "cli", "families_compile", "families_llm", "gemm", "gguf_loader",
        "interchange", "interpreted", "kernel_prefetch", "kernels", "kernels_llm", "offload", "quantize_linears",
        "recognize_attention", "smollm2", "smooth_activations",
    )
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in BEGIN_FIRST)


@pytest.fixture(scope="module", autouse=True)
def small_heap() -> None:
    """Collecting, as every ``LLM`` does, skips half a million objects of torch and what earlier files left behind."""
    gc.collect()
    gc.freeze()
