"""What a worker answers: one JSON object a line, a command on standard input and its reply on standard output.

Needs the standard library only, so that a peer's own Python can run it. Between commands a worker waits
for its input and computes nothing; when its input is closed, it ends.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from infercomp.process_stats import peak_memory_bytes

Tokens = Sequence[int]


class Side(Protocol):
    """One system under measurement, in a process of its own. Times are seconds; sampling is greedy.

    ``load`` takes what `Session.load` sends and returns facts worth keeping (versions, the form of the weights).
    """

    @property
    def load(self) -> Callable[..., dict[str, Any]]: ...

    def prefill(self, tokens: Tokens) -> float:
        """Compute a prompt up to its first new token, with nothing cached before."""

    def decode(self, prompts: Sequence[Tokens], num_steps: int) -> tuple[float, list[list[int]]]:
        """Compute the prompts, then time ``num_steps`` steps of all sequences together.

        Returns the time of the steps and ``num_steps + 1`` new tokens of each sequence; none ends before.
        """


class Stopwatch:
    seconds = 0.0


@contextmanager
def stopwatch() -> Iterator[Stopwatch]:
    """The seconds of the block, once it is left."""
    watch = Stopwatch()
    start = time.perf_counter()
    yield watch
    watch.seconds = time.perf_counter() - start


def commands_of(side: Side) -> dict[str, Callable[..., Any]]:
    """The commands that every side answers."""
    return {
        "load": side.load,
        "prefill": lambda **given: {"seconds": side.prefill(**given)},
        "decode": lambda **given: dict(zip(("seconds", "tokens"), side.decode(**given), strict=True)),
    }


def serve(commands: Mapping[str, Callable[..., Any]]) -> None:
    """Answer commands until the input ends."""
    replies = _private_output()
    for line in sys.stdin:
        request = json.loads(line)
        reply = _reply(commands[request.pop("command")], request)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _private_output() -> Any:
    """Standard output for replies alone: what libraries print goes to standard error."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies


def _reply(command: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    from infercomp.runtime.errors import InfercompError

    try:
        return {"result": command(**arguments), "peak_memory_bytes": peak_memory_bytes()}
    except InfercompError as error:
        parts = {name: getattr(error, name) for name in ("what", "where", "remedy", "field")}
        return {"error": {"type": type(error).__name__, **parts}}
    except Exception as error:  # whatever a peer raises belongs into the report of the process that asked
        import traceback

        traceback.print_exc()
        return {"error": {"type": type(error).__name__, "what": f"{type(error).__name__}: {error}"}}
