"""Dumps: a numbered file for each pass that changed something, each of which runs and computes the same."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from references import watched_compilations

from infercomp import LLM, ConfigError

TOLERANCE = 1e-4
NAMES = ("llama", "gpt2", "bloom", "bert")


def compiled_with_dump(name: str, folder: Path, through_environment: pytest.MonkeyPatch | None = None) -> torch.Tensor:
    """Compile and call a family once; returns eager's output for the inputs in the dump."""
    family = FAMILIES[name]
    model = family.build(family.attn_implementations[-1])
    options = {} if through_environment else {"dump": str(folder)}
    if through_environment:
        through_environment.setenv("INFERCOMP_DUMP", str(folder))
    with watched_compilations(), torch.inference_mode():
        expected = model(**family.example_inputs())[0]
        torch.compile(model, backend="infercomp", options=options)(**family.example_inputs())
    return expected


def stages(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9][0-9]_*.py"))


def outputs_of(stage: Path) -> list[torch.Tensor]:
    """Import the file and run its ``main``."""
    spec = importlib.util.spec_from_file_location(f"dumped_{stage.stem}", stage)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [output for output in module.main() if isinstance(output, torch.Tensor)]


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_runs_and_agrees(name: str, tmp_path: Path) -> None:
    expected = compiled_with_dump(name, tmp_path)
    files = stages(tmp_path)
    assert files[0].name == "00_captured.py"
    assert len(files) > 4
    for stage in files:
        outputs = outputs_of(stage)
        same_shape = [output for output in outputs if output.shape == expected.shape]
        assert any(torch.allclose(output, expected, atol=TOLERANCE, rtol=TOLERANCE) for output in same_shape), (
            stage.name
        )


def test_only_passes_that_changed_something_leave_a_file(tmp_path: Path) -> None:
    compiled_with_dump("llama", tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    changed = [record["name"] for record in report["passes"] if record["matches"]]
    unchanged = [record["name"] for record in report["passes"] if not record["matches"]]
    assert [stage.stem[3:] for stage in stages(tmp_path)] == ["captured", *changed]
    assert changed
    assert not any(stage.stem[3:] in unchanged for stage in stages(tmp_path))


def test_the_report_says_what_happened(tmp_path: Path) -> None:
    compiled_with_dump("t5", tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    records = {record["name"]: record for record in report["passes"]}
    assert records["recognize_attention"]["matches"] == FAMILIES["t5"].num_attention_layers
    assert all(record["milliseconds"] >= 0 for record in records.values())
    misses = records["recognize_masks"]["near_misses"]
    assert misses and all(miss["reason"] and "modeling_t5" in miss["where"] for miss in misses)
    executions = {each["op"]: each for each in report["executions"]}
    assert executions["infercomp.attention"]["calls"] == 2
    assert all(each["how"] for each in executions.values())


def test_a_stage_runs_as_a_script(tmp_path: Path) -> None:
    """In a process of its own, from another folder; the first and the last stage print equal outputs."""
    compiled_with_dump("llama", tmp_path)
    printed = []
    for stage in (stages(tmp_path)[0], stages(tmp_path)[-1]):
        run = subprocess.run([sys.executable, str(stage)], capture_output=True, text=True, cwd=tmp_path.parent)
        assert run.returncode == 0, run.stderr
        printed.append([float(text) for text in re.findall(r"sum=(\S+)", run.stdout)])
    assert len(printed[0]) == len(printed[1]) > 0
    assert printed[0] == pytest.approx(printed[1], rel=TOLERANCE, abs=1e-3)


def test_the_environment_variable_does_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_with_dump("gpt2", tmp_path / "by_variable", monkeypatch)
    monkeypatch.delenv("INFERCOMP_DUMP")
    compiled_with_dump("gpt2", tmp_path / "by_option")
    by_variable, by_option = (stages(tmp_path / name) for name in ("by_variable", "by_option"))
    assert [each.name for each in by_variable] == [each.name for each in by_option]
    assert [each.read_text() for each in by_variable] == [each.read_text() for each in by_option]


def test_source_lines_of_the_model_head_the_calls(tmp_path: Path) -> None:
    compiled_with_dump("llama", tmp_path)
    assert "modeling_llama.py:" in stages(tmp_path)[-1].read_text()


def test_a_served_graph_is_dumped_with_its_caches(tmp_path: Path) -> None:
    LLM(FAMILIES["llama"].build("sdpa"), num_blocks=4, dump=str(tmp_path))
    last = stages(tmp_path)[-1]
    assert "write_kv" in last.read_text() and "paged_attention" in last.read_text()
    assert (tmp_path / "report.json").is_file()


def test_served_stages_run_with_the_inputs_of_a_step(tmp_path: Path) -> None:
    """The step over a paged cache computes the same logits as the captured forward."""
    LLM(FAMILIES["llama"].build("sdpa"), num_blocks=4, verify=True, dump=str(tmp_path))
    logits = [outputs_of(stage)[0] for stage in stages(tmp_path)]
    for stage, found in zip(stages(tmp_path), logits, strict=True):
        rows = found.reshape(-1, found.shape[-1])
        expected = logits[0].reshape(-1, found.shape[-1])[-rows.shape[0] :]
        assert torch.allclose(rows.float(), expected, atol=TOLERANCE, rtol=TOLERANCE), stage.name


def test_a_folder_that_cannot_be_written_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as caught:
        LLM(FAMILIES["llama"].build("sdpa"), num_blocks=4, dump=str(tmp_path / "file"))
    assert caught.value.field == "dump"
