"""The systems that infercomp is compared with: what they need, and their nearest form of the same bits a weight."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from infercomp.passes.config import nearest_name
from infercomp.runtime.errors import BenchmarkError

_WORKERS = "infercomp.bench.workers"


@dataclass(frozen=True)
class Peer:
    """``packages`` maps what must be importable to the package that has it.

    ``forms`` maps bits a weight (32, 16, 8, 4) to what is measured. ``is_gguf``: it reads a file that is
    written for it, and may run in a Python of its own; others load the model as infercomp does.
    """

    name: str
    module: str
    packages: Mapping[str, str]
    forms: Mapping[int, str]
    is_gguf: bool = False


# PyTorch has no quantised linear of its own that a model would run on unchanged: bfloat16 is its nearest form.
_TORCH_FORMS = {32: "float32", 16: "bfloat16", 8: "bfloat16", 4: "bfloat16"}
PEERS = {
    peer.name: peer
    for peer in (
        Peer("eager", f"{_WORKERS}.eager_worker", {"transformers": "transformers"}, _TORCH_FORMS),
        Peer("inductor", f"{_WORKERS}.inductor_worker", {"transformers": "transformers"}, _TORCH_FORMS),
        Peer(
            "llama.cpp",
            f"{_WORKERS}.llama_cpp_worker",
            {"llama_cpp": "llama-cpp-python", "numpy": "numpy"},
            {32: "F32", 16: "BF16", 8: "Q8_0", 4: "Q4_0"},
            is_gguf=True,
        ),
        Peer(
            "openvino",
            f"{_WORKERS}.openvino_worker",
            {"openvino_genai": "openvino-genai", "numpy": "numpy"},
            {32: "F16", 16: "F16", 8: "Q8_0", 4: "Q4_0"},
            is_gguf=True,
        ),
    )
}


def chosen_peers(text: str, peer_python: str) -> list[Peer]:
    """The peers named in ``"llama.cpp,eager"``, each found to be installed.

    Raises BenchmarkError for a name that is none and for a package that ``peer_python`` lacks.
    """
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in names:
        if name not in PEERS:
            remedy = f"did you mean {nearest_name(name, PEERS)!r}? valid: {', '.join(PEERS)}"
            raise BenchmarkError(f"there is no peer {name!r}", remedy=remedy, field="vs")
    peers = [PEERS[name] for name in names]
    for peer in peers:
        _require_installed(peer, python_of(peer, peer_python))
    return peers


def python_of(peer: Peer, peer_python: str) -> str:
    return peer_python if peer.is_gguf else sys.executable


def _require_installed(peer: Peer, python: str) -> None:
    missing = _missing(tuple(peer.packages), python)
    if missing:
        packages = " ".join(peer.packages[name] for name in missing)
        raise BenchmarkError(
            f"the peer {peer.name} needs {packages}, which this Python does not have",
            where=python,
            remedy=f"{python} -m pip install {packages}, or name another Python by --peer-python",
            field="vs",
        )


def _missing(modules: Sequence[str], python: str) -> list[str]:
    """Those of ``modules`` that ``python`` cannot import, found without importing them."""
    code = "import importlib.util, sys; print(*[m for m in sys.argv[1:] if importlib.util.find_spec(m) is None])"
    try:
        done = subprocess.run([python, "-c", code, *modules], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BenchmarkError(
            f"the Python of the peers cannot be run: {error}", where=python, remedy="name one that exists",
            field="peer_python",
        ) from None  # fmt: skip
    return done.stdout.split()
