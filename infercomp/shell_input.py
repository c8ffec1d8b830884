"""What a user typed, as the values that it stands for: model, prompt, types, options.

Nothing here imports torch before the cheap mistakes are found.
"""

from __future__ import annotations

import contextlib
import enum
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infercomp.runtime.errors import ConfigError, InputError

if TYPE_CHECKING:
    import torch

    from infercomp.llm import LLM

DEMO_MODEL = "demo"


class DtypeName(enum.StrEnum):
    """The types that a model's parameters may have."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT64 = "float64"


def resolve_model(model: str) -> str:
    """The model's path or hub id; the word demo stands for the demo model unless a folder has that name."""
    if model != DEMO_MODEL or Path(model).exists():
        return model
    from infercomp.demo_model import demo_model_path

    return str(demo_model_path())


def torch_dtype(dtype: DtypeName | None) -> torch.dtype | None:
    if dtype is None:
        return None
    import torch

    return getattr(torch, dtype.value)


def read_prompt(prompt: str) -> str:
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise InputError("the prompt is empty", field="prompt", remedy="pass at least one character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError("the prompt is not valid UTF-8", field="prompt", remedy="pass text in UTF-8") from None
    return text


def checked_options(pairs: list[str] | None) -> dict[str, object]:
    """The ``--option`` values by name, typed; checked here so that a mistake is found before a model is loaded."""
    from infercomp.config import parse_options

    options: dict[str, object] = {}
    for pair in pairs or ():
        name, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(
                f"--option takes KEY=VALUE, not {pair!r}", field="option", remedy="for example --option num_blocks=64"
            )
        options[name] = _typed(name, text)
    config = parse_options(options)
    if config.passes.disable:
        from infercomp.passes.config import check_pass_names
        from infercomp.passes.pipeline import pass_names

        check_pass_names(config.passes, pass_names())
    return options


_TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def _typed(name: str, text: str) -> object:
    """The value that ``text`` stands for; text that does not fit stays as it is, for ``parse_options`` to refuse."""
    from infercomp.config import option_types

    wanted = option_types().get(name)
    if wanted is bool:
        return _TRUTH.get(text.lower(), text)
    if wanted in (int, int | None):
        with contextlib.suppress(ValueError):
            return int(text)
    return text


def chat_prompt(llm: LLM, text: str) -> dict[str, list[int]]:
    """One user message, as the model's chat template puts it."""
    if getattr(llm.tokenizer, "chat_template", None) is None:
        raise InputError("this model has no chat template", field="chat", remedy="leave --chat out")
    messages = [{"role": "user", "content": text}]
    encoded = llm.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return {"prompt_token_ids": list(encoded["input_ids"])}


def example_inputs(loaded: Any, text: str, examples: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tokens of ``text`` in the form of ``examples``."""
    import torch

    from infercomp.runtime.request import checked_prompt
    from infercomp.serving import position_limit

    if loaded.tokenizer is None:
        raise InputError("this model comes without a tokenizer", field="prompt", remedy="leave --prompt out")
    limit = position_limit(loaded.model)
    token_ids = checked_prompt(list(loaded.tokenizer(text)["input_ids"]), limit or sys.maxsize)
    if len(token_ids) < 2:
        raise InputError("one token is too few to verify on", field="prompt", remedy="use a longer --prompt")
    inputs = {"input_ids": torch.tensor([token_ids]), "position_ids": torch.arange(len(token_ids))[None]}
    return {name: inputs[name] for name in examples}
