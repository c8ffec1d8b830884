"""``infercomp bench`` on a tiny model: a whole run in processes of its own, and every reason not to go on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from infercomp import cli, shell_arguments
from infercomp.bench import peers, run, start_worker
from infercomp.bench.machine import describe_run
from infercomp.bench.session import Worker
from infercomp.runtime.errors import BenchmarkError, ModelLoadError

SMALL = (
    "--decode",
    "1",
    "--prefill",
    "16",
    "--steps",
    "4",
    "--repetitions",
    "2",
    "--threads",
    "2",
    "-o",
    "codegen=cpp",
)
runner = CliRunner(env={"COLUMNS": "160"})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A llama that copies less than transformers' own start: its likeliest tokens are clear."""
    import torch

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def bench(*arguments: str, exit_code: int = 0) -> tuple[str, str]:
    result = runner.invoke(cli.app, ["bench", *arguments])
    assert result.exit_code == exit_code, result.output
    return result.stdout, result.stderr


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files, to see that none stays."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    return folder


def test_a_run_with_a_peer(model: str, tmp_path: Path, temporary: Path) -> None:
    file = tmp_path / "out.json"
    out, _ = bench(model, *SMALL, "--vs", "eager", "--json", str(file))
    assert "tokens per second" in out and "ledger of decode 1" in out and "streaming reads, 2 threads" in out
    assert list(temporary.iterdir()) == []
    result = json.loads(file.read_text())
    _check_schema(result)
    for measured in result["measured"]:
        assert set(measured["seconds"]) == {"infercomp", "eager"}
        assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in measured["seconds"].values())
    assert [measured["name"] for measured in result["measured"]] == ["decode 1", "prefill 16"]
    for ledger in result["ledgers"].values():
        _check_ledger(ledger)


def _check_schema(result: dict) -> None:
    assert result["schema"] == 1
    assert {"command", "date", "commit", "versions", "machine", "configuration", "notes"} < set(result)
    assert result["machine"]["cpu"] and result["machine"]["num_cores"] == os.cpu_count()
    assert result["ceilings"]["read_bytes_per_second"]["2"] > 1e8
    assert result["ceilings"]["operations_per_second"]["int8"] > 1e8
    assert [check["is_passed"] for check in result["checks"]] == [True, True]
    assert result["checks"][0]["mean_nats"] < 1e-3
    for side in ("infercomp", "eager"):
        assert result["sides"][side]["peak_memory_bytes"] > 100 << 20
    assert result["sides"]["infercomp"]["form"] == "float32"


def _check_ledger(ledger: dict) -> None:
    rows = ledger["rows"]
    assert sum(row["calls"] for row in rows if row["label"].startswith("paged attention")) == 2
    (gate_and_up,) = (row for row in rows if row["label"] == "matmul f32 64 → 192")
    assert gate_and_up["calls"] == 2
    times = sum(row["seconds"] for row in rows) + sum(ledger["outside_of_kernels"].values())
    assert times == pytest.approx(ledger["seconds_timed_by_kernel"])
    assert ledger["num_bytes"] == pytest.approx(sum(row["num_bytes"] for row in rows))
    weights = 4 * (2 * (64 * 128 + 64 * 64 + 64 * 192 + 96 * 64) + 64 * 160)
    assert ledger["num_bytes"] > weights
    assert ledger["bandwidth_share"] > 0


def test_a_wrong_output_is_no_speed(
    model: str, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted error in every logit: the command says so, prints no figure and writes none."""
    started = run.Worker

    def planted(name: str, module: str, *rest: object) -> Worker:
        return started(name, "planted_worker" if name == run.OURS else module, *rest)  # type: ignore[arg-type]

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(run, "Worker", planted)
    file = tmp_path / "out.json"
    out, err = bench(model, *SMALL, "--json", str(file), exit_code=shell_arguments.EXIT_WRONG_ANSWER)
    assert "wrong" in out and "tokens per second" not in out and "ledger" not in out
    assert "outputs of infercomp are not those of the model" in " ".join(re.sub("[│╭╰─╮╯]", " ", err).split())
    assert not file.exists()
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--vs", "llama.cp"), ("there is no peer 'llama.cp'", "did you mean 'llama.cpp'")),
        (("--vs", "llama.cpp"), ("BenchmarkError", "llama-cpp-python", "pip install")),
        (("--vs", "llama.cpp", "--peer-python", "/no/such/python"), ("cannot be run", "/no/such/python")),
        (("--decode", "1,x"), ("decode takes positive numbers", "'1,x'")),
        (("--decode", "0"), ("decode takes positive numbers",)),
        (("--decode", "65"), ("max_num_seqs=64 is less than the batch of 65",)),
        (("--steps", "0"), ("steps must be an integer from 1",)),
        (("-o", "quantisation=w8a8"), ("did you mean 'quantization'",)),
    ],
    ids=lambda value: " ".join(value)[:30],
)
def test_a_mistake_is_found_before_anything_runs(
    tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "_missing", _only_real_pythons)
    monkeypatch.setattr(run, "Worker", lambda *given: pytest.fail("a process was started"))
    _, err = bench(str(tmp_path), *arguments, exit_code=shell_arguments.EXIT_ERROR)
    flowed = " ".join(re.sub("[│╭╰─╮╯]", " ", err).split())
    for word in words:
        assert word in flowed


def _only_real_pythons(modules: tuple[str, ...], python: str) -> list[str]:
    """No peer is installed, whatever the machine of the tests has."""
    _MISSING((), python)
    return list(modules)


_MISSING = peers._missing


def test_a_package_that_is_there_is_not_missing() -> None:
    assert peers._missing(("json", "no_such_module"), sys.executable) == ["no_such_module"]


def test_a_model_that_is_none_is_its_own_error(tmp_path: Path) -> None:
    _, err = bench(str(tmp_path), *SMALL, exit_code=shell_arguments.EXIT_ERROR)
    assert "ModelLoadError" in err and "config.json" in err


def test_an_interrupt_leaves_no_process_and_no_file(model: str, tmp_path: Path) -> None:
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "infercomp", "bench", model, *SMALL, "--repetitions", "1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ) as process:
        workers = _wait_for_children(process.pid)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == shell_arguments.EXIT_INTERRUPTED
    assert (out, err.decode().strip()) == (b"", "interrupted")
    assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]
    assert list(tmp_path.iterdir()) == []


def _wait_for_children(parent: int) -> list[int]:
    """The workers of a run that has begun to work."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
        if any(Path(f"/proc/{pid}/cmdline").read_bytes().count(b"worker") > 1 for pid in found):
            return found
        time.sleep(0.05)
    raise AssertionError("no worker was started")


@pytest.fixture(scope="module")
def eager_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with Worker("eager", "infercomp.bench.workers.eager_worker", tmp_path_factory.mktemp("eager")) as worker:
        yield worker


def test_a_worker_computes_nothing_while_it_waits(model: str, eager_worker: Worker) -> None:
    eager_worker.ask("load", model=model, dtype="float32", threads=2)
    eager_worker.ask("decode", prompts=[[1, 2, 3]], num_steps=8)
    time.sleep(0.3)  # threads that spin for a while after their work have stopped
    before = _processor_ticks(eager_worker._process.pid)
    time.sleep(0.5)
    assert _processor_ticks(eager_worker._process.pid) - before <= 1


def _processor_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_a_worker_that_dies_is_an_error_that_shows_its_last_words(tmp_path: Path) -> None:
    with Worker("nothing", "infercomp.bench.workers.no_such_module", tmp_path) as worker:
        with pytest.raises(BenchmarkError, match="no_such_module") as raised:
            worker.ask("load")
        assert raised.value.where == "nothing"


def test_an_error_of_infercomp_keeps_its_type(tmp_path: Path, eager_worker: Worker) -> None:
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        eager_worker.ask("load", model=str(tmp_path), dtype="float32", threads=1)


def test_a_python_without_infercomp_is_lent_the_package_alone(tmp_path: Path) -> None:
    (tmp_path / "probe.py").write_text(
        "import importlib.util, infercomp.bench.protocol as p\n"
        "print(p.__file__, [importlib.util.find_spec(name) for name in ('typer', 'torch', 'session')])\n"
    )
    command = [sys.executable, "-S", start_worker.__file__, "probe"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env={"PYTHONPATH": str(tmp_path)})
    expected = Path(start_worker.__file__).with_name("protocol.py")
    assert done.stdout.strip() == f"{expected} [None, None, None]", done.stderr


def test_a_published_command_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    arguments = [str(tmp_path / "infercomp"), "bench", "demo", "--json", "results/a.json"]
    assert describe_run(arguments)["command"] == "infercomp bench demo --json results/a.json"
