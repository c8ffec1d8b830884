"""``LLM`` on a tiny model: sampling, endings, text, scarce blocks, interrupts."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from small_llm import assert_idle, byte_model, byte_tokenizer, make_llm

from infercomp import LLM, CapacityError, InputError, NumericalError, SamplingParams
from infercomp.runtime.step import StepInputs

PROMPTS = ["Once upon a time", "x", "def main():", "the year 1969 saw", "Ä🙂"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
DRAWN = SamplingParams(temperature=1.0, top_k=50, top_p=0.95, max_tokens=24, seed=11, ignore_eos=True)
POISON = "\x07"


@pytest.fixture(scope="module")
def shared_llm() -> LLM:
    return make_llm()


@pytest.fixture
def llm(shared_llm: LLM) -> Iterator[LLM]:
    yield shared_llm
    assert_idle(shared_llm)


def tokens(llm: LLM, prompts: list[str], params: SamplingParams) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]


def test_a_seed_fixes_the_tokens_whatever_the_neighbours(llm: LLM) -> None:
    alone = [tokens(llm, [prompt], DRAWN)[0] for prompt in PROMPTS]
    assert tokens(llm, PROMPTS, DRAWN) == alone
    assert tokens(llm, PROMPTS[::-1], DRAWN) == alone[::-1]
    assert tokens(llm, PROMPTS[:1], replace(DRAWN, seed=12)) != alone[:1]


def test_without_a_seed_draws_differ(llm: LLM) -> None:
    params = replace(DRAWN, seed=None)
    assert tokens(llm, ["x"], params) != tokens(llm, ["x"], params)


def test_n_sequences_are_those_of_consecutive_seeds(llm: LLM) -> None:
    (output,) = llm.generate("Once", replace(DRAWN, n=3))
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    separate = [tokens(llm, ["Once"], replace(DRAWN, seed=11 + index))[0] for index in range(3)]
    assert [completion.token_ids for completion in output.outputs] == separate
    assert len({tuple(each) for each in separate}) == 3


def test_each_prompt_may_have_its_own_params(llm: LLM) -> None:
    params = [GREEDY, replace(GREEDY, max_tokens=3), DRAWN]
    outputs = llm.generate(PROMPTS[:3], params)
    expected = [tokens(llm, [prompt], one)[0] for prompt, one in zip(PROMPTS, params, strict=False)]
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert [len(each) for each in expected] == [24, 3, 24]
    with pytest.raises(InputError) as caught:
        llm.generate(PROMPTS[:3], params[:2])
    assert caught.value.field == "sampling_params"


def test_max_tokens_ends_with_length(llm: LLM) -> None:
    (output,) = llm.generate("abc", replace(GREEDY, max_tokens=1))
    assert output.finished and len(output.outputs[0].token_ids) == 1
    assert output.outputs[0].finish_reason == "length"


def test_the_models_last_position_ends_with_length(llm: LLM) -> None:
    (output,) = llm.generate("a" * 250, replace(GREEDY, max_tokens=100))
    assert len(output.outputs[0].token_ids) == llm.max_model_len - 250
    assert output.outputs[0].finish_reason == "length"


def test_end_of_sequence_ends_unless_ignored(llm: LLM) -> None:
    text = tokens(llm, ["Once"], GREEDY)[0]
    end = text[5]
    first = text.index(end)
    (output,) = llm.generate("Once", replace(GREEDY, stop_token_ids=[end]))
    completion = output.outputs[0]
    assert completion.token_ids == text[: first + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", end)
    assert completion.text == byte_tokenizer().decode(text[:first])
    llm._engine.eos_token_ids, before = frozenset({end}), llm._engine.eos_token_ids
    try:
        ended, ignored = (
            llm.generate("Once", replace(GREEDY, ignore_eos=value))[0].outputs[0] for value in (False, True)
        )
    finally:
        llm._engine.eos_token_ids = before
    assert (ended.token_ids, ended.finish_reason, ended.stop_reason) == (text[: first + 1], "stop", None)
    assert (ignored.token_ids, ignored.finish_reason) == (text, "length")


def test_the_tokenizers_end_of_text_is_the_end_of_a_sequence(llm: LLM) -> None:
    assert llm.eos_token_ids == {byte_tokenizer().eos_token_id}


def test_stop_strings_are_cut_off(llm: LLM) -> None:
    prompt = "The capital"
    text = llm.generate(prompt, replace(GREEDY, max_tokens=60))[0].outputs[0].text
    stop = text[7:9]
    assert len(stop) == 2
    completion = llm.generate(prompt, replace(GREEDY, max_tokens=60, stop=["no such text", stop]))[0].outputs[0]
    assert completion.text == text[: text.index(stop)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_stream_gives_the_text_of_generate_in_pieces(llm: LLM, prompt: str) -> None:
    params = replace(DRAWN, max_tokens=60)
    text = llm.generate(prompt, params)[0].outputs[0].text
    pieces = list(llm.stream(prompt, params))
    assert "".join(pieces) == text
    assert len(pieces) > 5 and all(pieces)


def test_text_never_splits_a_character(llm: LLM) -> None:
    """Tokens are bytes: all text shown so far is a beginning of the final text at every step."""
    shown: list[str] = []
    for piece in llm.stream("🙂", replace(DRAWN, max_tokens=100)):
        shown.append(("".join(shown[-1:])) + piece)
    (output,) = llm.generate("🙂", replace(DRAWN, max_tokens=100))
    raw = byte_tokenizer().decode(output.outputs[0].token_ids, skip_special_tokens=True)
    assert output.outputs[0].text == raw
    assert any(ord(character) > 127 for character in raw.replace("\ufffd", "")), "no character of several bytes was met"
    assert all(after.startswith(before) for before, after in pairwise([*shown, raw]))


def test_a_stream_that_is_dropped_frees_its_blocks(llm: LLM) -> None:
    stream = llm.stream("Once upon", GREEDY)
    next(stream)
    stream.close()
    assert_idle(llm)


def test_a_stream_that_was_never_started_leaves_nothing(llm: LLM) -> None:
    stream = llm.stream("Once upon", GREEDY)
    del stream
    assert_idle(llm)


def test_generate_amid_a_stream_takes_nothing_from_it(llm: LLM) -> None:
    expected = "".join(llm.stream("Once upon", GREEDY))
    stream = llm.stream("Once upon", GREEDY)
    first = next(stream)
    between = tokens(llm, ["x"], GREEDY)
    assert first + "".join(stream) == expected
    assert between == tokens(llm, ["x"], GREEDY)


@pytest.mark.parametrize("num_blocks", [12, 24])
def test_with_few_blocks_requests_wait_and_get_the_same_tokens(llm: LLM, num_blocks: int) -> None:
    starved = make_llm(num_blocks=num_blocks)
    assert tokens(starved, PROMPTS, GREEDY) == tokens(llm, PROMPTS, GREEDY)
    assert tokens(starved, PROMPTS, DRAWN) == tokens(llm, PROMPTS, DRAWN)
    assert starved.stats.peak_used_blocks <= num_blocks
    if num_blocks == 24:
        assert starved.stats.num_preemptions > 0
    assert_idle(starved)


def test_what_can_never_fit_is_refused_with_the_number_of_blocks() -> None:
    llm = make_llm(num_blocks=3)
    with pytest.raises(CapacityError) as caught:
        llm.generate(["x", "a" * 20], replace(GREEDY, max_tokens=4))
    assert (caught.value.needed_blocks, caught.value.num_blocks) == (6, 3)
    assert "need 6 blocks" in str(caught.value)
    assert_idle(llm)
    assert len(tokens(llm, ["x"], replace(GREEDY, max_tokens=4))[0]) == 4


def test_chunked_prefill_changes_nothing(llm: LLM) -> None:
    prompts = ["a long prompt, cut into chunks " * 4, "x", "another of them " * 5]
    chunked = make_llm(max_num_batched_tokens=7)
    assert tokens(chunked, prompts, GREEDY) == tokens(llm, prompts, GREEDY)
    assert chunked.stats.num_steps > 2 * 24
    ids = byte_tokenizer()(prompts[0])["input_ids"]
    torch.testing.assert_close(chunked.logits(ids), llm.logits(ids), atol=1e-4, rtol=1e-4)


def test_an_interrupt_leaves_the_llm_usable(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tokens(llm, PROMPTS, GREEDY)
    step, calls = llm._engine.model, []

    def interrupted(inputs: StepInputs) -> torch.Tensor:
        calls.append(inputs)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(inputs)

    with monkeypatch.context() as patch:
        patch.setattr(llm._engine, "model", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, GREEDY)
    assert_idle(llm)
    assert tokens(llm, PROMPTS, GREEDY) == expected


def test_logits_that_are_no_numbers_end_their_request_only() -> None:
    """The embedding of one byte is not a number; keys and values of that request poison blocks that others get next."""
    model = byte_model()
    llm = LLM(model, byte_tokenizer(), num_blocks=30, block_size=4)
    expected = tokens(llm, ["abc", "xyz"], GREEDY)
    model.model.embed_tokens.weight[byte_tokenizer()(POISON)["input_ids"][0]] = float("nan")
    outputs = llm.generate(["abc", POISON * 40, "xyz"], GREEDY)
    assert outputs[1].finished and outputs[1].outputs[0].finish_reason == "error"
    assert isinstance(outputs[1].outputs[0].error, NumericalError)
    assert [outputs[i].outputs[0].token_ids for i in (0, 2)] == expected
    assert all(outputs[i].outputs[0].error is None for i in (0, 2))
    assert_idle(llm)
    assert tokens(llm, ["abc", "xyz"] * 3, GREEDY) == expected * 3
    with pytest.raises(NumericalError):
        list(llm.stream(POISON, GREEDY))
    assert_idle(llm)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "wanted", "shows"), [(Terminal, True, True), (Terminal, False, False), (io.StringIO, True, False)]
)
def test_a_progress_bar_is_for_terminals(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO], wanted: bool, shows: bool
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stream())
    llm.generate(PROMPTS, replace(GREEDY, max_tokens=2), use_tqdm=wanted)
    assert bool(sys.stderr.getvalue()) is shows  # type: ignore[attr-defined]


def test_token_ids_need_no_tokenizer() -> None:
    llm = LLM(byte_model(), num_blocks=16)
    (output,) = llm.generate({"prompt_token_ids": [5, 6, 7]}, GREEDY)
    assert len(output.outputs[0].token_ids) == 24 and output.outputs[0].text == ""
    assert output.prompt_token_ids == [5, 6, 7]
    for bad in ("text", {"prompt": "text"}, 5):
        with pytest.raises(InputError) as caught:
            llm.generate([bad], GREEDY)  # type: ignore[list-item]
        assert caught.value.field == "prompt"
    with pytest.raises(InputError, match="tokenizer"):
        llm.stream("text")
