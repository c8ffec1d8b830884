"""The account of a served model: its quality next to a reference, its size, its speed, the error of each layer."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .bench.engine_runs import decoding
from .bench.protocol import stopwatch
from .llm import LLM
from .quality import Logits, Quality, measure_quality
from .served_model import ServedModel

_PROMPT_TOKENS, _SPEED_STEPS, _WARM_UP_STEPS = 64, 48, 4


@dataclass(frozen=True)
class Size:
    """Weights as they are stored: codes, scales and zeros, or floats of the model's own dtype.

    ``bits_per_weight`` and ``linear_bytes`` are of all linears but the LM head; ``model_bytes`` of everything;
    ``kv_bytes_per_token`` what one token takes in the cache. ``density`` is the part of these linears' weights that is
    not zero; codes of groups count as weights that are none.
    """

    bits_per_weight: float
    linear_bytes: int
    model_bytes: int
    kv_bytes_per_token: int
    density: float = 1.0


@dataclass(frozen=True)
class Account:
    """What one model is and costs.

    ``recipe`` is what it was quantised by, None for floats; ``tokens_per_second`` is the median of decoding one
    sequence, None where it was not measured; ``layer_errors`` has the relative error of each quantised layer's output,
    and is empty where it was not measured when the model was made.
    """

    name: str
    dtype: str
    recipe: dict[str, Any] | None
    quality: Quality
    size: Size
    tokens_per_second: float | None
    layer_errors: dict[str, float]


def account_of(
    name: str,
    llm: LLM,
    reference: Logits,
    windows: Sequence[Sequence[int]],
    *,
    times: bool = True,
    begin: Callable[[str], None] = lambda step: None,
) -> Account:
    """Measure ``llm`` against ``reference`` on windows of token ids; ``begin`` is told of each step."""
    recipe = llm.config.passes.recipe
    return Account(
        name,
        str(llm._served.form.cache_specs[0].dtype).removeprefix("torch."),
        None if recipe is None else recipe.as_dict(),
        measure_quality(llm.logits, reference, windows, lambda window: begin(f"{name}, {window}")),
        size_of(llm._served),
        tokens_per_second(llm, windows[0]) if times else None,
        {layer.removeprefix("model."): error for layer, error in llm.report.layer_errors.items()},
    )


def size_of(served: ServedModel) -> Size:
    """The size of the weights that a model was bound with; one memory of two names counts once."""
    num_bytes: dict[str, int] = {}
    num_zeros: dict[str, int] = {}
    values = {each.tensors[0]: each.num_weights for each in served.form.linears if not each.is_head}
    own: dict[Hashable, int] = {}
    # What is packed is made anew as it is asked for, at an address that says nothing.
    packed = {name for each in served.program.packed_weights for name in each.source_names}
    for name, tensor in served.source_weights():
        num_bytes[name] = tensor.numel() * tensor.element_size()
        if name in values and tensor.dtype != torch.uint8:
            num_zeros[name] = values[name] - int(tensor.count_nonzero())
        own[name if name in packed else (tensor.data_ptr(), tuple(tensor.shape), tensor.dtype)] = num_bytes[name]
    linears = {each.tensors: each for each in served.form.linears if not each.is_head}.values()
    linear_bytes = sum(num_bytes[tensor] for each in linears for tensor in each.tensors)
    num_weights = sum(each.num_weights for each in linears)
    return Size(
        8 * linear_bytes / num_weights if num_weights else 0.0,
        linear_bytes,
        sum(own.values()),
        sum(spec.bytes_per_token for spec in served.form.cache_specs),
        1 - sum(num_zeros.values()) / num_weights if num_weights else 1.0,
    )


def tokens_per_second(llm: LLM, prompt: Sequence[int], num_steps: int = _SPEED_STEPS) -> float:
    """Decoding of one sequence after a prompt, in this process: one token over the median time of a step."""
    slack = llm.max_model_len - _WARM_UP_STEPS - 8
    num_steps = max(1, min(num_steps, slack // 2))
    tokens = [int(each) for each in prompt[: max(1, min(_PROMPT_TOKENS, slack - num_steps))]]
    seconds = []
    with decoding(llm._engine, [tokens], num_steps + _WARM_UP_STEPS) as state:
        for _ in range(_WARM_UP_STEPS):
            state.step()
        for _ in range(num_steps):
            with stopwatch() as watch:
                state.step()
            seconds.append(watch.seconds)
    return 1 / statistics.median(seconds)


def accounts_json(accounts: Sequence[Account], **facts: Any) -> str:
    """Accounts and whatever else is to be known of them as JSON."""
    return json.dumps({"schema": 1, **facts, "models": [asdict(each) for each in accounts]}, indent=2) + "\n"
