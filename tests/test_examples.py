"""Every example runs, as its reader would run it."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch._dynamo

from infercomp.demo_model import demo_model_path
from infercomp.runtime.errors import ModelLoadError

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# It declares an op for the whole process: other tests must not find it in the vocabulary.
OWN_PROCESS = "add_an_op"
IN_PROCESS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != OWN_PROCESS)
ARGUMENTS = {"generate": {"want_demo_model": False}}


@pytest.mark.parametrize("name", IN_PROCESS)
def test_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch._dynamo.reset()
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](**ARGUMENTS.get(name, {}))
    assert capsys.readouterr().out


def test_example_that_adds_an_op() -> None:
    command = [sys.executable, str(EXAMPLES / f"{OWN_PROCESS}.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "recognize_squared_relu: 1 match" in done.stdout


@pytest.mark.slow
def test_generate_with_the_demo_model(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        demo_model_path()
    except ModelLoadError as error:
        pytest.skip(str(error))
    runpy.run_path(str(EXAMPLES / "generate.py"))["main"]()
    assert "Paris" in capsys.readouterr().out
