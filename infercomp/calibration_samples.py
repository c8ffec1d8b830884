"""What ``LLM`` takes as ``calibration`` and ``evaluation``: windows of tokens, as inputs of the captured graph."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .calibration_folder import CalibrationFolder
from .passes.calibration import Calibration
from .passes.config import PassConfig
from .progress import work_progress
from .runtime.config import describe
from .runtime.errors import ConfigError

WINDOW_TOKENS = 512
FEWEST_TOKENS = 128
_LAYER_TOKENS = 1024
_REMEDY = "pass a text file's name, a list of texts, or token ids: tensors of integers, [tokens] or [samples, tokens]"


def calibration_for(
    passes: PassConfig,
    data: Any,
    tokenizer: Any,
    examples: Mapping[str, torch.Tensor],
    *,
    vocab_size: int | None,
    max_positions: int | None,
    folder: str | os.PathLike[str] | None = None,
) -> Calibration | None:
    """The samples that options of ``passes`` need, in windows of at most 512 tokens; None where none are needed.

    ``data`` is the name of a text file, a list of texts, a tensor of token ids [tokens] or [samples, tokens], or a list
    of such; ``examples`` are inputs that the graph was captured with. Raises ConfigError for data of another form, of
    fewer than 128 tokens, with ids that the model does not have, that are missing or that nothing asks for.
    """
    require_calibration(passes, is_given=data is not None)
    if data is None:
        if folder is not None:
            what = "there is nothing to keep: no option asks for calibration data"
            raise ConfigError(what, remedy="leave it out", field="calibration_folder")
        return None
    windows = token_windows(data, tokenizer, "calibration", vocab_size=vocab_size, max_positions=max_positions)
    measured = None if folder is None else CalibrationFolder(folder)
    return Calibration(tuple(_inputs(part, examples) for part in windows), work_progress, measured)


def require_calibration(passes: PassConfig, *, is_given: bool) -> None:
    """Raise ConfigError where data are missing that an option of ``passes`` needs, or given that nothing asks for."""
    option = passes.needs_calibration
    if is_given and option is None:
        raise _error("no option asks for calibration data", "leave it out, or choose a recipe such as w8a8-smoothquant")
    if option is not None and not is_given:
        raise _error(f"the option {option} needs calibration data", _REMEDY)


def evaluation_for(
    data: Any,
    tokenizer: Any,
    examples: Mapping[str, torch.Tensor],
    *,
    vocab_size: int | None,
    max_positions: int | None,
) -> tuple[Mapping[str, torch.Tensor], ...]:
    """The samples that errors of layers are measured on: the first 1,024 tokens of ``data``, which may be None."""
    if data is None:
        return ()
    windows = token_windows(
        data, tokenizer, "evaluation", vocab_size=vocab_size, max_positions=max_positions, most_tokens=_LAYER_TOKENS
    )
    return tuple(_inputs(part, examples) for part in windows)


def token_windows(
    data: Any,
    tokenizer: Any,
    field: str,
    *,
    vocab_size: int | None,
    max_positions: int | None,
    most_tokens: int | None = None,
) -> list[torch.Tensor]:
    """The tokens of ``data``, at most ``most_tokens``, in windows int64 [2 … 512] that the model has positions for.

    Raises ConfigError, naming ``field``, where ``calibration_for`` does.
    """
    sequences = _sequences(data, tokenizer, field)
    for sequence in sequences:
        _check_ids(sequence, vocab_size, field)
    num_tokens = sum(len(sequence) for sequence in sequences)
    if num_tokens < FEWEST_TOKENS:
        raise _error(f"{field} has {num_tokens} tokens, at least {FEWEST_TOKENS} are needed", "pass more text", field)
    # The captured graph takes two tokens or more, and one less than the model has positions.
    window = WINDOW_TOKENS if max_positions is None else min(WINDOW_TOKENS, max_positions - 1)
    parts = [part for sequence in _first(sequences, most_tokens) for part in sequence.split(window)]
    return [part for part in parts if len(part) > 1]


def _first(sequences: Sequence[torch.Tensor], most_tokens: int | None) -> Iterator[torch.Tensor]:
    for sequence in sequences:
        part = sequence[:most_tokens]
        most_tokens = None if most_tokens is None else most_tokens - len(part)
        yield part


def _inputs(tokens: torch.Tensor, examples: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    device = examples["input_ids"].device
    made = {"input_ids": tokens.to(device)[None], "position_ids": torch.arange(len(tokens), device=device)[None]}
    return {name: made[name] for name in examples}


def _sequences(data: Any, tokenizer: Any, field: str) -> list[torch.Tensor]:
    if isinstance(data, (str, os.PathLike)):
        data = [text_of(Path(data), field)]
    if isinstance(data, torch.Tensor):
        data = [data]
    if not isinstance(data, Sequence) or not data:
        raise _error(f"{field} cannot be {describe(data)}", _REMEDY, field)
    if all(isinstance(each, str) for each in data):
        return [_encoded("\n\n".join(data), tokenizer, field)]
    return [row for each in data for row in _rows(each, field)]


def text_of(path: Path, field: str) -> str:
    """The text of a file. Raises ConfigError, naming ``field``, for one that cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _error(f"{field} cannot be read: {error}", _REMEDY, field) from None


def _encoded(text: str, tokenizer: Any, field: str) -> torch.Tensor:
    if tokenizer is None:
        raise _error(f"{field} texts need a tokenizer", "pass LLM(model, tokenizer), or token ids", field)
    return torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int64)


def _rows(tokens: Any, field: str) -> list[torch.Tensor]:
    is_integers = isinstance(tokens, torch.Tensor) and not (tokens.is_floating_point() or tokens.is_complex())
    if not is_integers or tokens.dtype == torch.bool or tokens.dim() not in (1, 2):
        raise _error(f"{field} holds {describe(tokens)}", _REMEDY, field)
    return [row.to(torch.int64) for row in (tokens if tokens.dim() == 2 else tokens[None])]


def _check_ids(tokens: torch.Tensor, vocab_size: int | None, field: str) -> None:
    if len(tokens) and (int(tokens.min()) < 0 or (vocab_size is not None and int(tokens.max()) >= vocab_size)):
        raise _error(
            f"{field} has token ids outside of the vocabulary of {vocab_size}", "use the model's tokenizer", field
        )


def _error(what: str, remedy: str, field: str = "calibration") -> ConfigError:
    return ConfigError(what, remedy=remedy, field=field)
