"""Emission is pure: the same spec gives the same text, and the text changes only when somebody means it to."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from codegen.triton.sampling_cases import SAMPLERS as EVERY

from infercomp.codegen.triton import KernelSpecError, emit
from infercomp.codegen.triton.specs import SamplingSpec
from infercomp.codegen.triton.template import fill

GOLDEN = ("sample_inverse_cdf",)

FOLDER = Path(__file__).parent / "golden"
REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("name", GOLDEN)
def test_text_is_the_accepted_one(name: str) -> None:
    path, text = FOLDER / f"{name}.py.txt", emit(EVERY[name])
    if os.environ.get("INFERCOMP_ACCEPT_GOLDEN") == "1":
        path.write_text(text)
    assert path.read_text() == text, "set INFERCOMP_ACCEPT_GOLDEN=1 to accept the new text"


def test_no_golden_file_is_left_over() -> None:
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(f"{name}.py.txt" for name in GOLDEN)


@pytest.mark.parametrize("name", EVERY)
def test_a_text_is_one_kernel_with_its_arguments(name: str) -> None:
    spec = EVERY[name]
    text = emit(spec)
    assert "{{" not in text and all(line == line.rstrip() for line in text.splitlines())
    functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    assert [function.name for function in functions] == [spec.name]
    assert [argument.arg for argument in functions[0].args.args] == [each.name for each in spec.arguments()]


@pytest.mark.parametrize("name", EVERY)
def test_every_named_constant_is_used(name: str) -> None:
    lines = emit(EVERY[name]).splitlines()
    names = [line.split(":")[0].strip() for line in lines if ": tl.constexpr = " in line]
    words = set(re.findall(r"\w+", "\n".join(line for line in lines if ": tl.constexpr = " not in line)))
    assert set(names) <= words


@pytest.mark.parametrize("name", EVERY)
def test_equal_specs_give_equal_texts(name: str) -> None:
    spec = EVERY[name]
    again = replace(spec, **{each.name: getattr(spec, each.name) for each in fields(spec)})
    assert hash(again) == hash(spec) and emit(again) == emit(spec)


def test_emission_needs_neither_triton_nor_torch() -> None:
    code = (
        "import sys, infercomp.codegen.triton.emit;print([name for name in ('triton', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_hole_without_text_and_a_text_without_hole_are_errors() -> None:
    with pytest.raises(KeyError, match="other"):
        fill("{{one}}\n", {"other": "1"})


@pytest.mark.parametrize(
    ("field", "changes"),
    [("logits_dtype", {"logits_dtype": "fp64"}), ("method", {"method": "beam"}), ("tile_tokens", {"tile_tokens": 24})],
)
def test_what_a_sampler_cannot_do_is_said_with_the_field(field: str, changes: dict[str, object]) -> None:
    with pytest.raises(KernelSpecError) as caught:
        SamplingSpec(**{"logits_dtype": "fp32", "vocabulary_size": 30, **changes})
    assert caught.value.field == field


def test_kernels_of_specs_are_emitted_without_triton() -> None:
    code = (
        "import sys, sympy, torch\n"
        "from infercomp.codegen.indexing import LoopVariable\n"
        "from infercomp.codegen.scalar import load, unary\n"
        "from infercomp.codegen.specs import Buffer, LoopSpec, Store\n"
        "from infercomp.codegen.triton.emit_specs import emit_spec\n"
        "row = LoopVariable('r', sympy.Symbol('n0', integer=True, positive=True))\n"
        "column = LoopVariable('c', sympy.Integer(5))\n"
        "buffers = (Buffer('b0', torch.float32), Buffer('b1', torch.float32, True))\n"
        "value = unary('neg', load('b0', row * 5 + column, torch.float32))\n"
        "spec = LoopSpec(buffers, row, (Store('b1', column, row * 5 + column, value),))\n"
        "(one,), (other,) = emit_spec(spec, 'negate').launches, emit_spec(spec, 'negate').launches\n"
        "assert one == other and 'def negate(b0, b1, errors, n0)' in one.text and one.grid[0] == '-(-n0 // 256)'\n"
        "print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
