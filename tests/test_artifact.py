"""Saved models: served again bit for bit, with no tracing; damaged or misused ones are typed errors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import DECODERS
from small_llm import byte_model, byte_tokenizer, make_llm

from infercomp import LLM, ConfigError, ModelLoadError, SamplingParams, UnsupportedError
from infercomp.artifact import MANIFEST, WEIGHTS
from infercomp.loading.loader import load

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
TOKENS = list(range(3, 24))


def saved(llm: LLM, folder: Path) -> Path:
    llm.save(folder)
    return folder


@pytest.fixture(scope="module")
def original() -> LLM:
    return make_llm()


@pytest.fixture(scope="module")
def folder(original: LLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(original, tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def test_a_saved_model_is_served_as_before(original: LLM, folder: Path) -> None:
    served = LLM(folder, num_blocks=64)
    assert torch.equal(served.logits(TOKENS), original.logits(TOKENS))
    assert served.generate("abc", GREEDY)[0].outputs[0].text == original.generate("abc", GREEDY)[0].outputs[0].text
    assert served.report.passes == original.report.passes and served.report.ops == original.report.ops
    assert (served.max_model_len, served.eos_token_ids) == (original.max_model_len, original.eos_token_ids)


def test_it_can_be_saved_again(folder: Path, tmp_path: Path) -> None:
    again = saved(LLM(folder, num_blocks=8), tmp_path / "again")
    assert (again / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert json.loads((again / MANIFEST).read_text()) == json.loads((folder / MANIFEST).read_text())


def test_its_tensors_are_those_of_the_model(folder: Path) -> None:
    """A saved model of floats is a checkpoint too."""
    found = load(folder).model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in byte_model().state_dict().items())


# What differs between families, for a saved program, is which ops run without a kernel and how weights are laid out.
FAMILIES_IN_EVERY_RUN = ("gpt2", "bloom", "gemma2", "falcon")


@pytest.mark.parametrize(
    "name", [name if name in FAMILIES_IN_EVERY_RUN else pytest.param(name, marks=pytest.mark.slow) for name in DECODERS]
)
def test_every_family_is_saved(name: str, tmp_path: Path) -> None:
    llm = LLM(DECODERS[name].build(DECODERS[name].attn_implementations[0]), num_blocks=16)
    served = LLM(saved(llm, tmp_path / "model"), num_blocks=16)
    assert torch.equal(served.logits(TOKENS), llm.logits(TOKENS))


@pytest.fixture(scope="module")
def kernels_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    llm = LLM(byte_model(), byte_tokenizer(), num_blocks=16, codegen="cpp")
    return saved(llm, tmp_path_factory.mktemp("kernels") / "model")


def test_loading_imports_nothing_of_the_compiler(kernels_folder: Path) -> None:
    code = f"""
import sys, infercomp
llm = infercomp.LLM({str(kernels_folder)!r}, num_blocks=8, codegen="cpp")
llm.generate("abc", infercomp.SamplingParams(max_tokens=2))
print([name for name in ("sympy", "networkx", "torch._dynamo", "infercomp.passes.pipeline") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [(torch.bfloat16, None), (torch.float32, "w8a8"), (torch.bfloat16, "w4a8-g32")],
    ids=str,
)
def test_kernels_of_a_saved_model_give_the_same_bits(
    dtype: torch.dtype, quantization: str | None, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"codegen": "cpp", "num_blocks": 16}
    llm = LLM(byte_model(), byte_tokenizer(), dtype=dtype, quantization=quantization, **options)
    expected = llm.logits(TOKENS)
    served = LLM(saved(llm, tmp_path / "model"), **options)
    assert torch.equal(served.logits(TOKENS), expected)
    # The specs say what the kernels were made of: the ledger asks for them.
    kernels = served._served.program.kernels
    assert {name: kernels[name].spec for name in kernels} == {
        name: kernel.spec for name, kernel in llm._served.program.kernels.items()
    }
    assert served._served.form.config.passes.quantization == quantization


def with_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    return folder


def _call(manifest: dict[str, Any]) -> dict[str, Any]:
    return next(node for node in manifest["program"]["driver"] if node["op"] == "call")


DAMAGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "another format": lambda m: m.update(format=99),
    "a field is missing": lambda m: m.pop("cache_specs"),
    "a wrong type": lambda m: m.update(vocab_size="many"),
    "an unknown dtype": lambda m: m["cache_specs"][0].update(dtype="float7"),
    "a call of something else": lambda m: _call(m).update(target="os.system"),
    "a renamed input": lambda m: m["program"]["input_names"].reverse(),
    "a weight that is not there": lambda m: m["tensors"].popitem(),
    "a scheme that does not exist": lambda m: m["passes"].update(quantization="w1a1"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_manifest_is_a_typed_error(copied: Path, damage: Callable[[dict[str, Any]], None]) -> None:
    with pytest.raises((ModelLoadError, ConfigError)) as caught:
        LLM(with_manifest(copied, damage), num_blocks=8)
    assert caught.value.remedy


def test_a_cut_manifest_is_a_typed_error(copied: Path) -> None:
    content = (copied / MANIFEST).read_bytes()
    (copied / MANIFEST).write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelLoadError, match=MANIFEST):
        LLM(copied)


def test_cut_weights_are_a_typed_error(copied: Path) -> None:
    content = (copied / WEIGHTS).read_bytes()
    (copied / WEIGHTS).write_bytes(content[:-64])
    with pytest.raises(ModelLoadError, match=WEIGHTS):
        LLM(copied)


def test_weights_of_another_shape_are_a_typed_error(copied: Path, tmp_path: Path) -> None:
    arguments = {**byte_model().config.to_dict(), "intermediate_size": 48}
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**arguments)).eval()
    llm = LLM(other, byte_tokenizer(), num_blocks=8, disable="merge_linears")
    weights = saved(llm, tmp_path / "other") / WEIGHTS
    (copied / WEIGHTS).write_bytes(weights.read_bytes())
    with pytest.raises(ModelLoadError, match="shape"):
        LLM(copied)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("quantization", {"quantization": "w8a8"}),
        ("disable", {"disable": "fuse_rope"}),
        ("codegen", {"codegen": "triton"}),
        ("dump", {"dump": "stages"}),
        ("dtype", {"dtype": torch.bfloat16}),
        ("calibration", {"calibration": ["text"]}),
    ],
)
def test_options_of_compiling_are_fixed(folder: Path, field: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        LLM(folder, **options)
    assert caught.value.field == field and caught.value.remedy


def test_strict_refuses_what_runs_without_kernels(folder: Path, kernels_folder: Path) -> None:
    LLM(kernels_folder, num_blocks=8, codegen="cpp", strict=True)
    with pytest.raises(UnsupportedError):
        LLM(folder, num_blocks=8, strict=True)


def test_a_folder_with_something_else_is_left_alone(original: LLM, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ConfigError) as caught:
        original.save(tmp_path)
    assert caught.value.field == "folder"
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_a_saved_model_may_be_replaced(original: LLM, copied: Path) -> None:
    (copied / "stale.txt").write_text("of an earlier version")
    original.save(copied)
    assert not (copied / "stale.txt").exists() and LLM(copied, num_blocks=8).logits(TOKENS).shape[0] == len(TOKENS)


def test_an_interrupt_leaves_nothing_behind(original: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(original.tokenizer, "save_pretrained", interrupt, raising=False)
    with pytest.raises(KeyboardInterrupt):
        original.save(tmp_path / "model")
    assert not list(tmp_path.iterdir())
