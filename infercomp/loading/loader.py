"""Loading a model: from a folder with safetensors, from a GGUF file, or from the hub. Nothing is ever unpickled."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from infercomp.loading.gguf_file import read_gguf_file
from infercomp.loading.safetensors_loader import build_safetensors_model, read_stored_linears, read_stored_tensors
from infercomp.loading.stored_linears import StoredLinear
from infercomp.loading.weight_bytes import Place, as_it_is
from infercomp.runtime.errors import ConfigError, ModelLoadError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model", "vocab.txt", "merges.txt"]
_HUB_IGNORED_FILES = ["*/*", "consolidated*"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model in eval mode without gradients, with its tokenizer if the source carries one.

    ``linears`` are those that the source holds in integers, by name; in the model their weights are zeros.
    """

    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerFast | None
    source: str
    weight_files: tuple[str, ...]
    linears: Mapping[str, StoredLinear] = field(default_factory=dict)


def load(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    takes_integers: bool = False,
    widens_gguf: bool = True,
    place: Place = as_it_is,
) -> LoadedModel:
    """Loads a folder of config.json and safetensors, a ``.gguf`` file, or a hub id such as ``org/name``.

    ``dtype`` is the type of the parameters: by default the checkpoint's own, and float32 for a quantised
    GGUF file. A hub id is looked up in the local cache first and downloaded only if it is not all there.
    A checkpoint with linears in integers is an error unless the caller says that it ``takes_integers``; those of a GGUF
    file become floats, unless it does and not ``widens_gguf``. Each parameter is what ``place`` makes of it once it is
    read: the same values, in memory of the caller's choice.
    """
    if dtype is not None and dtype not in _DTYPES:
        names = ", ".join(str(supported) for supported in _DTYPES)
        raise ConfigError(f"dtype must be one of {names}, not {dtype!r}.", field="dtype", remedy="leave it out")
    path = _resolve(os.fspath(source))
    linears: Mapping[str, StoredLinear] = {}
    if path.is_dir():
        model, tokenizer, weight_files, linears = _load_folder(path, dtype, takes_integers, place)
    else:
        model, tokenizer, weight_files, linears = _load_gguf(path, dtype, takes_integers and not widens_gguf, place)
    check_vocabulary(model, tokenizer, path)
    return LoadedModel(model.requires_grad_(False), tokenizer, os.fspath(source), weight_files, linears)


def _resolve(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return path
        raise _source_error("The file is not a .gguf file.", source, "give a .gguf file or the model's folder")
    if path.suffix.lower() == ".gguf" or not _HUB_ID.fullmatch(source):
        what = "There is no such file or folder, and it is not a hub id."
        raise _source_error(what, source, "give a folder, a .gguf file, or a hub id such as org/name")
    return _fetch_from_hub(source)


def _fetch_from_hub(hub_id: str) -> Path:
    """The cached snapshot if it is complete, else a download; .bin files are never fetched."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    selection: dict[str, Any] = {"allow_patterns": _HUB_FILES, "ignore_patterns": _HUB_IGNORED_FILES}
    try:
        cached = Path(snapshot_download(hub_id, local_files_only=True, **selection))
        read_stored_tensors(cached)
        if (cached / "config.json").is_file():
            return cached
    except (LocalEntryNotFoundError, ModelLoadError):
        pass  # not cached, or only in part: the download below completes it
    try:
        return Path(snapshot_download(hub_id, **selection))
    except Exception as error:  # the hub's client raises its own, its transport's and plain OSError
        what = f"{hub_id!r} is no local path, is not in the local cache, and cannot be fetched (offline?): {error}"
        remedy = "check the name and the network, or give a local folder or .gguf file"
        raise _source_error(what, hub_id, remedy) from error


def _load_folder(
    folder: Path, dtype: torch.dtype | None, takes_integers: bool, place: Place
) -> tuple[Any, Any, tuple[str, ...], Mapping[str, StoredLinear]]:
    if not (folder / "config.json").is_file():
        gguf_files = sorted(folder.glob("*.gguf"))
        remedy = f"load {gguf_files[0]} itself" if gguf_files else "give the folder that save_pretrained wrote"
        if (folder / "infercomp.json").is_file():
            remedy = "serve this saved model with LLM or infercomp generate; everything else wants the original"
        raise ModelLoadError("The folder has no config.json.", where=str(folder), remedy=remedy, field="config.json")
    stored_tensors = read_stored_tensors(folder)
    linears = read_stored_linears(folder, stored_tensors)
    if linears and not takes_integers:
        what = "The checkpoint is already quantised: here the model is wanted in floats."
        remedy = "give the unquantised checkpoint, or serve this one with LLM or infercomp generate"
        where = str(folder / "config.json")
        raise ModelLoadError(what, where=where, remedy=remedy, field="quantization_config")
    tokenizer = load_tokenizer(folder)  # before the weights: what parsing it takes is free again when they come
    model = build_safetensors_model(folder, stored_tensors, dtype, linears, place)
    weight_files = sorted({str(tensor.path) for tensor in stored_tensors.values()})
    return model, tokenizer, tuple(weight_files), linears


def _load_gguf(
    path: Path, dtype: torch.dtype | None, keeps_integers: bool, place: Place
) -> tuple[Any, Any, tuple[str, ...], Mapping[str, StoredLinear]]:
    file = read_gguf_file(path)
    # Below the check of the header, so that a bad file fails before transformers is imported.
    from infercomp.loading.gguf_loader import build_gguf_model
    from infercomp.loading.gguf_tokenizer import build_gguf_tokenizer

    tokenizer = build_gguf_tokenizer(file)
    model, linears = build_gguf_model(file, dtype, keeps_integers=keeps_integers, place=place)
    return model, tokenizer, (str(path),), linears


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer whose files are in ``folder``, None where there are none; ModelLoadError for broken ones."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    return _read_tokenizer(AutoTokenizer, folder)


def load_saved_tokenizer(folder: Path) -> PreTrainedTokenizerFast | None:
    """The same for a folder that a fast tokenizer has written: all of it is in the files, whatever its class was.

    Finding the class would import the model's own code, and with it a compiler.
    """
    if not (folder / "tokenizer.json").is_file():
        return None
    from transformers import PreTrainedTokenizerFast

    return _read_tokenizer(PreTrainedTokenizerFast, folder)


def _read_tokenizer(tokenizer_class: Any, folder: Path) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = tokenizer_class.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # tokenizer files fail in the parsers of several libraries
        raise _tokenizer_error(f"The tokenizer cannot be loaded: {error}", folder) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise _tokenizer_error(f"{type(tokenizer).__name__} is not a fast tokenizer.", folder)
    return tokenizer


def check_vocabulary(model: Any, tokenizer: Any, source: object) -> None:
    """Raise ModelLoadError if the tokenizer can yield an id that the model has no embedding for."""
    if tokenizer is None:
        return
    num_rows = model.get_input_embeddings().weight.shape[0]
    largest_id = max(tokenizer.get_vocab().values(), default=-1)
    if largest_id >= num_rows:
        what = f"The tokenizer yields ids up to {largest_id}, but the model embeds only {num_rows} tokens."
        raise _tokenizer_error(what, source)


def _tokenizer_error(what: str, source: object) -> ModelLoadError:
    remedy = "use the tokenizer files that were saved with this model"
    return ModelLoadError(what, where=f"{source}, tokenizer", remedy=remedy, field="tokenizer")


def _source_error(what: str, source: str, remedy: str) -> ModelLoadError:
    return ModelLoadError(what, where=source, remedy=remedy, field="source")
