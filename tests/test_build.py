"""``infercomp build``: every kernel of a model as a binary for a GPU that is not here, and a manifest of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli import run, save_tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("triton")

from infercomp.build import Build, build_kernels
from infercomp.codegen.triton.compile import compile_text
from infercomp.config import parse_options
from infercomp.runtime.errors import BuildError, ConfigError, InfercompError

# Widths of a small Llama, so that products are split and heads are 64 wide; few tokens, as none is read.
CONFIG = LlamaConfig(
    hidden_size=1024, intermediate_size=2048, num_hidden_layers=1, num_attention_heads=16, num_key_value_heads=4,
    vocab_size=128, max_position_embeddings=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM(CONFIG).bfloat16().eval()


OTHERS = [pytest.param(target, marks=pytest.mark.slow) for target in ("cuda:80", "cuda:100", "hip:gfx942")]


@pytest.fixture(scope="module", params=["cuda:90", *OTHERS])
def built(request: pytest.FixtureRequest, model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Build:
    return build_kernels(model, request.param, tmp_path_factory.mktemp("built"), parse_options({}))


def test_every_kernel_is_written_and_none_spills_on_the_default_target(built: Build) -> None:
    assert not built.elsewhere
    for kernel in built.kernels:
        assert (built.folder / kernel.binary).read_bytes()[:4] == b"\x7fELF"
        assert kernel.name in (built.folder / kernel.text).read_text()
        assert kernel.registers > 0
        assert kernel.spill_bytes == 0 or built.target != "cuda:90", kernel
    kinds = {kernel.name.split("_")[0] + "_" + kernel.name.split("_")[-1] for kernel in built.kernels}
    assert {"paged_prefill", "paged_decode", "paged_join", "matmul_partial", "matmul_reduce", "matmul_many"} <= kinds


def test_the_manifest_says_what_was_built(built: Build) -> None:
    manifest = json.loads((built.folder / "manifest.json").read_text())
    assert manifest["target"] == built.target and len(manifest["kernels"]) == len(built.kernels)
    assert {"name", "ops", "binary", "grid", "registers", "spill_bytes", "shared_bytes"} <= set(manifest["kernels"][0])


def test_matrix_instructions_and_no_atomics(built: Build) -> None:
    if built.target != "cuda:90":
        pytest.skip("the names of instructions differ")
    for kernel in built.kernels:
        if not kernel.name.startswith(("matmul", "paged")):
            continue
        assembly = compile_text((built.folder / kernel.text).read_text(), "cuda:90").assembly
        assert "atom." not in assembly
        assert ("wgmma.mma_async" in assembly) != kernel.name.endswith(("_reduce", "_join")), kernel.name


@pytest.mark.slow
def test_float32_products_keep_their_digits(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(**{**CONFIG.to_diff_dict(), **sizes})).eval()
    built = build_kernels(model, "cuda:80", tmp_path, parse_options({}))
    for kernel in [kernel for kernel in built.kernels if kernel.name.startswith(("matmul", "paged"))]:
        assert "tf32" not in compile_text((tmp_path / kernel.text).read_text(), "cuda:80").assembly


def test_the_command_prints_a_table(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    model = save_tiny_model(tmp_path / "model")
    output, _ = run("build", model, "--target", "cuda:80", "-o", str(folder), "--dtype", "bfloat16")
    assert "registers" in output and "shared" in output
    assert (folder / "manifest.json").exists()


def test_what_cannot_be_built_is_a_typed_error(model: LlamaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(InfercompError, match="no target"):
        build_kernels(model, "vulkan:1", tmp_path, parse_options({}))
    with pytest.raises(ConfigError, match="rows"):
        build_kernels(model, "cuda:90", tmp_path, parse_options({"kv_cache_layout": "tiled"}))
    with pytest.raises(ConfigError, match="int8"):
        build_kernels(model, "cuda:90", tmp_path, parse_options({"kv_cache_dtype": "int8"}))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BuildError, match="cannot be written"):
        build_kernels(model, "cuda:90", tmp_path / "file" / "folder", parse_options({}))
