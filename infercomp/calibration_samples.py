"""What ``LLM(..., calibration=...)`` takes, as inputs of the captured graph."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .passes.calibration import Calibration
from .passes.linear_recipes import Recipe
from .progress import work_progress
from .runtime.config import describe
from .runtime.errors import ConfigError

WINDOW_TOKENS = 512
FEWEST_TOKENS = 128
_REMEDY = "pass a text file's name, a list of texts, or token ids: tensors of integers, [tokens] or [samples, tokens]"


def calibration_for(
    recipe: Recipe | None,
    data: Any,
    tokenizer: Any,
    examples: Mapping[str, torch.Tensor],
    *,
    vocab_size: int | None,
    max_positions: int | None,
) -> Calibration | None:
    """The samples that a recipe needs, in windows of at most 512 tokens; None where it needs none.

    ``data`` is the name of a text file, a list of texts, a tensor of token ids [tokens] or [samples, tokens], or a list
    of such; ``examples`` are inputs that the graph was captured with. Raises ConfigError for data of another form, of
    fewer than 128 tokens, with ids that the model does not have, that are missing or that no recipe asks for.
    """
    is_needed = recipe is not None and recipe.needs_calibration
    if not is_needed:
        if data is not None:
            raise _error(
                "no recipe asks for calibration data", "leave it out, or choose a recipe such as w8a8-smoothquant"
            )
        return None
    if data is None:
        raise _error("the recipe needs calibration data", _REMEDY)
    sequences = _sequences(data, tokenizer)
    for sequence in sequences:
        _check_ids(sequence, vocab_size)
    num_tokens = sum(len(sequence) for sequence in sequences)
    if num_tokens < FEWEST_TOKENS:
        raise _error(f"calibration has {num_tokens} tokens, at least {FEWEST_TOKENS} are needed", "pass more text")
    # The captured graph takes two tokens or more, and one less than the model has positions.
    window = WINDOW_TOKENS if max_positions is None else min(WINDOW_TOKENS, max_positions - 1)
    windows = [part for sequence in sequences for part in sequence.split(window) if len(part) > 1]
    return Calibration(tuple(_inputs(part, examples) for part in windows), work_progress)


def _inputs(tokens: torch.Tensor, examples: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    device = examples["input_ids"].device
    made = {"input_ids": tokens.to(device)[None], "position_ids": torch.arange(len(tokens), device=device)[None]}
    return {name: made[name] for name in examples}


def _sequences(data: Any, tokenizer: Any) -> list[torch.Tensor]:
    if isinstance(data, (str, os.PathLike)):
        data = [_text_of(Path(data))]
    if isinstance(data, torch.Tensor):
        data = [data]
    if not isinstance(data, Sequence) or not data:
        raise _error(f"calibration cannot be {describe(data)}", _REMEDY)
    if all(isinstance(each, str) for each in data):
        return [_encoded("\n\n".join(data), tokenizer)]
    return [row for each in data for row in _rows(each)]


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _error(f"calibration cannot be read: {error}", _REMEDY) from None


def _encoded(text: str, tokenizer: Any) -> torch.Tensor:
    if tokenizer is None:
        raise _error("calibration texts need a tokenizer", "pass LLM(model, tokenizer), or token ids")
    return torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int64)


def _rows(tokens: Any) -> list[torch.Tensor]:
    is_integers = isinstance(tokens, torch.Tensor) and not (tokens.is_floating_point() or tokens.is_complex())
    if not is_integers or tokens.dtype == torch.bool or tokens.dim() not in (1, 2):
        raise _error(f"calibration holds {describe(tokens)}", _REMEDY)
    return [row.to(torch.int64) for row in (tokens if tokens.dim() == 2 else tokens[None])]


def _check_ids(tokens: torch.Tensor, vocab_size: int | None) -> None:
    if len(tokens) and (int(tokens.min()) < 0 or (vocab_size is not None and int(tokens.max()) >= vocab_size)):
        raise _error(
            f"calibration has token ids outside of the vocabulary of {vocab_size}", "use the model's tokenizer"
        )


def _error(what: str, remedy: str) -> ConfigError:
    return ConfigError(what, remedy=remedy, field="calibration")
