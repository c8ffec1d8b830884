"""Where and with what a figure was measured."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_CPU_FILE = Path("/proc/cpuinfo")
_PACKAGES = ("infercomp", "torch", "transformers", "numpy")


def describe_run(arguments: list[str]) -> dict[str, Any]:
    """The command, the date, the commit where this is a git checkout, versions and machine."""
    cpu = _cpu()
    return {
        "command": " ".join(map(without_folder, arguments)),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "machine": {
            "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
            "cpu_flags": sorted((cpu.get("flags") or cpu.get("Features") or "").split()),
            "num_cores": os.cpu_count(),
            "memory_bytes": _memory_bytes(),
            "system": platform.platform(),
        },
    }


def without_folder(argument: str) -> str:
    """The last part of an absolute path, as figures are for others to read; anything else as it is."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def _cpu() -> dict[str, str]:
    """What the first core says of itself."""
    if not _CPU_FILE.exists():
        return {}
    first = _CPU_FILE.read_text().split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _memory_bytes() -> int | None:
    if sys.platform == "win32":
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that this file is in, with a plus where it was changed since."""
    here = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    is_ours = (here / ".git").exists()
    return done.stdout.strip() if is_ours else None
