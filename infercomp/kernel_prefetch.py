"""Kernels built while the model is still being captured.

Layers repeat, and equal layers share kernels: a copy of the model with a few layers wants the same kernels
as the model itself, and is captured in a small part of its time. What it wants is built beside the capture
of the whole model. This is a guess that nothing depends on: lowering asks for its kernels by their texts,
finds those that were guessed right, and builds the others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import torch

from .codegen.cpp.toolchain import cache_folder, fingerprint
from .codegen.lower import start_building_kernels
from .codegen.steps import start_executor
from .codegen.target import language_of
from .compiler import rewrite_graph
from .config import Config
from .runtime.errors import InfercompError
from .serving import capture_for_serving, position_limit

# Fewer are captured as quickly as they are copied.
_WORTHWHILE_LAYERS = 6
# The first layer may read what no other reads, and the one after it shows how layers join.
_KEPT_OF_A_KIND = 2


def prefetch_kernels(model: torch.nn.Module, config: Config) -> Future[Path] | None:
    """Start to build the kernels that serving ``model`` will probably want.

    None where they have been built before, and where this would save nothing: few layers, or no kernels.
    """
    if language_of(config.codegen, next(model.parameters()).device) != "cpp":
        return None
    short = _shortened(model)
    if short is None:
        return None
    note = cache_folder(config.codegen.cache_dir) / f"{_fingerprint(short, config)}.built"
    if note.exists() and (note.parent / note.read_text()).exists():
        return None
    start_executor(config.codegen)
    building = _start(short, config)
    if building is not None:
        building.add_done_callback(lambda done: _write_note(note, done))
    return building


def _start(short: torch.nn.Module, config: Config) -> Future[Path] | None:
    unobserved = replace(config, passes=replace(config.passes, verify=False), dump=None)
    try:
        captured, examples = capture_for_serving(short, position_limit(short))
        rewritten = rewrite_graph(captured, unobserved, examples, serving=True)
        return start_building_kernels(rewritten.model_graph, config.codegen)
    except InfercompError:
        # The model itself will say it better.
        return None


def _write_note(note: Path, done: Future[Path]) -> None:
    if done.exception() is None:
        note.write_text(done.result().name)


def _fingerprint(short: torch.nn.Module, config: Config) -> str:
    dtypes = sorted({str(parameter.dtype) for parameter in short.parameters()})
    described = (repr(short), str(getattr(short, "config", None)), *dtypes, config.fingerprint(), torch.__version__)
    return fingerprint(described, config.codegen)


def _shortened(model: torch.nn.Module) -> torch.nn.Module | None:
    """The model with the first layers of each kind only, sharing all tensors; None where that saves little."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    name, layers = max(found, key=lambda pair: len(pair[1]), default=("", torch.nn.ModuleList()))
    kept = list(_first_of_each_kind(layers))
    if len(layers) - len(kept) < _WORTHWHILE_LAYERS:
        return None
    return _with_module(model, name.split("."), torch.nn.ModuleList(kept))


def _first_of_each_kind(layers: torch.nn.ModuleList) -> Iterator[torch.nn.Module]:
    seen: dict[str, int] = {}
    for layer in layers:
        kind = repr(layer) + str([_settings(module) for module in layer.modules()])
        seen[kind] = seen.get(kind, 0) + 1
        if seen[kind] <= _KEPT_OF_A_KIND:
            yield layer


def _settings(module: torch.nn.Module) -> list[tuple[str, object]]:
    """What a layer may decide by; its number among the layers is no kind of its own."""
    plain = {name: value for name, value in vars(module).items() if isinstance(value, (bool, float, str, int))}
    return sorted((name, value) for name, value in plain.items() if name not in ("layer_idx", "layer_id"))


def _with_module(model: torch.nn.Module, path: list[str], replacement: torch.nn.Module) -> torch.nn.Module:
    """A copy of the modules along ``path`` that ends in ``replacement``; everything beside it is shared."""
    if not path or path == [""]:
        return replacement
    copied = copy.copy(model)
    copied._modules = dict(model._modules)
    child = copied._modules[path[0]]
    assert child is not None
    copied._modules[path[0]] = _with_module(child, path[1:], replacement)
    return copied
