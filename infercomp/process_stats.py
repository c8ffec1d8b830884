"""What this process has cost so far: seconds since it was started, and the most memory it held."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

_STATUS_FILE = Path("/proc/self/status")
_STAT_FILE = Path("/proc/self/stat")
_START_TIME_FIELD = 22  # of proc(5), counted from 1; the second field may hold spaces and ends with ")"
_imported_at_seconds = time.monotonic()


def seconds_since_start() -> float:
    """Seconds since the process was started; where the system does not say, since this module was imported."""
    try:
        fields_after_name = _STAT_FILE.read_text().rpartition(")")[2].split()
        start_ticks = int(fields_after_name[_START_TIME_FIELD - 3])
        now_seconds = time.clock_gettime(time.CLOCK_BOOTTIME)
    except (OSError, AttributeError):
        return time.monotonic() - _imported_at_seconds
    return now_seconds - start_ticks / os.sysconf("SC_CLK_TCK")


def peak_memory_bytes() -> int:
    """The most resident memory that this process held at any time."""
    # VmHWM belongs to this program alone; ru_maxrss keeps the size of a larger parent across exec.
    if _STATUS_FILE.exists():
        for line in _STATUS_FILE.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes
