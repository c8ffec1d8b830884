"""A saved model: a folder that is loaded and served with no tracing, no passes and, mostly, no compiling.

    infercomp.json        what it is: options, passes' report, the program as data (see ``codegen.saved``)
    model.safetensors     its tensors, each once, under the model's own names where they have such
    config.json           the model's own, with ``quantization_config``; absent where other tools could not read it
    tokenizer.json …      as the tokenizer writes them

The folder holds data only: nothing in it is unpickled, imported or run.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from . import __version__
from .codegen.saved.dtypes import dtype_named
from .codegen.saved.program_data import ProgramData, program_data, program_of
from .config import Config
from .loading.compressed_tensors import (
    ZERO,
    Bits,
    BitsOf,
    program_form,
    quantization_config,
    stored_name,
    stored_tensors,
)
from .loading.safetensors_file import StoredTensor, read_safetensors_header
from .passes.config import PassConfig
from .passes.grouped_query import GroupedQuery
from .passes.linear_recipes import Recipe
from .passes.n_m_sparsity import NM
from .report import Report
from .runtime.config import describe
from .runtime.errors import ConfigError, ModelLoadError, UnsupportedError
from .runtime.kv_pools import TILED_TOKENS, KvCacheSpec
from .served_model import ServedForm, ServedLinear, ServedModel

MANIFEST, WEIGHTS, MODEL_CONFIG = "infercomp.json", "model.safetensors", "config.json"
FORMAT = 2
_REMEDY = "copy the saved model again, or save it anew"


@dataclass(frozen=True)
class StoredAs:
    """A weight of the program: its tensor in ``model.safetensors``, and what it is in the program."""

    tensor: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """``infercomp.json``; ``tensors`` says what each weight of the program is read from."""

    format: int
    infercomp: str
    torch: str
    passes: dict[str, Any]
    device: str
    vocab_size: int
    position_limit: int | None
    eos_token_ids: tuple[int, ...]
    cache_specs: tuple[KvCacheSpec, ...]
    linears: tuple[ServedLinear, ...]
    tensors: dict[str, StoredAs]
    report: Report
    program: ProgramData


def is_artifact(source: object) -> bool:
    """Whether ``source`` is the folder of a saved model."""
    return isinstance(source, (str, os.PathLike)) and (Path(source).expanduser() / MANIFEST).is_file()


def require_free(folder: Path) -> None:
    """Raise ConfigError for a folder that a saved model would overwrite something else in."""
    if folder.exists() and not (folder.is_dir() and (is_artifact(folder) or not any(folder.iterdir()))):
        what = f"{folder} holds something else than a saved model"
        raise ConfigError(what, remedy="name a folder that does not exist yet", field="folder")


def save_artifact(served: ServedModel, tokenizer: Any, folder: Path) -> None:
    """Write a saved model into ``folder``, which is made whole or not at all.

    Raises ConfigError for a folder that holds something else or cannot be written, UnsupportedError for a
    program that cannot be saved.
    """
    require_free(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        workplace = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        _write(served, tokenizer, workplace)
        if folder.exists():
            shutil.rmtree(folder)
        workplace.chmod(0o777 & ~_umask())
        workplace.replace(folder)
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


def load_artifact(source: str | os.PathLike[str], config: Config) -> tuple[ServedForm, MutableMapping[str, Any]]:
    """The served form of a saved model, and its weights, which are read when they are asked for.

    ``config`` says how to serve it; what it was compiled with is the folder's own. Raises ConfigError for
    an option that says otherwise, ModelLoadError for a folder that is damaged or of another format.
    """
    folder = Path(source).expanduser()
    manifest = _read_manifest(folder / MANIFEST)
    config = _with_saved_options(config, manifest)
    stored = read_safetensors_header(folder / WEIGHTS)
    _check_tensors(manifest, stored, folder / WEIGHTS)
    form = ServedForm(
        program_of(manifest.program, config.codegen),
        manifest.report,
        config,
        manifest.cache_specs,
        manifest.vocab_size,
        torch.device(manifest.device),
        manifest.position_limit,
        frozenset(manifest.eos_token_ids),
        {name: stored_as.tensor for name, stored_as in manifest.tensors.items()},
        json.loads(path.read_text()) if (path := folder / MODEL_CONFIG).is_file() else None,
        manifest.linears,
    )
    return form, StoredWeights(stored, dict(manifest.tensors), _bits_of(form.linears, form.tensor_names), form.device)


class StoredWeights(MutableMapping[str, torch.Tensor]):
    """A program's weights by name, each read when it is first asked for and held until it is deleted."""

    def __init__(
        self, stored: dict[str, StoredTensor], weights: dict[str, StoredAs], bits_of: BitsOf, device: torch.device
    ) -> None:
        self._stored = stored
        self._weights = weights
        self._bits_of = bits_of
        self._device = device
        self._read: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._read:
            wanted = self._weights[name]
            stored = self._stored[wanted.tensor].read()
            bits = self._bits_of(wanted.tensor.rpartition(".")[0]).weight
            self._read[name] = program_form(wanted.tensor, stored, wanted.shape, wanted.dtype, bits).to(self._device)
        return self._read[name]

    def __setitem__(self, name: str, value: torch.Tensor) -> None:
        self._read[name] = value

    def __delitem__(self, name: str) -> None:
        del self._weights[name]
        self._read.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _write(served: ServedModel, tokenizer: Any, folder: Path) -> None:
    from safetensors.torch import save_file

    form = served.form
    bits_of = _bits_of(form.linears, form.tensor_names)
    weights, names = _named_weights(served, bits_of)
    manifest = Manifest(
        FORMAT,
        __version__,
        str(torch.__version__),
        _saved_options(form.config.passes),
        form.device.type,
        form.vocab_size,
        form.position_limit,
        tuple(sorted(form.eos_token_ids)),
        form.cache_specs,
        form.linears,
        names,
        form.report,
        program_data(form.program, form.config.codegen),
    )
    save_file(stored_tensors(weights, bits_of), folder / WEIGHTS, metadata={"format": "pt"})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if form.model_config is not None:
        quantization = quantization_config(weights, bits_of)
        config = {**form.model_config, **({"quantization_config": quantization} if quantization else {})}
        (folder / MODEL_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest, enc_hook=_encoded), indent=1))


def _named_weights(served: ServedModel, bits_of: BitsOf) -> tuple[dict[str, torch.Tensor], dict[str, StoredAs]]:
    """The weights by their names in the file, and which of them each name in the program is; one memory is one."""
    weights: dict[str, torch.Tensor] = {}
    names: dict[str, StoredAs] = {}
    known: dict[tuple[Any, ...], str] = {}
    for name, tensor in served.source_weights():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if key not in known:
            wanted = stored_name(served.form.tensor_names.get(name, name), tensor, bits_of)
            known[key] = wanted if wanted not in weights else name
            weights[known[key]] = tensor.detach().cpu().contiguous()
        names[name] = StoredAs(known[key], tensor.dtype, tuple(tensor.shape))
    return weights, names


def _bits_of(linears: Iterable[ServedLinear], tensor_names: Mapping[str, str]) -> BitsOf:
    """By the names of layers in the file; a layer that is no linear has floats."""
    bits = {
        tensor_names.get(name, name).rpartition(".")[0]: Bits(each.weight_bits, each.activation_bits, each.input_step)
        for each in linears
        for name in each.tensors
    }
    return lambda layer: bits.get(layer, Bits(16, 16))


def _saved_options(passes: PassConfig) -> dict[str, Any]:
    values = {each.name: getattr(passes, each.name) for each in dataclasses.fields(passes)}
    return {
        name: value.to_json() if isinstance(value, (GroupedQuery, NM, Recipe)) else value
        for name, value in values.items()
    }


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{folder} cannot be written: {error}", remedy="name another folder", field="folder")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _read_manifest(path: Path) -> Manifest:
    try:
        content = path.read_bytes()
        found = msgspec.json.decode(content, type=dict[str, Any]).get("format")
        if found == FORMAT:
            return msgspec.json.decode(content, type=Manifest, dec_hook=_decoded)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"The saved model cannot be read: {error}.", where=str(path), remedy=_REMEDY) from error
    what = f"The saved model has format {describe(found)}, and this version of infercomp reads {FORMAT}."
    raise ModelLoadError(what, where=str(path), remedy="save it anew with this version", field="format")


def _encoded(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    raise NotImplementedError(type(value).__name__)


def _decoded(kind: type, value: Any) -> Any:
    if kind is torch.dtype:
        return dtype_named(value)
    raise NotImplementedError(kind.__name__)


def _with_saved_options(config: Config, manifest: Manifest) -> Config:
    """``config`` with the passes that the model went through; an option that asks for others is refused."""
    saved = type(config.passes)(**{name: _frozen(value) for name, value in manifest.passes.items()})
    for each in dataclasses.fields(saved):
        asked, has = getattr(config.passes, each.name), getattr(saved, each.name)
        canonical = each.metadata.get("fingerprint", lambda value: value)
        if asked != each.default and canonical(asked) != canonical(has):
            raise _fixed(each.name, asked, has)
    if config.codegen.codegen not in ("auto", manifest.program.language):
        raise _fixed("codegen", config.codegen.codegen, manifest.program.language)
    if config.dump is not None:
        raise ConfigError("a saved model goes through no passes that could be dumped", field="dump", remedy=_ORIGINAL)
    without = [each for each in manifest.report.executions if each.reason is not None]
    if config.strict and without:
        what = f"strict: the saved model runs {without[0].op} without a kernel: {without[0].reason}"
        raise UnsupportedError(what, field="strict", remedy="leave strict off")
    if any(spec.tile for spec in manifest.cache_specs) and config.runtime.block_size % TILED_TOKENS:
        what = f"the saved model's kernels read blocks of a multiple of {TILED_TOKENS} tokens"
        raise ConfigError(what, field="block_size", remedy=f"use {TILED_TOKENS}, or {_ORIGINAL}")
    return dataclasses.replace(config, passes=saved)


_ORIGINAL = "load the original model with this option"


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _fixed(name: str, asked: object, has: object) -> ConfigError:
    what = f"{name}={asked!r} does not fit a saved model that was compiled with {name}={has!r}"
    return ConfigError(what, field=name, remedy=f"leave it out, or {_ORIGINAL}")


def _check_tensors(manifest: Manifest, stored: Mapping[str, StoredTensor], path: Path) -> None:
    """Every weight that binding asks for is there, in the shape that it is laid out for."""
    for name, shape in manifest.program.sources.items():
        wanted = manifest.tensors.get(name)
        tensor = stored.get(wanted.tensor) if wanted else None
        if wanted is None or tensor is None:
            raise ModelLoadError(f"The file lacks the tensor of {name}.", where=str(path), remedy=_REMEDY, field=name)
        num_bytes = math.prod(wanted.shape) * wanted.dtype.itemsize
        is_zeros = wanted.tensor.endswith(ZERO)
        if (shape is not None and wanted.shape != shape) or (tensor.num_bytes != num_bytes and not is_zeros):
            what = f"The tensor has shape {tensor.shape} where the program wants {wanted.shape} of {wanted.dtype}."
            raise ModelLoadError(what, where=f"{path}, {tensor.name}", remedy=_REMEDY, field=tensor.name)
