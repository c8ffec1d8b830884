"""Bad input through the public door: a typed error that names the field, and everything as it was before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from small_llm import assert_idle, byte_model, byte_tokenizer, make_llm

from infercomp import LLM, CapacityError, ConfigError, InfercompError, InputError, ModelLoadError, SamplingParams
from infercomp.demo_model import demo_model_path

GREEDY = SamplingParams(temperature=0.0, max_tokens=6)
Call = Callable[[LLM], Any]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return make_llm()


@pytest.fixture
def usable_afterwards(llm: LLM) -> Iterator[None]:
    """The LLM answers as before, and the refused call left no request and no block behind."""
    expected = llm.generate("abc", GREEDY)[0].outputs[0].token_ids
    num_steps = llm.stats.num_steps
    yield
    assert llm.stats.num_steps == num_steps, "something ran before the input was refused"
    assert_idle(llm)
    assert llm.generate("abc", GREEDY)[0].outputs[0].token_ids == expected


NAN = float("nan")
PARAMETERS = {
    "negative-temperature": ("temperature", {"temperature": -1.0}),
    "nan-temperature": ("temperature", {"temperature": NAN}),
    "infinite-temperature": ("temperature", {"temperature": float("inf")}),
    "zero-top-p": ("top_p", {"top_p": 0.0}),
    "large-top-p": ("top_p", {"top_p": 1.5}),
    "nan-top-p": ("top_p", {"top_p": NAN}),
    "zero-n": ("n", {"n": 0}),
    "fractional-n": ("n", {"n": 1.5}),
    "zero-max-tokens": ("max_tokens", {"max_tokens": 0}),
    "top-k": ("top_k", {"top_k": -2}),
    "seed": ("seed", {"seed": -1}),
    "empty-stop": ("stop", {"stop": ""}),
}


@pytest.mark.parametrize(("field", "arguments"), PARAMETERS.values(), ids=PARAMETERS)
@pytest.mark.usefixtures("usable_afterwards")
def test_sampling_parameters(llm: LLM, field: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        llm.generate("abc", SamplingParams(**arguments))
    assert_says(caught.value, field)


def long_prompt(llm: LLM) -> str:
    return "a" * (llm.max_model_len + 1)


PROMPTS: dict[str, Call] = {
    "empty-text": lambda llm: llm.generate("", GREEDY),
    "no-tokens": lambda llm: llm.generate({"prompt_token_ids": []}, GREEDY),
    "empty-among-good-ones": lambda llm: llm.generate(["abc", ""], GREEDY),
    "no-tokens-among-good-ones": lambda llm: llm.generate(["abc", {"prompt_token_ids": []}], GREEDY),
    "too-long": lambda llm: llm.generate(long_prompt(llm), GREEDY),
    "too-long-among-good-ones": lambda llm: llm.generate(["abc", long_prompt(llm)], GREEDY),
    "as-long-as-the-positions": lambda llm: llm.generate("a" * llm.max_model_len, GREEDY),
    "too-long-stream": lambda llm: llm.stream(long_prompt(llm), GREEDY),
    "empty-stream": lambda llm: llm.stream("", GREEDY),
    "unknown-token": lambda llm: llm.generate({"prompt_token_ids": [10_000]}, GREEDY),
    "negative-token": lambda llm: llm.generate({"prompt_token_ids": [-1]}, GREEDY),
    "fractional-token": lambda llm: llm.generate({"prompt_token_ids": [1.5]}, GREEDY),
    "logits-of-nothing": lambda llm: llm.logits([]),
    "logits-too-long": lambda llm: llm.logits([1] * (llm.max_model_len + 1)),
    "logits-of-an-unknown-token": lambda llm: llm.logits([10_000]),
}


@pytest.mark.parametrize("call", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.usefixtures("usable_afterwards")
def test_prompts(llm: LLM, call: Call) -> None:
    with pytest.raises(InputError) as caught:
        call(llm)
    assert_says(caught.value, "prompt")


@pytest.mark.usefixtures("usable_afterwards")
def test_a_request_larger_than_the_cache(llm: LLM) -> None:
    small = make_llm(num_blocks=2)
    with pytest.raises(CapacityError) as caught:
        small.generate("a" * 20, GREEDY)
    assert_says(caught.value, "prompt")
    assert_idle(small)


def assert_says(error: InfercompError, field: str) -> None:
    """What and what to do, and the argument at fault; ``prompt`` also goes by its key ``prompt_token_ids``."""
    assert error.field is not None and error.field.startswith(field)
    assert error.what and error.remedy and error.remedy in str(error)


OPTIONS = {
    "unknown": ("num_block", {"num_block": 4}, "'num_blocks'"),
    "wrong-type": ("num_blocks", {"num_blocks": "4"}, "num_blocks"),
    "out-of-range": ("num_blocks", {"num_blocks": 0}, "num_blocks"),
    "unknown-pass": ("disable", {"disable": ["fuse_ropes"]}, "'fuse_rope'"),
    "nan": ("block_size", {"block_size": NAN}, "block_size"),
}


@pytest.mark.parametrize(("field", "options", "text"), OPTIONS.values(), ids=OPTIONS)
def test_options(field: str, options: dict[str, Any], text: str) -> None:
    model = byte_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError) as caught:
        LLM(model, byte_tokenizer(), **options)
    assert caught.value.field == field and text in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_unknown_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERCOMP_NUM_BLOCK", "4")
    with pytest.raises(ConfigError, match="INFERCOMP_NUM_BLOCKS"):
        LLM(byte_model(), byte_tokenizer())


def test_max_model_len_beyond_the_models_positions() -> None:
    with pytest.raises(InfercompError, match="256") as caught:
        LLM(byte_model(), byte_tokenizer(), max_model_len=257)
    assert caught.value.field == "max_model_len"


def test_a_tokenizer_of_another_model() -> None:
    with pytest.raises(ModelLoadError) as caught:
        LLM(FAMILIES["llama"].build("sdpa"), byte_tokenizer())
    assert caught.value.field == "tokenizer" and "128" in str(caught.value) and "256" in str(caught.value)


def missing(folder: Path) -> Path:
    return folder / "nowhere"


def empty_folder(folder: Path) -> Path:
    return folder


def text_file(folder: Path) -> Path:
    (folder / "notes.txt").write_text("no model")
    return folder / "notes.txt"


def broken_config(folder: Path) -> Path:
    byte_model().save_pretrained(folder)
    (folder / "config.json").write_text("{")
    return folder


def truncated_safetensors(folder: Path) -> Path:
    byte_model().save_pretrained(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return folder


def truncated_gguf(folder: Path) -> Path:
    with demo_model_path().open("rb") as whole:
        (folder / "model.gguf").write_bytes(whole.read(3_000_000))
    return folder / "model.gguf"


@pytest.mark.parametrize(
    "make", [missing, empty_folder, text_file, broken_config, truncated_safetensors, truncated_gguf]
)
def test_paths_that_hold_no_model(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = make(tmp_path)
    before = sorted(each.name for each in tmp_path.rglob("*"))
    with pytest.raises(ModelLoadError) as caught:
        LLM(path)
    error = caught.value
    assert error.field and error.remedy and str(tmp_path) in str(error)
    assert sorted(each.name for each in tmp_path.rglob("*")) == before


def test_a_saved_model_is_served_end_to_end(tmp_path: Path, llm: LLM) -> None:
    """The good path beside the bad ones: the same folder, whole, loads and answers as the model in memory."""
    byte_model().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = LLM(tmp_path, num_blocks=64)
    assert loaded.generate("abc", GREEDY)[0].outputs[0] == llm.generate("abc", GREEDY)[0].outputs[0]
