"""Tokens to text as they come: never half a character, never the prompt, never part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

REPLACEMENT_CHARACTER = "\ufffd"
MOST_WINDOW_TOKENS = 48
# A UTF-8 character has at most four bytes and a token at least one, so what is before the last four is settled.
MOST_UNSETTLED_TOKENS = 4
MOST_SPLIT_ATTEMPTS = 8


class Tokenizer(Protocol):
    """What is needed of a tokenizer; every Hugging Face tokenizer has it."""

    def decode(self, token_ids: Any, /, *, skip_special_tokens: bool = ...) -> Any: ...


class IncrementalDetokenizer:
    """Decodes the output tokens of one sequence piece by piece, at a cost linear in their number.

    The pieces together with ``flush()`` are ``tokenizer.decode(output_token_ids, skip_special_tokens=True)``.
    Text that ends in U+FFFD is held back: it may be a character of which some bytes are still to come.
    One exception: a byte-fallback decoder (SentencePiece) replaces a whole run of bytes for one bad byte
    at its end; a character of that run that was already complete has been emitted and stays.

    The method is the prefix/read window of text-generation-inference: tokens up to ``_num_read`` of the
    window have been emitted and stay in it, because some decoders treat the first token in a special way.
    The prompt is not in the window, so no error in this book-keeping can let it out.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._silent_token_ids = special_token_ids(tokenizer)
        self._window: list[int] = []
        self._num_read = 0
        self._num_emitted_characters = 0

    def append(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete; may be empty."""
        return "".join([self._append_one(token_id) for token_id in token_ids])

    def flush(self) -> str:
        """The text held back; call it once, when no more tokens come."""
        text = self._decode(self._window)[self._num_emitted_characters :]
        self._window, self._num_read, self._num_emitted_characters = [], 0, 0
        return text

    def _append_one(self, token_id: int) -> str:
        if token_id in self._silent_token_ids:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        if len(text) <= self._num_emitted_characters or text.endswith(REPLACEMENT_CHARACTER):
            return self._split_window(text) if len(self._window) > MOST_WINDOW_TOKENS else ""
        delta = text[self._num_emitted_characters :]
        self._window = self._window[self._num_read :]
        self._num_read = len(self._window)
        self._num_emitted_characters = len(self._decode(self._window))
        return delta

    def _split_window(self, text: str) -> str:
        """Emit the settled part of a window that has grown long (garbage bytes), so that the cost stays linear."""
        latest = len(self._window) - MOST_UNSETTLED_TOKENS
        for num_settled in range(latest, max(self._num_read, latest - MOST_SPLIT_ATTEMPTS), -1):
            head, tail = self._decode(self._window[:num_settled]), self._decode(self._window[num_settled:])
            if tail and head + tail == text:
                delta = head[self._num_emitted_characters :]
                self._window, self._num_read, self._num_emitted_characters = self._window[num_settled:], 0, 0
                return delta
        return ""

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))


def special_token_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens the tokenizer calls special and decodes to nothing."""
    candidates = set(getattr(tokenizer, "all_special_ids", ()))
    for token_id, token in getattr(tokenizer, "added_tokens_decoder", {}).items():
        if token.special:
            candidates.add(token_id)
    return frozenset(t for t in candidates if tokenizer.decode([t], skip_special_tokens=True) == "")


class StopChecker:
    """Lets text through up to the first stop string, holding back what may still become one.

    ``matched`` is the stop string that was met: the one that is complete first when reading character by
    character, of several complete at once the longest. How the text is cut into pieces plays no part.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stop_strings = tuple(stop_strings)
        self._longest_prefix = max((len(string) - 1 for string in self._stop_strings), default=0)
        self._held = ""
        self.matched: str | None = None

    def append(self, text: str) -> str:
        """The part of the text so far that is now certain to be output."""
        if self.matched is not None:
            return ""
        text = self._held + text
        ends = [(start + len(stop), start, stop) for stop in self._stop_strings if (start := text.find(stop)) >= 0]
        if ends:
            _, start, self.matched = min(ends)
            self._held = ""
            return text[:start]
        num_held = self._num_to_hold(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        """The text held back; it did not become a stop string."""
        text, self._held = self._held, ""
        return text

    def _num_to_hold(self, text: str) -> int:
        """Length of the longest end of ``text`` that is a beginning of some stop string."""
        for num_held in range(min(len(text), self._longest_prefix), 0, -1):
            end = text[len(text) - num_held :]
            if any(stop.startswith(end) for stop in self._stop_strings):
                return num_held
        return 0


class TextStream:
    """The visible text of one sequence: detokeniser, then stop strings. Without a tokenizer it stays empty."""

    def __init__(self, tokenizer: Tokenizer | None, stop_strings: Sequence[str]) -> None:
        self._detokenizer = None if tokenizer is None else IncrementalDetokenizer(tokenizer)
        self._stop_checker = StopChecker(stop_strings)
        self.text = ""

    @property
    def matched_stop(self) -> str | None:
        return self._stop_checker.matched

    def append(self, token_id: int) -> None:
        """Add a token; afterwards ``matched_stop`` tells whether it completed a stop string."""
        if self._detokenizer is not None:
            self.text += self._stop_checker.append(self._detokenizer.append([token_id]))

    def flush(self) -> None:
        """Release what was held back; the last bytes of a broken character may still complete a stop string."""
        if self._detokenizer is not None:
            self.text += self._stop_checker.append(self._detokenizer.flush())
            self.text += self._stop_checker.flush()
