"""Kernels and decoding on a GPU next to Inductor, cuBLAS and SDPA, at the shapes of three models with random weights.

Every figure is taken in the run that checks the output it belongs to; a wrong output is an error, and its
figure is left out. GPU times are of CUDA graphs, so that nobody's launches from Python are measured.

    python benchmarks/gpu.py --output results
    python benchmarks/gpu.py --dry-run        # tiny shapes, Triton's interpreter, no GPU: does it run?
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "transformers")


def environment(device: str) -> dict[str, Any]:
    """What a figure depends on besides the code."""
    import torch

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    found: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit or None,
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "device": "Triton's interpreter: no time below means anything",
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for gpu.json")
    parser.add_argument("--models", nargs="*", help="names of shapes; all if not given")
    parser.add_argument("--layers", type=int, help="layers of each model; its own number if not given")
    parser.add_argument("--skip-inductor", action="store_true", help="max-autotune takes minutes a model")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, by Triton's interpreter")
    arguments = parser.parse_args()
    if arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    import torch
    from gpu_cases import TINY, decode_cases, kernel_cases, shapes

    if not arguments.dry_run and not torch.cuda.is_available():
        raise SystemExit("there is no GPU; --dry-run tries the program without one")
    device = "cpu" if arguments.dry_run else "cuda"
    chosen = TINY if arguments.dry_run else shapes(arguments.models, arguments.layers)
    result: dict[str, Any] = environment(device) | {"kernels": [], "decode": []}
    with_inductor = not arguments.dry_run and not arguments.skip_inductor
    num_wrong = 0
    for name, config in chosen.items():
        for section, cases in (("kernels", kernel_cases), ("decode", decode_cases)):
            for case in cases(name, config, device, with_inductor):
                num_wrong += not case["is_right"]
                result[section].append(case)
                print(json.dumps(case), flush=True)
                _write(arguments.output, result)
    if num_wrong:
        raise SystemExit(f"{num_wrong} outputs are wrong; their figures are left out")


def _write(folder: Path | None, result: dict[str, Any]) -> None:
    """After every case, so that a run that is cut off leaves what it has."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
