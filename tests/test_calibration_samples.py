"""Calibration data as users give it: text, files and token ids become windows; anything else is a named error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_llm import byte_model, byte_tokenizer, make_llm

from infercomp.calibration_samples import calibration_for
from infercomp.passes.calibration import Calibration
from infercomp.passes.config import PassConfig
from infercomp.passes.linear_recipes import W4A16, W8A8, Recipe
from infercomp.passes.recipes import LayerRecipes
from infercomp.runtime.errors import ConfigError

SMOOTH = W8A8(smooth_alpha=0.5)
TEXT = "All happy families are alike. " * 30
EXAMPLES = {"input_ids": torch.arange(7)[None], "position_ids": torch.arange(7)[None]}


def made(data: Any, recipe: Recipe | None = SMOOTH, tokenizer: Any = None, **options: Any) -> Calibration | None:
    options = {"vocab_size": 300, "max_positions": None, **options}
    return calibration_for(PassConfig(quantization=recipe), data, tokenizer or byte_tokenizer(), EXAMPLES, **options)


def lengths(calibration: Calibration | None) -> list[int]:
    assert calibration is not None
    for sample in calibration.samples:
        assert list(sample) == list(EXAMPLES)
        assert torch.equal(sample["position_ids"], torch.arange(sample["input_ids"].shape[1])[None])
    return [sample["input_ids"].shape[1] for sample in calibration.samples]


def test_texts_files_and_tokens_are_the_same_samples(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    ids = torch.tensor(byte_tokenizer()(TEXT)["input_ids"])
    given = ([TEXT], str(tmp_path / "text.txt"), tmp_path / "text.txt", ids, [ids], ids[None].to(torch.int32))
    for data in given:
        calibration = made(data)
        assert calibration is not None and lengths(calibration) == [512, len(TEXT) - 512]
        assert torch.equal(torch.cat([each["input_ids"][0] for each in calibration.samples]), ids)


def test_windows_are_shorter_than_the_model_has_positions_and_samples_stay_apart() -> None:
    assert lengths(made(torch.ones(100, dtype=torch.int64).repeat(2, 1), max_positions=64)) == [63, 37, 63, 37]
    # A window of one token is none that the graph takes.
    assert lengths(made(torch.ones(2 * 63 + 3, dtype=torch.int64), max_positions=65)) == [64, 64]


def test_a_model_that_counts_positions_by_itself_is_given_none() -> None:
    examples = {"input_ids": EXAMPLES["input_ids"]}
    calibration = calibration_for(
        PassConfig(quantization=SMOOTH), [TEXT], byte_tokenizer(), examples, vocab_size=None, max_positions=None
    )
    assert calibration is not None and all(list(sample) == ["input_ids"] for sample in calibration.samples)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (None, "the option quantization needs calibration data"),
        (["short"], "calibration has 5 tokens, at least 128 are needed"),
        ([], "cannot be a value of type list"),
        (3, "cannot be 3"),
        ("no/such/file.txt", "cannot be read: .*no/such/file.txt"),
        (torch.ones(200), "holds a value of type Tensor"),
        (torch.ones(200, dtype=torch.bool), "holds a value of type Tensor"),
        (torch.ones(2, 100, 2, dtype=torch.int64), "holds a value of type Tensor"),
        ([TEXT, 3], r"holds 'All happy families"),
        (torch.full((200,), 300), "token ids outside of the vocabulary of 300"),
        (torch.full((200,), -1), "token ids outside of the vocabulary of 300"),
    ],
)
def test_other_data_is_a_named_error(data: Any, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        made(data)
    assert caught.value.field == "calibration"


def test_texts_need_a_tokenizer() -> None:
    with pytest.raises(ConfigError, match="need a tokenizer"):
        calibration_for(PassConfig(quantization=SMOOTH), [TEXT], None, EXAMPLES, vocab_size=300, max_positions=None)


@pytest.mark.parametrize("recipe", [None, W8A8(), LayerRecipes((("*", W4A16()), ("lm_head", None)))])
def test_data_that_no_recipe_asks_for_is_refused(recipe: Recipe | None) -> None:
    assert made(None, recipe) is None
    with pytest.raises(ConfigError, match="no option asks for calibration data"):
        made([TEXT], recipe)


def test_llm_refuses_before_it_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infercomp.serving.lower_graph", lambda *_, **__: pytest.fail("compiled"))
    for options in ({"quantization": SMOOTH}, {"calibration": [TEXT]}):
        with pytest.raises(ConfigError, match="calibration data"):
            make_llm(**options)
    vocabulary = byte_model().config.vocab_size
    with pytest.raises(ConfigError, match=f"vocabulary of {vocabulary}"):
        make_llm(quantization=SMOOTH, calibration=torch.full((200,), vocabulary))
