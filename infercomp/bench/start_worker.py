"""Runs a module of infercomp in a Python that need not have infercomp: the package alone is made importable.

    python start_worker.py infercomp.bench.workers.llama_cpp

Nothing else of infercomp's environment is, so a peer meets its own versions of everything.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path


def main() -> None:
    package = Path(__file__).resolve().parents[1]
    spec = importlib.util.spec_from_file_location(
        package.name, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec is not None and spec.loader is not None
    module = sys.modules[package.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # The folder of this file must not hide packages of the same names as its files.
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]
    runpy.run_module(sys.argv[1], run_name="__main__")


if __name__ == "__main__":
    main()
