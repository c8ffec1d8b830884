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
from codegen.triton.representative_specs import EVERY, GOLDEN, MATMULS, PAGED

from infercomp.codegen.triton import KernelSpecError, emit, fragments
from infercomp.codegen.triton.specs import KernelSpec, MatmulSpec, Origin, PagedAttentionSpec
from infercomp.codegen.triton.template import fill

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


def test_layers_that_differ_in_origin_share_a_kernel() -> None:
    spec = MATMULS["matmul"]
    other = replace(spec, origin=Origin(op="infercomp::linear", nodes=("linear_11",)))
    assert other == spec and hash(other) == hash(spec)
    assert "linear_11" in emit(other) and "modeling_llama.py:233" in emit(spec)


def test_emission_needs_neither_triton_nor_torch() -> None:
    code = (
        "import sys, infercomp.codegen.triton.emit, infercomp.codegen.triton.fragments;"
        "print([name for name in ('triton', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_hole_without_text_and_a_text_without_hole_are_errors() -> None:
    with pytest.raises(KeyError, match="other"):
        fill("{{one}}\n", {"other": "1"})


PLAIN = {"input_dtype": "fp16", "output_dtype": "fp16", "num_columns": 64, "num_inner": 64}
HEADS = {"dtype": "fp16", "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "scale": 1.0, "block_size": 16}


@pytest.mark.parametrize(
    ("field", "make"),
    [
        ("input_dtype", lambda: MatmulSpec(**{**PLAIN, "input_dtype": "fp64"})),
        ("tile_rows", lambda: MatmulSpec(**PLAIN, tile_rows=24)),
        ("group_size", lambda: MatmulSpec(**PLAIN, weight_format="u4", group_size=48)),
        ("weight_format", lambda: MatmulSpec(**{**PLAIN, "input_dtype": "i8"})),
        ("use_descriptors", lambda: MatmulSpec(**{**PLAIN, "num_inner": 65}, use_descriptors=True)),
        ("is_single_row", lambda: MatmulSpec(**PLAIN, is_single_row=True, tile_rows=1, num_splits=2)),
        ("num_kv_heads", lambda: PagedAttentionSpec(**{**HEADS, "num_heads": 5})),
        ("sliding_window", lambda: PagedAttentionSpec(**HEADS, sliding_window=0)),
        ("chunk_keys", lambda: PagedAttentionSpec(**HEADS, chunk_keys=100)),
        ("max_query_tokens", lambda: PagedAttentionSpec(**HEADS, chunk_keys=64, tile_rows=16, max_query_tokens=9)),
        ("chunk_keys", lambda: PAGED["paged_prefill"].combine()),
        ("activation", lambda: fragments.activation("tanhshrink")),
    ],
)
def test_what_a_family_cannot_do_is_said_with_the_field(field: str, make: object) -> None:
    assert callable(make)
    with pytest.raises(KernelSpecError) as caught:
        make()
    assert caught.value.field == field


def test_specs_name_their_fields_in_the_header() -> None:
    spec: KernelSpec = MATMULS["matmul_w4"]
    assert "#   group_size = 128" in emit(spec) and "is_gated" not in emit(spec)
