"""Models next to the one that they were made from: an account of each, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from .account import Account, account_of, size_of, tokens_per_second
from .calibration_samples import token_windows
from .llm import LLM
from .progress import work_progress
from .quality import Quality
from .report import print_layer_errors
from .runtime.errors import ConfigError

_MEGA = 1e6
_SPARSE_BELOW = 0.9
_HEADINGS = ("bits", "linears", "all MB", "KL", "p99", "top-1", "ppl", "tok/s")


def compare(
    model: Any, others: Mapping[str, Any], evaluation: Any, *, most_tokens: int, times: bool = True, **options: Any
) -> list[Account]:
    """Accounts of ``model`` in float32, which is the reference, and of each of ``others`` against it.

    Models are what ``LLM`` takes, ``evaluation`` is what ``calibration_samples.token_windows`` takes, and ``options``
    say how to serve them. The reference and one other are in memory at a time. Raises ConfigError for a reference that
    is quantised itself, and for a model with another vocabulary.
    """
    reference = LLM(model, dtype=torch.float32, quantization=None, **options)
    if reference.config.passes.recipe is not None:
        remedy = "name the model that the others were made from"
        raise ConfigError("the model to compare with is quantised itself", remedy=remedy, field="model")
    form = reference._served.form
    limits = {"vocab_size": form.vocab_size, "max_positions": reference.max_model_len}
    windows = [
        window.tolist()
        for window in token_windows(evaluation, reference.tokenizer, "evaluation", most_tokens=most_tokens, **limits)
    ]
    with work_progress(len(others) * len(windows)) as begin:
        accounts = []
        for name, source in others.items():
            llm = LLM(source, **options)
            _require_vocabulary(llm, name, form.vocab_size)
            accounts.append(account_of(name, llm, reference.logits, windows, times=times, begin=begin))
            del llm
    return [_of_reference(reference, accounts[0].quality, windows[0], times), *accounts]


def _of_reference(reference: LLM, other: Quality, prompt: Sequence[int], times: bool) -> Account:
    perplexity = other.reference_perplexity
    quality = Quality(other.num_tokens, 0.0, 0.0, 1.0, perplexity, perplexity)
    speed = tokens_per_second(reference, prompt) if times else None
    return Account("reference", "float32", None, quality, size_of(reference._served), speed, {})


def _require_vocabulary(llm: LLM, name: str, vocab_size: int) -> None:
    found = llm._served.form.vocab_size
    if found != vocab_size:
        what = f"{name} has a vocabulary of {found} words, the model to compare with one of {vocab_size}"
        raise ConfigError(what, remedy="compare models that were made from the same one", field="model")


def print_accounts(accounts: Sequence[Account], console: Console) -> None:
    """One line a model; what the columns mean is in docs/quantization.md."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("model", overflow="fold")
    for heading in _HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for each in accounts:
        table.add_row(f"{each.name}, {each.dtype}", *_cells(each))
    console.print(table)
    quality, size = accounts[0].quality, accounts[0].size
    line = f"{quality.num_tokens} tokens; {size.kv_bytes_per_token} bytes of cache a token in the reference"
    others = [each for each in accounts[1:] if each.size.kv_bytes_per_token != size.kv_bytes_per_token]
    line += "".join(f", {each.size.kv_bytes_per_token} in {each.name}" for each in others)
    sparse = [each for each in accounts if each.size.density < _SPARSE_BELOW]
    line += "".join(f"; {each.size.density:.1%} of the linears' weights are not zero in {each.name}" for each in sparse)
    console.print(line, style="dim", highlight=False)
    for each in accounts:
        print_layer_errors(each.layer_errors, console)


def _cells(account: Account) -> list[str]:
    quality, size = account.quality, account.size
    return [
        f"{size.bits_per_weight:.2f}",
        f"{size.linear_bytes / _MEGA:.2f}",
        f"{size.model_bytes / _MEGA:.2f}",
        f"{quality.mean_nats:.4f}",
        f"{quality.p99_nats:.4f}",
        f"{quality.top_1:.1%}",
        f"{quality.perplexity:.2f}",
        "" if account.tokens_per_second is None else f"{account.tokens_per_second:.1f}",
    ]
