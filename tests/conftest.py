"""Settings for all tests: Hypothesis has no deadline, as graphs are captured and machines are shared."""

from __future__ import annotations

import logging

from hypothesis import HealthCheck, settings

settings.register_profile("infercomp", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("infercomp")

# torch writes a line a tensor here, which pytest would collect and print with every failure.
logging.getLogger("torch.__trace").propagate = False
