"""Logits in company against logits alone: that every workload is computed whole, and that a neighbour is noticed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

import infercomp
from infercomp.bench.batch_invariance import logits_in_company, measure_invariance
from infercomp.cli import app
from infercomp.served_model import ServedModel

CONFIG = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 130, "max_position_embeddings": 96, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).save_pretrained(path)
    return path


@pytest.fixture
def llm(folder: Path) -> infercomp.LLM:
    return infercomp.LLM(folder, codegen="cpp")


def plant(monkeypatch: pytest.MonkeyPatch, changed: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
    """Every step's logits are what ``changed`` makes of its inputs and them."""
    whole = ServedModel.with_pools

    def with_pools(self: ServedModel, pools: Any) -> Any:
        step = whole(self, pools)
        return lambda inputs: changed(inputs, step(inputs))

    monkeypatch.setattr(ServedModel, "with_pools", with_pools)


def test_every_token_is_computed_once(llm: infercomp.LLM) -> None:
    sequences = [[1, 2, 3], [4], list(range(5, 60))]
    found = [(i, position) for i, position, _ in logits_in_company(llm._served, sequences, random.Random(3))]
    assert sorted(found) == [(i, position) for i, each in enumerate(sequences) for position in range(len(each))]


def test_sequences_are_those_that_the_model_takes(llm: infercomp.LLM) -> None:
    found = measure_invariance(llm, 8)
    assert found.num_workloads == 8 and found.differences == ()
    assert 8 <= found.num_tokens <= 8 * (1 + 5 + 17 + 40 + 77)


def test_one_bit_that_company_changes_is_found(llm: infercomp.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        if len(inputs.seq_lens) > 1:
            logits[-1, 7] = torch.nextafter(logits[-1, 7], torch.tensor(torch.inf))
        return logits

    plant(monkeypatch, changed)
    found = measure_invariance(llm, 8, seed=1)
    assert 0 < len(found.differences) < found.num_tokens
    assert all(0 < each.largest < 1e-5 and each.position < each.length for each in found.differences)


def test_the_command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["invariance", str(folder), "--workloads", "3", "--json", str(tmp_path / "out.json")]
    arguments += ["--option", "codegen=cpp"]
    done = CliRunner(env={"COLUMNS": "160"}).invoke(app, arguments)
    assert done.exit_code == 0 and "every bit" in done.output
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["differences"] == [] and report["num_workloads"] == 3 and report["machine"]["cpu"]
    plant(monkeypatch, lambda inputs, logits: logits + 0.5 * (len(inputs.seq_lens) > 1))
    done = CliRunner(env={"COLUMNS": "160"}).invoke(app, arguments)
    assert done.exit_code == 1 and "have other logits than alone" in done.output and "0.5" in done.output


def test_what_is_no_number_of_workloads_is_refused(folder: Path) -> None:
    done = CliRunner(env={"COLUMNS": "160"}).invoke(app, ["invariance", str(folder), "--workloads", "0"])
    assert done.exit_code == 2 and "workloads" in done.output
