"""Which kernels a device runs, and what is said where the option and the device do not fit."""

from __future__ import annotations

import pytest
import torch

from infercomp.codegen.config import CodegenConfig
from infercomp.codegen.target import language_of
from infercomp.runtime.errors import ConfigError

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize(
    ("codegen", "device", "language"),
    [
        ("reference", CPU, None),
        ("reference", CUDA, None),
        ("cpp", CPU, "cpp"),
        ("triton", CUDA, "triton"),
        ("auto", CPU, "cpp"),
        ("auto", CUDA, "triton"),
        ("auto", META, None),
    ],
)
def test_language(codegen: str, device: torch.device, language: str | None) -> None:
    assert language_of(CodegenConfig(codegen=codegen), device) == language


@pytest.mark.parametrize(("codegen", "device"), [("cpp", CUDA), ("cpp", META), ("triton", CPU), ("triton", META)])
def test_a_pair_that_cannot_be_names_the_option_and_the_remedy(codegen: str, device: torch.device) -> None:
    with pytest.raises(ConfigError) as caught:
        language_of(CodegenConfig(codegen=codegen), device)
    assert caught.value.field == "codegen" and "codegen=" in str(caught.value.remedy)


def test_the_interpreter_runs_triton_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert language_of(CodegenConfig(codegen="triton"), CPU) == "triton"
    assert language_of(CodegenConfig(codegen="auto"), CPU) == "cpp"
