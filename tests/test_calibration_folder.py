"""What calibration found stays in a folder: a run that was cut off goes on, and comes to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_llm import byte_model, byte_tokenizer

from infercomp import LLM
from infercomp.calibration_folder import CalibrationFolder
from infercomp.passes import round_weights
from infercomp.runtime.errors import ConfigError

TEXT = "Rain falls on the hills, and the river carries it to the sea. " * 8
IDS = list(range(3, 30))


def make_llm(folder: Path | None, quantization: str = "w4a16-g32-gptq", text: str = TEXT) -> LLM:
    return LLM(byte_model(), byte_tokenizer(), quantization=quantization, calibration=[text], calibration_folder=folder)


class CutOffError(Exception):
    """Stands for whatever ends a run."""


def cut_off_after(num_layers: int, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let ``round_weights`` measure so many inputs of linears; what it was called with."""
    calls: list[Any] = []
    whole = round_weights.second_moment

    def measured(values: Any) -> torch.Tensor:
        if len(calls) == num_layers:
            raise CutOffError
        calls.append(values)
        return whole(values)

    monkeypatch.setattr(round_weights, "second_moment", measured)
    return calls


def test_a_run_that_was_cut_off_goes_on_and_finds_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = make_llm(None).logits(IDS)
    with monkeypatch.context() as patch:
        cut_off_after(3, patch)
        with pytest.raises(CutOffError):
            make_llm(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    with monkeypatch.context() as patch:
        calls = cut_off_after(100, patch)
        assert torch.equal(make_llm(tmp_path).logits(IDS), expected)
        num_files = len(list(tmp_path.iterdir()))
        assert len(calls) == num_files - 3 > 0
        assert torch.equal(make_llm(tmp_path).logits(IDS), expected)
        assert len(calls) == num_files - 3
    other = make_llm(tmp_path, text=TEXT[5:]).logits(IDS)
    assert not torch.equal(other, expected)
    assert len(list(tmp_path.iterdir())) == 2 * num_files


def test_another_alpha_finds_the_same_maxima(tmp_path: Path) -> None:
    make_llm(tmp_path, "w8a8-smoothquant")
    files = sorted(tmp_path.iterdir())
    make_llm(tmp_path, '{"recipe": "w8a8", "smooth_alpha": 0.7}')
    assert sorted(tmp_path.iterdir()) == files


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    make_llm(tmp_path, "w8a8-smoothquant")
    broken = min(tmp_path.iterdir())
    broken.write_bytes(broken.read_bytes()[:-7])
    with pytest.raises(ConfigError, match=f"{broken.name} cannot be read(.|\n)*delete the file") as caught:
        make_llm(tmp_path, "w8a8-smoothquant")
    assert caught.value.field == "calibration_folder"


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be a folder") as caught:
        make_llm(tmp_path / "file", "w8a8-smoothquant")
    assert caught.value.field == "calibration_folder"


def test_a_folder_without_anything_to_keep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no option asks for calibration") as caught:
        LLM(byte_model(), byte_tokenizer(), quantization="w8a8", calibration_folder=tmp_path / "new")
    assert caught.value.field == "calibration_folder"


def test_names_of_layers_become_names_of_files(tmp_path: Path) -> None:
    folder = CalibrationFolder(tmp_path / "a" / "b")
    tensors = {"x": torch.arange(6).view(2, 3).t(), "y": torch.tensor(0.5)}
    assert folder.read("m-0001-a/b..c") is None
    folder.write("m-0001-a/b..c", tensors)
    found = folder.read("m-0001-a/b..c")
    assert found is not None and found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert [path.parent for path in (tmp_path / "a").rglob("*.safetensors")] == [tmp_path / "a" / "b"]
