"""Compilation without a GPU: what is told of a binary, and every way to fail. ``test_build`` compiles whole models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from codegen.triton.sampling_cases import SAMPLERS

from infercomp.codegen.triton import KernelCompileError, emit
from infercomp.codegen.triton.compile import compile_text
from infercomp.codegen.triton.resources import resources_of

REPOSITORY = Path(__file__).resolve().parents[3]
KERNEL = """
import triton
import triton.language as tl

KERNEL = "multiply_add"
ARGUMENTS = {{"b0": "*fp32:16", "b1": "*fp32:16"}}
NUM_WARPS = 4
NUM_STAGES = 2
ALLOWS_CONTRACTION = {contraction}


@triton.jit
def multiply_add(b0, b1):
    TILE: tl.constexpr = 256
    place = tl.arange(0, TILE)
    x = tl.load(b0 + place)
    tl.store(b1 + place, x * x + tl.sum(x))
"""


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_compile(name: str) -> None:
    compiled = compile_text(emit(SAMPLERS[name]), "cuda:90")
    assert compiled.binary[:4] == b"\x7fELF" and compiled.name == SAMPLERS[name].name
    assert 0 < compiled.resources.registers <= 255


def test_kernels_held_to_the_bit_contract_nothing() -> None:
    text = KERNEL.format(contraction=False)
    assert "fma." not in compile_text(text, "cuda:90").assembly
    assert "fma." in compile_text(KERNEL.format(contraction=True), "cuda:90").assembly


def test_text_that_is_not_triton_is_a_typed_error() -> None:
    text = KERNEL.format(contraction=True).replace("b0 + place", "no_such_name + place")
    with pytest.raises(KernelCompileError, match="no_such_name"):
        compile_text(text, "cuda:80")


@pytest.mark.parametrize("target", ["cuda", "cuda:x", "vulkan:1", ""])
def test_an_unknown_target_is_a_typed_error(target: str) -> None:
    with pytest.raises(KernelCompileError, match="no target"):
        compile_text(KERNEL.format(contraction=True), target)


def test_compiling_while_interpreting_is_a_typed_error() -> None:
    code = (
        "from infercomp.codegen.triton.compile import compile_text\n"
        "try: compile_text('', 'cuda:90')\n"
        "except Exception as error: print(type(error).__name__)"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "KernelCompileError"


def test_spills_are_seen() -> None:
    text = KERNEL.format(contraction=True).replace("constexpr = 256", "constexpr = 8192")
    text = text.replace("NUM_WARPS = 4", "NUM_WARPS = 1")
    assert compile_text(text, "cuda:80").resources.spill_bytes > 0


def test_a_binary_that_cannot_be_read_is_a_typed_error() -> None:
    with pytest.raises(KernelCompileError, match="cuobjdump"):
        resources_of("cuda:90", b"not a cubin", "")
    with pytest.raises(KernelCompileError, match="registers"):
        resources_of("hip:gfx942", b"", "no counts")
