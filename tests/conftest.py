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


@pytest.fixture(scope="module", autouse=True)
def small_heap() -> None:
    """Half a million objects of torch and transformers are no garbage: collecting, as every ``LLM`` does, skips them."""
    gc.collect()
    gc.freeze()
