"""The command line: what it prints where, its exit codes, and that a mistake costs a panel and no traceback."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import infercomp
from infercomp import cli, shell_arguments
from infercomp.process_stats import peak_memory_bytes, seconds_since_start

CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
runner = CliRunner(env={"COLUMNS": "120"})


def byte_tokenizer(chat_template: str | None) -> PreTrainedTokenizerFast:
    """One token a byte: any text can be encoded, and any ids decode to something."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template)


def save_tiny_model(
    folder: Path, *, chat_template: str | None = CHAT_TEMPLATE, vocab_size: int = 256, num_positions: int = 512
) -> str:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=num_positions,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer(chat_template).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def run(*arguments: str, exit_code: int = 0, stdin: str | None = None) -> tuple[str, str]:
    """Standard output and standard error of ``infercomp`` with these arguments."""
    result = runner.invoke(cli.app, list(arguments), input=stdin)
    assert result.exit_code == exit_code, result.output
    return result.stdout, result.stderr


def test_generate_prints_what_llm_generates(tiny_model: str) -> None:
    params = infercomp.SamplingParams(max_tokens=12, temperature=0.0)
    expected = infercomp.LLM(tiny_model).generate("Once", params)[0].outputs[0].text
    out, err = run("generate", tiny_model, "--prompt", "Once", "--max-tokens", "12")
    assert out == expected + "\n"
    assert err == ""


def test_generate_samples_from_its_seed(tiny_model: str) -> None:
    sampled = ("generate", tiny_model, "-p", "Once", "--temperature", "1", "--top-k", "50", "--top-p", "0.9")
    first, _ = run(*sampled, "--max-tokens", "8", "--seed", "1")
    again, _ = run(*sampled, "--max-tokens", "8", "--seed", "1")
    assert first == again


def test_generate_stops_at_a_stop_string(tiny_model: str) -> None:
    whole, _ = run("generate", tiny_model, "-p", "Once", "--max-tokens", "12")
    stop = whole[4:6]
    cut, _ = run("generate", tiny_model, "-p", "Once", "--max-tokens", "12", "--stop", stop)
    assert cut == whole[: whole.index(stop)] + "\n"


def test_chat_asks_through_the_template(tiny_model: str) -> None:
    asked, _ = run("generate", tiny_model, "--chat", "-p", "-", "--max-tokens", "6", stdin="Hi")
    spelled_out, _ = run("generate", tiny_model, "-p", "<user>Hi<assistant>", "--max-tokens", "6")
    assert asked == spelled_out


def test_stats_go_to_standard_error(tiny_model: str) -> None:
    out, err = run("generate", tiny_model, "-p", "Once", "--max-tokens", "6", "--stats", "--dtype", "bfloat16")
    for label in ("tokens/s", "cold start", "peak memory"):
        assert label in err
        assert label not in out


def test_explain_prints_the_tables_of_a_verified_report(tiny_model: str, tmp_path: Path) -> None:
    json_file, dump = tmp_path / "report.json", tmp_path / "stages"
    out, _ = run("explain", tiny_model, "--prompt", "Some words", "--json", str(json_file), "--dump", str(dump))
    assert "recognize_attention" in out
    assert "infercomp.paged_attention" in out
    report = json.loads(json_file.read_text())
    by_name = {record["name"]: record for record in report["passes"]}
    assert by_name["recognize_attention"]["matches"] == 1
    assert by_name["recognize_attention"]["max_error"] <= 1e-9
    assert (dump / "report.json").exists()
    assert list(dump.glob("*_page_attention.py"))
    assert not list(tmp_path.glob("*.part"))


def test_explain_takes_options_and_prints_json(tiny_model: str) -> None:
    out, _ = run("explain", tiny_model, "--no-verify", "--json", "-", "-o", "disable=fuse_rope", "-o", "limit=1000")
    by_name = {record["name"]: record for record in json.loads(out)["passes"]}
    assert by_name["fuse_rope"]["matches"] == 0
    assert by_name["fuse_rope"]["skipped"] == 2
    assert all(record["max_error"] is None for record in by_name.values())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-p", "x", "-o", "dissable=fuse_rope"), ("ConfigError", "dissable", "did you mean 'disable'")),
        (("-p", "x", "-o", "disable=fuse_ropes"), ("ConfigError", "did you mean 'fuse_rope'")),
        (("-p", "x", "-o", "num_blocks=many"), ("ConfigError", "num_blocks must be an integer", "'many'")),
        (("-p", "x", "-o", "num_blocks=0"), ("ConfigError", "num_blocks must be an integer from 1")),
        (("-p", "x", "-o", "strict=maybe"), ("ConfigError", "strict must be true or false")),
        (("-p", "x", "-o", "strict"), ("ConfigError", "KEY=VALUE")),
        (("-p", ""), ("InputError", "the prompt is empty")),
        (("-p", "\udcff"), ("InputError", "not valid UTF-8")),
        (("-p", "x", "--temperature", "-1"), ("InputError", "temperature must be between 0")),
        (("-p", "x", "--temperature", "nan"), ("InputError", "temperature must be between 0")),
        (("-p", "x", "--top-p", "0"), ("InputError", "top_p must be above 0")),
        (("-p", "x", "--max-tokens", "0"), ("InputError", "max_tokens must be an integer from 1")),
        (("-p", "x" * 600), ("InputError", "has 600 tokens")),
        (("-p", "x" * 100, "-o", "num_blocks=2"), ("CapacityError", "remedy")),
    ],
    ids=lambda value: " ".join(value)[:40].encode("ascii", "replace").decode(),
)
def test_a_mistake_is_a_panel_on_standard_error(
    tiny_model: str, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    out, err = run("generate", tiny_model, *arguments, exit_code=shell_arguments.EXIT_ERROR)
    assert out == ""
    assert "Traceback" not in err
    flowed = " ".join(err.replace("│", " ").split())
    for word in words:
        assert word in flowed


def test_a_mistake_in_the_options_is_found_before_the_model_is_loaded() -> None:
    _, err = run(
        "generate", "/no/such/model", "-p", "x", "-o", "disable=fuse_ropes", exit_code=shell_arguments.EXIT_ERROR
    )
    assert "fuse_ropes" in err


def test_a_path_without_a_model(tmp_path: Path) -> None:
    _, err = run("explain", str(tmp_path / "nothing"), exit_code=shell_arguments.EXIT_ERROR)
    assert "ModelLoadError" in err
    _, err = run("explain", str(tmp_path), exit_code=shell_arguments.EXIT_ERROR)
    assert "config.json" in err


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    _, err = run("explain", str(tmp_path / "nothing"), "--debug", exit_code=shell_arguments.EXIT_ERROR)
    assert "Traceback" in err
    assert "remedy" in err


def test_a_report_that_cannot_be_written_leaves_nothing_behind(tiny_model: str, tmp_path: Path) -> None:
    target = tmp_path / "missing" / "report.json"
    _, err = run("explain", tiny_model, "--no-verify", "--json", str(target), exit_code=shell_arguments.EXIT_ERROR)
    assert "cannot be written" in err
    assert not list(tmp_path.iterdir())


def test_chat_without_a_template_is_refused(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path, chat_template=None)
    _, err = run("generate", model, "--chat", "-p", "Hi", exit_code=shell_arguments.EXIT_ERROR)
    assert "no chat template" in err


def test_demo_fails_on_a_wrong_answer(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infercomp.demo_model.demo_model_path", lambda: Path(tiny_model))
    out, err = run("demo", exit_code=shell_arguments.EXIT_WRONG_ANSWER)
    assert cli.DEMO_QUESTION in out
    assert "page_attention" in out
    assert "does not contain 'Paris'" in err


@pytest.mark.parametrize("command", ["generate", "explain", "save", "quantize", "compare", "bench", "demo"])
def test_help_has_an_example(command: str) -> None:
    out, _ = run(command, "--help")
    assert "Example" in out
    assert f"infercomp {command} " in out


def test_version() -> None:
    assert run("--version")[0] == f"infercomp {infercomp.__version__}\n"


def python_module(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "infercomp", *arguments]


def test_help_and_usage_errors_load_no_torch() -> None:
    code = (
        "import sys; import infercomp.cli; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_interrupt_ends_with_130_and_no_traceback(tmp_path: Path) -> None:
    # Far more tokens than can be generated before the signal arrives, however late that is.
    model = save_tiny_model(tmp_path, num_positions=8192)
    command = python_module("generate", model, "-p", "Once", "--max-tokens", "8000")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == shell_arguments.EXIT_INTERRUPTED
    assert err.decode().strip() == "interrupted"


def test_process_stats_are_of_this_process() -> None:
    assert 0.0 < seconds_since_start() < 24 * 3600
    assert peak_memory_bytes() > 10 << 20


def test_save_writes_a_model_that_generates_the_same(tiny_model: str, tmp_path: Path) -> None:
    once = ("-p", "Once", "--max-tokens", "6")
    expected, _ = run("generate", tiny_model, *once)
    saved = str(tmp_path / "saved")
    out, err = run("save", tiny_model, "-o", saved)
    assert out == "" and "MiB" in err
    assert run("generate", saved, *once)[0] == expected


def test_save_leaves_other_folders_alone(tiny_model: str, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    _, err = run("save", tiny_model, "-o", str(tmp_path), exit_code=2)
    assert "ConfigError" in err and [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
