"""Pieces of text add up to the whole, whatever the tokens; stop strings are met whatever the pieces."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from infercomp.runtime.detokenize import IncrementalDetokenizer, StopChecker, TextStream, special_token_ids

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "Eine Brücke über die Straße; naïve café, señor, smörgåsbord.",
    "你好世界。今天天气很好。我们去公园散步吧。",
    "こんにちは世界。ありがとうございます。",
    "Привет, мир! Как дела? مرحبا بالعالم नमस्ते दुनिया",
    "😀😃🎉👩‍👩‍👧‍👦🏳️‍🌈👍🏽 emoji 🚀 and a plain � too",
]


def byte_level_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE as in GPT-2 and Llama 3; a small vocabulary leaves most characters cut into bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>", "<|reserved|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def sentencepiece_like_tokenizer() -> PreTrainedTokenizerFast:
    """Word marks and byte fallback as in Llama 2: the decoder drops the space in front of the first word."""
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["<unk>", "</s>", *byte_pieces, "▁", "▁he", "llo", "▁wor", "ld", "a", "."]
    vocabulary = {piece: token_id for token_id, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


SMALL = byte_level_tokenizer(300)
LARGE = byte_level_tokenizer(600)
WORDS = sentencepiece_like_tokenizer()


def pieces_of(tokenizer: PreTrainedTokenizerFast, token_ids: list[int]) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer)
    return [*(detokenizer.append([token_id]) for token_id in token_ids), detokenizer.flush()]


@settings(deadline=None, max_examples=150)
@given(text=st.text(st.sampled_from(sorted(set("".join(CORPUS)))), max_size=40))
@pytest.mark.parametrize("tokenizer", [SMALL, LARGE], ids=["small", "large"])
def test_text_comes_back_without_a_broken_character(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    pieces = pieces_of(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    if "�" not in text:
        assert not any("�" in piece for piece in pieces)


@settings(deadline=None, max_examples=300)
@given(token_ids=st.lists(st.integers(0, len(LARGE) + 5), max_size=80))
def test_any_tokens_add_up_to_the_full_decode(token_ids: list[int]) -> None:
    """Also ids that the tokenizer does not know: a model's vocabulary is often padded beyond the tokenizer's."""
    assert "".join(pieces_of(LARGE, token_ids)) == LARGE.decode(token_ids, skip_special_tokens=True)


BROKEN_BYTES = [SMALL.convert_tokens_to_ids(c) for c in ("ð", "Ł", "ĺ", "Ģ", "Ñ", "a")]


@settings(deadline=None, max_examples=200)
@given(token_ids=st.lists(st.sampled_from([*BROKEN_BYTES, 0, 1]), min_size=40, max_size=220))
def test_long_broken_utf8_adds_up_to_the_full_decode(token_ids: list[int]) -> None:
    assert "".join(pieces_of(SMALL, token_ids)) == SMALL.decode(token_ids, skip_special_tokens=True)


PIECES_OF_WORDS = [["▁he", "llo"], ["▁wor", "ld"], ["▁"], ["."], ["</s>"], ["<0xE4>", "<0xBD>", "<0xA0>"]]


@settings(deadline=None)
@given(words=st.lists(st.sampled_from(PIECES_OF_WORDS), max_size=30))
def test_word_marks_and_byte_fallback_add_up_to_the_full_decode(words: list[list[str]]) -> None:
    token_ids = WORDS.convert_tokens_to_ids([piece for word in words for piece in word])
    assert "".join(pieces_of(WORDS, token_ids)) == WORDS.decode(token_ids, skip_special_tokens=True)


def test_a_character_is_emitted_as_soon_as_it_is_complete() -> None:
    token_ids = SMALL.encode("é😀a")
    pieces = pieces_of(SMALL, token_ids)
    assert [piece for piece in pieces if piece] == ["é", "😀", "a"]
    assert pieces[-2:] == ["a", ""]


def test_a_prompt_that_ends_inside_a_character_does_not_leak() -> None:
    token_ids = SMALL.encode("secret 😀 done")
    cut = len(SMALL.encode("secret ")) + 2
    text = "".join(pieces_of(SMALL, token_ids[cut:]))
    assert "secret" not in text and "😀" not in text and text.endswith(" done")


def test_special_tokens_are_silent_and_never_pile_up() -> None:
    assert special_token_ids(LARGE) == {0, 1}
    detokenizer = IncrementalDetokenizer(LARGE)
    assert detokenizer.append([0] * 10_000) == ""
    assert detokenizer._window == []


@pytest.mark.parametrize("kind", ["text", "broken", "replacement"])
def test_cost_is_linear(kind: str) -> None:
    """Decoded tokens are counted, not timed: a constant number per appended token."""
    token_ids = {
        "text": LARGE.encode("the dog 你好 😀 " * 100),
        "broken": [BROKEN_BYTES[0]] * 2000,
        "replacement": SMALL.encode("�" * 300),
    }[kind]
    tokenizer = CountingTokenizer(SMALL if kind != "text" else LARGE)
    detokenizer = IncrementalDetokenizer(tokenizer)
    text = detokenizer.append(token_ids) + detokenizer.flush()
    assert text == tokenizer.inner.decode(token_ids)
    assert tokenizer.num_decoded_tokens < 60 * len(token_ids)


class CountingTokenizer:
    """Counts the tokens that go through ``decode``."""

    def __init__(self, inner: PreTrainedTokenizerFast) -> None:
        self.inner = inner
        self.num_decoded_tokens = 0

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        self.num_decoded_tokens += len(token_ids)
        return str(self.inner.decode(token_ids, skip_special_tokens=skip_special_tokens))


class HalfCharacterDetokenizer(IncrementalDetokenizer):
    """Planted bug: every token is decoded for itself."""

    def _append_one(self, token_id: int) -> str:
        return self._decode([token_id])


def test_decoding_token_by_token_would_be_noticed() -> None:
    token_ids = SMALL.encode("你好 😀")
    detokenizer = HalfCharacterDetokenizer(SMALL)
    assert detokenizer.append(token_ids) + detokenizer.flush() != SMALL.decode(token_ids)


def reference_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Read character by character; at the first end of a stop string, cut at the earliest beginning."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


short_text = st.text("ab", max_size=12)


@settings(max_examples=300)
@given(pieces=st.lists(short_text, max_size=8), stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_strings_do_not_depend_on_the_pieces(pieces: list[str], stops: list[str]) -> None:
    checker = StopChecker(stops)
    whole_text, stop = reference_stop("".join(pieces), stops)
    shown = ""
    for piece in pieces:
        shown += checker.append(piece)
        assert whole_text.startswith(shown), "text that belongs to a stop string was let out"
    assert checker.matched == stop
    assert shown + checker.flush() == whole_text


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    checker = StopChecker(["\nUser:"])
    assert [checker.append(piece) for piece in ("Hi", "\nUs", "e", "d.", "\nUser:x", "more")] == [
        "Hi",
        "",
        "",
        "\nUsed.",
        "",
        "",
    ]
    assert checker.matched == "\nUser:" and checker.flush() == ""


def test_many_stop_strings_stay_affordable() -> None:
    checker = StopChecker(["a" * 255 + chr(ord("b") + i) for i in range(16)])
    start = time.perf_counter()
    for _ in range(200):
        checker.append("a")
    assert time.perf_counter() - start < 2.0


def test_a_stream_without_a_tokenizer_is_empty() -> None:
    stream = TextStream(None, ())
    stream.append(5)
    stream.flush()
    assert stream.text == "" and stream.matched_stop is None
