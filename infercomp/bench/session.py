"""Worker processes, seen from the one that asks: started, asked one thing at a time, and ended whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from infercomp.runtime.errors import (
    BenchmarkError,
    BuildError,
    CaptureError,
    ConfigError,
    InfercompError,
    InputError,
    ModelLoadError,
    UnsupportedError,
)

_START = Path(__file__).with_name("start_worker.py")
_LINES_OF_STDERR = 8
_ERRORS: dict[str, type[InfercompError]] = {
    kind.__name__: kind
    for kind in (BenchmarkError, BuildError, CaptureError, ConfigError, InputError, ModelLoadError, UnsupportedError)
}


class Worker:
    """A process that answers commands; leaving the ``with`` block ends it and all that it started.

    ``module`` is run by ``python``, which need not have infercomp installed; what it writes to standard
    error goes to a file in ``folder`` and is shown if it fails.
    """

    def __init__(self, name: str, module: str, folder: Path, python: str = sys.executable) -> None:
        self.name = name
        self.peak_memory_bytes = 0
        self._log = folder / f"{name}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [python, str(_START), module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                # Its own session: Ctrl-C reaches the one who asks, who then ends the whole group.
                start_new_session=True,
            )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def ask(self, command: str, **arguments: Any) -> Any:
        """The result of a command. Raises what an error of infercomp was there, and BenchmarkError for any other."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise self._failure(f"the process of {self.name} ended at {command!r}")
        reply = json.loads(line)
        if "error" in reply:
            raise self._error(reply["error"], command)
        self.peak_memory_bytes = reply["peak_memory_bytes"]
        return reply["result"]

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()

    def _error(self, error: dict[str, Any], command: str) -> InfercompError:
        """The error as it was raised there, if it is one that ``what``, ``where``, ``remedy`` and ``field`` make."""
        kind = _ERRORS.get(error.pop("type"))
        if kind is None:
            return self._failure(f"{self.name} failed at {command!r}: {error['what']}")
        return kind(error.pop("what"), **error)

    def _failure(self, what: str) -> BenchmarkError:
        lines = self._log.read_text(errors="replace").strip().splitlines()[-_LINES_OF_STDERR:]
        return BenchmarkError("\n    ".join([what, *lines]), where=self.name)
