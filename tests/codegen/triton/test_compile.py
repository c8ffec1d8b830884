"""Every kernel compiles for every chip without a GPU, and those that matter most spill no register.

The usual run compiles each family for cuda:90 and the widest path for the other chips; ``-m slow`` the rest.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from codegen.triton.representative_specs import DENSE, EVERY, MATMULS, NORMS, PAGED, SECOND_STAGES

from infercomp.codegen.triton import KernelCompileError, emit
from infercomp.codegen.triton.candidates import candidates
from infercomp.codegen.triton.chip import chip_of
from infercomp.codegen.triton.compile import TARGETS, compile_text
from infercomp.codegen.triton.cost import fits
from infercomp.codegen.triton.resources import resources_of

REPOSITORY = Path(__file__).resolve().parents[3]
WIDEST_PATH = ("matmul", "matmul_w4", "paged_prefill", "paged_decode", "paged_combine", "add_rms_norm_int8", "write_kv")
EACH_FAMILY = (
    *WIDEST_PATH,
    *("matmul_fp32", "matmul_descriptors", "matmul_gated", "matmul_split", "matmul_int8", "gemv", "matmul_reduce"),
    *("attention", "quantize", "gated_activation", "rotary_write_kv", "sample_greedy", "sample_inverse_cdf"),
)
MUST_NOT_SPILL = {*MATMULS, *PAGED, *DENSE, *NORMS, *SECOND_STAGES}


def check_compiles(name: str, target: str) -> None:
    chip = chip_of(target)
    assert chip is not None
    spec = EVERY[name] if fits(EVERY[name], chip) else candidates(EVERY[name], chip, 512, 4096)[0]
    compiled = compile_text(emit(spec), target)
    resources = compiled.resources
    print(f"{name} {target}: {resources}, {compiled.shared_bytes} B shared")
    assert compiled.binary[:4] == b"\x7fELF" and compiled.name == EVERY[name].name
    assert 0 < resources.registers <= 512
    assert compiled.shared_bytes <= chip.shared_bytes_per_program
    if target == "cuda:90" and name in MUST_NOT_SPILL:
        assert resources.spill_bytes == 0


USUAL = [
    *((name, "cuda:90") for name in EACH_FAMILY),
    *((n, t) for n in WIDEST_PATH for t in TARGETS if t != "cuda:90"),
]
REST = [(name, target) for name in EVERY for target in TARGETS if (name, target) not in USUAL]


@pytest.mark.parametrize(("name", "target"), USUAL)
def test_each_family_compiles(name: str, target: str) -> None:
    check_compiles(name, target)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "target"), REST)
def test_all_forms_compile_for_all_chips(name: str, target: str) -> None:
    check_compiles(name, target)


@pytest.mark.parametrize(
    ("name", "instruction"),
    [
        ("matmul", "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16"),
        ("matmul_int8", "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8"),
        ("matmul_descriptors", "cp.async.bulk.tensor"),
        ("paged_prefill", "wgmma.mma_async"),
    ],
)
def test_matrix_instructions_are_used(name: str, instruction: str) -> None:
    assert instruction in compile_text(emit(EVERY[name]), "cuda:90").assembly


def test_float32_products_keep_their_digits() -> None:
    exact = compile_text(emit(MATMULS["matmul_fp32"]), "cuda:90").assembly
    assert "tf32" not in exact and "fma.rn.f32" in exact
    assert "tf32" in compile_text(emit(MATMULS["matmul_tf32"]), "cuda:80").assembly


def test_kernels_held_to_the_bit_contract_nothing() -> None:
    for name in ("quantize", "matmul_int8"):
        assert "fma." not in compile_text(emit(EVERY[name]), "cuda:90").assembly
    assert "fma." in compile_text(emit(EVERY["attention"]), "cuda:90").assembly


def test_kernels_use_no_atomics() -> None:
    for name in ("matmul_split", "matmul_reduce", "paged_decode", "paged_combine"):
        assert "atom." not in compile_text(emit(EVERY[name]), "cuda:90").assembly


def test_tiles_that_need_too_much_shared_memory_are_a_typed_error() -> None:
    spec = replace(MATMULS["matmul_split"], tile_inner=256, num_stages=4)
    with pytest.raises(KernelCompileError, match="bytes of shared memory") as caught:
        compile_text(emit(spec), "hip:gfx942")
    assert caught.value.target == "hip:gfx942" and caught.value.remedy


def test_text_that_is_not_triton_is_a_typed_error() -> None:
    text = emit(EVERY["write_kv"]).replace("slot_mapping + token", "no_such_name + token")
    with pytest.raises(KernelCompileError, match="no_such_name"):
        compile_text(text, "cuda:80")


@pytest.mark.parametrize("target", ["cuda", "cuda:x", "vulkan:1", ""])
def test_an_unknown_target_is_a_typed_error(target: str) -> None:
    with pytest.raises(KernelCompileError, match="no target"):
        compile_text(emit(EVERY["write_kv"]), target)


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
    spec = replace(MATMULS["gemv"], tile_columns=32, tile_inner=1024)
    assert compile_text(emit(spec), "cuda:80").resources.spill_bytes > 0


def test_a_binary_that_cannot_be_read_is_a_typed_error() -> None:
    with pytest.raises(KernelCompileError, match="cuobjdump"):
        resources_of("cuda:90", b"not a cubin", "")
    with pytest.raises(KernelCompileError, match="registers"):
        resources_of("hip:gfx942", b"", "no counts")
