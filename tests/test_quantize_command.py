"""``infercomp quantize`` and ``compare``: what they write, and that a mistake costs no work and leaves nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_cli import run, runner, save_tiny_model

from infercomp import LLM, cli
from infercomp.account import Account, Size
from infercomp.plots import kinds_of, plot_of
from infercomp.quality import Quality
from infercomp.shell_arguments import EXIT_ERROR, EXIT_INTERRUPTED

TEXT = "All happy families are alike; each unhappy family is unhappy in its own way.\n" * 20
MEASURED = ("--eval-tokens", "300")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, and what ``quantize`` made of them."""
    folder = tmp_path_factory.mktemp("quantize")
    save_tiny_model(folder / "tiny")
    (folder / "text.txt").write_text(TEXT)
    (folder / "short.txt").write_text("short")
    files = ("--eval", str(folder / "text.txt"), "--json", str(folder / "w4.json"), "--plot", str(folder / "w4.svg"))
    quantized = ("quantize", str(folder / "tiny"), "-o", str(folder / "w4"), "--recipe", "w4a16")
    out, err = run(*quantized, *files, *MEASURED)
    (folder / "w4.out").write_text(out)
    assert "MiB" in err
    return folder


def test_quantize_saves_a_model_and_says_what_it_cost(folder: Path) -> None:
    assert LLM(folder / "w4", num_blocks=8).config.passes.quantization == "w4a16"
    out = (folder / "w4.out").read_text()
    assert "300 tokens" in out and "w4, float32" in out and "tok/s" in out and "median of 8 layers" in out
    found = json.loads((folder / "w4.json").read_text())
    reference, quantized = found["models"]
    assert found["versions"]["torch"] and found["command"] and reference["recipe"] is None
    assert quantized["recipe"]["recipe"] == "w4a16" and quantized["size"]["bits_per_weight"] == 4.75
    assert quantized["quality"]["mean_nats"] > 0 == reference["quality"]["mean_nats"]
    assert quantized["quality"]["reference_perplexity"] == reference["quality"]["perplexity"]
    assert len(quantized["layer_errors"]) == 8 and quantized["tokens_per_second"] > 0
    plot = (folder / "w4.svg").read_text()
    assert plot.lstrip().startswith("<?xml") and not list(folder.glob("*.part"))


def test_compare_has_a_line_for_each_model(folder: Path) -> None:
    other = ("quantize", str(folder / "tiny"), "-o", str(folder / "w8"), "--recipe", '{"recipe": "w8a16"}')
    run(*other, "--option", "quantize_lm_head=false")
    saved = (str(folder / "w4"), str(folder / "w8"))
    files = ("--json", str(folder / "both.json"), "--plot", str(folder / "both.png"))
    out, _ = run(
        "compare", str(folder / "tiny"), *saved, "--eval", str(folder / "text.txt"), "--no-speed", *files, *MEASURED
    )
    assert all(f"{name}, float32" in out for name in ("reference", "w4", "w8"))
    _, w4, w8 = json.loads((folder / "both.json").read_text())["models"]
    again = json.loads((folder / "w4.json").read_text())["models"][1]
    assert w4["quality"] == again["quality"] and w4["tokens_per_second"] is None
    assert 0 < w8["quality"]["mean_nats"] < w4["quality"]["mean_nats"]
    assert (folder / "both.png").read_bytes().startswith(b"\x89PNG")


TO_EVALUATE = ("--recipe", "w8a16", "--eval", "text.txt")
MISTAKES = {
    "unknown recipe": (("--recipe", "w4a17"), ("quantization must be a recipe", "did you mean 'w4a16'")),
    "recipe that is no JSON": (("--recipe", '{"recipe"'), ("ConfigError",)),
    "field out of range": (
        ("--recipe", '{"recipe": "w8a8", "smooth_alpha": 2}'),
        ("smooth_alpha must be a number in [0, 1]",),
    ),
    "no calibration": (("--recipe", "w4a16-gptq"), ("the option quantization needs calibration data",)),
    "calibration for nothing": (("--recipe", "w8a8", "--calibration", "text.txt"), ("no option asks for",)),
    "no such text": (("--recipe", "w8a8", "--eval", "none.txt"), ("evaluation cannot be read", "none.txt")),
    "no such calibration": (("--recipe", "w4a16-gptq", "--calibration", "none.txt"), ("calibration cannot be read",)),
    "a short text": (("--recipe", "w8a8", "--eval", "short.txt"), ("evaluation has 5 tokens, at least 128",)),
    "a plot of nothing": (("--recipe", "w8a8", "--plot", "x.png"), ("--plot holds what was measured", "--eval")),
    "a plot of another kind": ((*TO_EVALUATE, "--plot", "x.gif"), (".png, .svg, .pdf", "x.gif")),
    "a file in no folder": ((*TO_EVALUATE, "--json", "no/x.json"), ("cannot be written", "no/x.json")),
    "too few tokens": ((*TO_EVALUATE, "--eval-tokens", "5"), ("eval_tokens must be",)),
    "OUT is not free": (("--recipe", "w8a8", "-o", "tiny"), ("holds something else than a saved model",)),
}


@pytest.mark.parametrize(("arguments", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_found_before_anything_is_quantised(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("infercomp.serving.rewrite_graph", lambda *_, **__: pytest.fail("quantised"))
    before = sorted(folder.iterdir())
    _, err = run("quantize", "tiny", "-o", "new", *arguments, exit_code=EXIT_ERROR)
    flowed = " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err and all(word in flowed for word in words), flowed
    assert sorted(folder.iterdir()) == before


def test_convert_attention_saves_a_model_and_says_what_it_cost(folder: Path) -> None:
    converted = ("convert-attention", str(folder / "tiny"), "-o", str(folder / "mqa"), "--kv-heads", "1")
    texts = ("--merge", "aligned", "--calibration", str(folder / "text.txt"), "--eval", str(folder / "text.txt"))
    out, _ = run(*converted, *texts, "--json", str(folder / "mqa.json"), "--no-speed", *MEASURED)
    reference, mqa = json.loads((folder / "mqa.json").read_text())["models"]
    before, after = (each["size"]["kv_bytes_per_token"] for each in (reference, mqa))
    assert before == 2 * after and f"{before} bytes of cache a token in the reference, {after} in mqa" in out
    assert mqa["quality"]["mean_nats"] > 0 and list(mqa["layer_errors"]) == ["model.layers.0.self_attn"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--kv-heads", "1", "--merge", "median"), ("merge must be one of mean, first, random, aligned",)),
        (("--kv-heads", "0"), ("groups must be an integer from 1",)),
        (("--kv-heads", "1", "--merge", "aligned"), ("the option kv_heads needs calibration data",)),
        (("--kv-heads", "1", "--calibration", "text.txt"), ("calibration data",)),
    ],
)
def test_a_mistake_is_found_before_anything_is_converted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("infercomp.serving.rewrite_graph", lambda *_, **__: pytest.fail("converted"))
    _, err = run("convert-attention", "tiny", "-o", "new", *arguments, exit_code=EXIT_ERROR)
    flowed = " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err and all(word in flowed for word in words), flowed
    assert not (folder / "new").exists()


@pytest.mark.parametrize(
    ("model", "others", "words"),
    [
        ("tiny", ("w4", "none"), ("There is no such model", "none")),
        ("w4", ("w4",), ("a saved model has the dtype",)),
    ],
    ids=["no such model", "a reference that is saved"],
)
def test_compare_refuses(
    folder: Path, monkeypatch: pytest.MonkeyPatch, model: str, others: tuple[str, ...], words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(folder)
    _, err = run("compare", model, *others, "--eval", "text.txt", exit_code=EXIT_ERROR)
    assert all(word in " ".join(err.replace("│", " ").split()) for word in words), err


def test_compare_refuses_another_vocabulary(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(folder / "wider", vocab_size=264)
    monkeypatch.chdir(folder)
    _, err = run("compare", "wider", "w4", "--eval", "text.txt", *MEASURED, exit_code=EXIT_ERROR)
    assert "a vocabulary of 256 words" in " ".join(err.replace("│", " ").split())


def test_without_matplotlib_a_plot_is_refused_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    _, err = run("quantize", "tiny", "-o", "new", *TO_EVALUATE, "--plot", "x.png", exit_code=EXIT_ERROR)
    assert "pip install 'infercomp[plot]'" in err


def test_an_interrupt_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(folder)
    monkeypatch.setattr("infercomp.artifact._named_weights", interrupt)
    before = sorted(folder.iterdir())
    result = runner.invoke(cli.app, ["quantize", "tiny", "-o", "new", "--recipe", "w8a16"])
    assert result.exit_code == EXIT_INTERRUPTED and sorted(folder.iterdir()) == before


def account(name: str, nats: float, layer_errors: dict[str, float]) -> Account:
    quality, size = Quality(9, nats, nats, 1.0, 2.0, 2.0), Size(8.0, 1, 1, 1)
    return Account(name, "float32", None, quality, size, None, layer_errors)


def test_layers_of_one_kind_share_a_panel() -> None:
    errors = {f"model.layers.{i}.mlp.{kind}_proj": i / 100 for i in (10, 2) for kind in ("up", "down")}
    assert kinds_of({**errors, "lm_head": 0.5}) == {
        "up_proj": [(2, 0.02), (10, 0.1)],
        "down_proj": [(2, 0.02), (10, 0.1)],
        "lm_head": [(0, 0.5)],
    }
    many = {f"model.layers.{i}.mlp.{kind}_proj": 0.01 * i for i in range(30) for kind in "qkvogud"}
    one = [account("reference", 0.0, {}), account("w4", 0.1, many)]
    # Seven panels of thirty bars, and one plot of points for several models.
    drawn = plot_of(one, ".svg").decode()
    assert all(f"<!-- {kind}_proj -->" in drawn for kind in "qkvogud")
    points = plot_of([*one, account("w8", 0.01, {})], ".svg").decode()
    assert "<!-- w4 -->" in points and "<!-- w8 -->" in points and "<!-- reference -->" not in points
