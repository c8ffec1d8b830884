"""Kernels as files that run: right ones pass, a planted edit is caught, and an edited text is loaded back."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from codegen.cpp.golden_models import graph_of, models
from small_llm import make_llm
from typer.testing import CliRunner

from infercomp import ConfigError, cli
from infercomp.codegen.config import CodegenConfig
from infercomp.codegen.lower import lower
from infercomp.config import parse_options
from infercomp.kernel_files import kernel_files

CPP = CodegenConfig(codegen="cpp")


def written(family: str, folder: Path) -> Path:
    """The kernel of a family as files; the Python file of its first."""
    files = kernel_files(graph_of(family), CPP)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder / next(name for name in files if name.endswith(".py"))


def run(path: Path) -> int:
    """What running the file would end with, in this process."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return int(module.CHECK.main(str(path), module.definition))


def edit(path: Path, old: str, new: str) -> None:
    text = path.with_suffix(".cpp").read_text()
    assert old in text
    path.with_suffix(".cpp").write_text(text.replace(old, new))


# The text of each, and what to change in it so that it computes something else.
EDITS = {
    "loop_reduction": ("t4 + 1e-05f", "t4 - 1e-01f"),
    "write_kv": ("+ e0)]", "+ e0 + 1)]"),
    "matmul_int8": ("t1 * t2", "t1 + t2"),
    "matmul_sparse": ("= products[lane]", "= 2 * products[lane]"),
    "paged_attention": ("a.scale = 0.25f", "a.scale = 0.26f"),
    "paged_attention_int8": ("a.value_scale = b7", "a.value_scale = b7 + 1"),
    "write_kv_int8": ("std::nearbyint(t", "2 + std::nearbyint(t"),
}


@pytest.mark.parametrize("family", EDITS)
def test_a_file_passes_as_generated_and_fails_once_edited(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(family, tmp_path)
    assert run(path) == 0
    shown = capsys.readouterr().out
    assert "bound" in shown and ": right" in shown and "GB/s" in shown and "WRONG" not in shown
    edit(path, *EDITS[family])
    assert run(path) == 1
    assert "WRONG" in capsys.readouterr().out


def test_python_ends_with_the_verdict(tmp_path: Path) -> None:
    path = written("loop_reduction", tmp_path)
    edit(path, *EDITS["loop_reduction"])
    ended = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and "WRONG" in ended.stdout, ended.stderr


def test_a_text_that_does_not_compile_is_an_error_that_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written("loop_reduction", tmp_path)
    edit(path, "t4 + 1e-05f", "t4 + nonsense")
    assert run(path) == 2
    assert "nonsense" in capsys.readouterr().out


def test_an_edited_text_is_loaded_back(tmp_path: Path) -> None:
    path = written("loop_reduction", tmp_path)
    graph, (rows,) = graph_of("loop_reduction"), models()["loop_reduction"][1]
    plain = lower(graph, CPP)
    edit(path, "= float(t9)", "= float(t9) * 2")
    edited = lower(graph, CodegenConfig(codegen="cpp", kernel_overrides=str(tmp_path)))
    assert [kernel.is_overridden for kernel in (*plain.kernel_uses, *edited.kernel_uses)] == [False, True]
    with torch.no_grad():
        (before,), (after,) = (program.bind(graph.weights)(rows) for program in (plain, edited))
    assert torch.equal(after, before * 2)


def test_an_override_of_no_kernel_is_an_error(tmp_path: Path) -> None:
    written("write_kv", tmp_path)
    with pytest.raises(ConfigError, match="no kernel is called loop_") as caught:
        lower(graph_of("loop_reduction"), CodegenConfig(codegen="cpp", kernel_overrides=str(tmp_path)))
    assert caught.value.field == "kernel_overrides" and caught.value.where == str(tmp_path)
    with pytest.raises(ConfigError, match="kernel_overrides cannot be read"):
        lower(graph_of("loop_reduction"), CodegenConfig(codegen="cpp", kernel_overrides=str(tmp_path / "none")))


def test_the_fingerprint_follows_the_texts_and_not_the_folder(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
        path = written("loop_reduction", folder)
    one, two = (parse_options({"kernel_overrides": str(folder)}).fingerprint() for folder in folders)
    assert one == two != parse_options().fingerprint()
    edit(path, *EDITS["loop_reduction"])
    assert parse_options({"kernel_overrides": str(folders[1])}).fingerprint() != one


def test_a_dump_of_a_served_model_holds_a_file_for_every_kernel(tmp_path: Path) -> None:
    report = make_llm(codegen="cpp", block_size=16, dump=str(tmp_path)).report
    names = {path.stem for path in (tmp_path / "kernels").glob("*.py")}
    assert names == {path.stem for path in (tmp_path / "kernels").glob("*.cpp")}
    assert names == {kernel.name for kernel in report.kernels}


def test_the_command_says_why_there_is_nothing_to_dump(tmp_path: Path) -> None:
    arguments = ["dump", "demo", "-o", str(tmp_path), "--option", "codegen=nothing"]
    result = CliRunner(env={"COLUMNS": "120"}).invoke(cli.app, arguments)
    assert result.exit_code == 2 and "codegen" in result.stderr
