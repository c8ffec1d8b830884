"""From a folder with config.json and safetensors files to a transformers model, with every file checked first."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from infercomp.loading.safetensors_file import StoredTensor, read_safetensors_header
from infercomp.loading.stored_linears import StoredLinear, stored_linears, tensors_of_integers
from infercomp.loading.weight_bytes import Place, as_it_is
from infercomp.runtime.errors import ModelLoadError
from infercomp.runtime.untouched_memory import untouched_zeros

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_GENERATION = "generation_config.json"
_PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def read_stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's safetensors files by name; nothing but headers is read."""
    if (folder / _SINGLE).is_file():
        return read_safetensors_header(folder / _SINGLE)
    if not (folder / _INDEX).is_file():
        raise _no_weights(folder)
    shard_of_tensor = _read_index(folder / _INDEX)
    headers = {shard: read_safetensors_header(folder / shard) for shard in sorted(set(shard_of_tensor.values()))}
    for name, shard in shard_of_tensor.items():
        if name not in headers[shard]:
            what = f"The index says that {shard} holds the tensor, but it does not."
            raise _error(what, f"{folder / _INDEX}, {name}", "download the folder again", name)
    return {name: headers[shard][name] for name, shard in shard_of_tensor.items()}


def read_stored_linears(folder: Path, stored_tensors: dict[str, StoredTensor]) -> dict[str, StoredLinear]:
    """The linears that the folder holds in integers, by name; none for a checkpoint of floats."""
    quantization = _read_json(folder / "config.json").get("quantization_config")
    if not quantization:
        return {}
    where = f"{folder / 'config.json'}, quantization_config"
    if not isinstance(quantization, dict):
        raise _error("quantization_config is no JSON object.", where, "download it again", "quantization_config")
    linears = stored_linears(quantization, stored_tensors, where)
    if not linears:
        what = "The config says that the checkpoint is quantised, but no linear is."
        raise _error(what, where, "remove quantization_config, or download the folder again", "quantization_config")
    return linears


def build_safetensors_model(
    folder: Path,
    stored_tensors: dict[str, StoredTensor],
    dtype: torch.dtype | None,
    linears: Mapping[str, StoredLinear] | None = None,
    place: Place = as_it_is,
) -> PreTrainedModel:
    """The folder's model in eval mode, each parameter read straight into memory of its final type, and then placed.

    The weights of ``linears`` are zeros that take no memory: who compiles the model puts integers in their place.
    """
    config = _read_config(folder)
    dtype = dtype or _checkpoint_dtype(stored_tensors)
    if linears:
        stored_tensors = _with_stand_ins(folder, stored_tensors, linears, dtype)
    num_layers = getattr(config, "num_hidden_layers", None)
    if isinstance(num_layers, int) and num_layers > len(stored_tensors):
        what = f"{num_layers} layers do not fit {len(stored_tensors)} tensors."
        raise _config_error(folder, what, "num_hidden_layers")
    skeleton = _build_skeleton(folder, config, dtype)
    _check_against_skeleton(folder, stored_tensors, skeleton)
    # Where a model keeps some parameters in float32, the cast is left to transformers, which knows which ones.
    if not getattr(skeleton, "_keep_in_fp32_modules", None) and not getattr(
        skeleton, "_keep_in_fp32_modules_strict", None
    ):
        stored_tensors = {name: replace(tensor, target_dtype=dtype) for name, tensor in stored_tensors.items()}
    stored_tensors = {name: replace(tensor, place=place) for name, tensor in stored_tensors.items()}
    model = _fill(folder, type(skeleton), config, stored_tensors, dtype)
    model.name_or_path = model.config.name_or_path = str(folder)
    if model.can_generate() and (folder / _GENERATION).is_file():
        model.generation_config = _read_generation_config(folder)
    return model.eval()


def _read_index(path: Path) -> dict[str, str]:
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _error("The index has no weight_map.", str(path), "download the folder again", "weight_map")
    for name, shard in weight_map.items():
        # A shard is a plain file name in the same folder: an index must not lead out of it.
        if not isinstance(shard, str) or "\\" in shard or Path(shard).name != shard or shard in (".", ".."):
            what = f"The index names the shard {shard!r}, which is not a plain file name."
            raise _error(what, f"{path}, {name}", "use only files of the model's own folder", "weight_map")
        if not shard.endswith(".safetensors"):
            what = f"The index names the shard {shard!r}, which is not a safetensors file."
            raise _error(what, f"{path}, {name}", "convert the model to safetensors", "weight_map")
        if not (path.parent / shard).is_file():
            remedy = "download the missing shard"
            raise _error(f"The shard {shard} is missing.", f"{path}, {name}", remedy, "weight_map")
    return weight_map


def _read_config(folder: Path) -> PretrainedConfig:
    settings = _read_json(folder / "config.json")
    if not isinstance(settings.get("model_type"), str):
        raise _config_error(folder, "The config does not name a model_type.", "model_type")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # config classes raise whatever their own checks raise
        what = f"The config of model_type {settings['model_type']!r} is not accepted: {error}"
        raise _config_error(folder, what, "model_type") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # transformers would look for the tool that it names
    return config


@dataclass(frozen=True)
class _StandIn(StoredTensor):
    """What takes the place of a weight that is read as integers: zeros in memory that nobody touches."""

    def read(self) -> torch.Tensor:
        return untouched_zeros(self.shape, self.dtype)


def _with_stand_ins(
    folder: Path, stored: dict[str, StoredTensor], linears: Mapping[str, StoredLinear], dtype: torch.dtype
) -> dict[str, StoredTensor]:
    hidden = tensors_of_integers(linears, stored)
    stand_ins: dict[str, StoredTensor] = {
        f"{layer}.weight": _StandIn(folder, f"{layer}.weight", dtype, linear.shape, 0, 0)
        for layer, linear in linears.items()
    }
    return {name: tensor for name, tensor in stored.items() if name not in hidden} | stand_ins


def _read_generation_config(folder: Path) -> GenerationConfig:
    from transformers import GenerationConfig

    _read_json(folder / _GENERATION)
    try:
        return GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the class raises whatever its own checks raise
        what = f"The generation defaults are not accepted: {error}"
        raise _error(what, str(folder / _GENERATION), "correct or remove the file", _GENERATION) from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        what = f"The folder has no {path.name}."
        raise _error(what, str(path), "give the folder that save_pretrained wrote, or a .gguf file", path.name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _error(f"The file is not valid JSON: {error}.", str(path), "download it again", path.name) from error
    if not isinstance(content, dict):
        raise _error("The file is not a JSON object.", str(path), "download it again", path.name)
    return content


def _checkpoint_dtype(stored_tensors: dict[str, StoredTensor]) -> torch.dtype:
    """The floating type that most of the bytes are stored in."""
    num_bytes_of_dtype: dict[torch.dtype, int] = {}
    for tensor in stored_tensors.values():
        if tensor.dtype.is_floating_point:
            num_bytes_of_dtype[tensor.dtype] = num_bytes_of_dtype.get(tensor.dtype, 0) + tensor.num_bytes
    return max(num_bytes_of_dtype, key=lambda dtype: num_bytes_of_dtype[dtype], default=torch.float32)


def _build_skeleton(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # a config that contradicts itself fails anywhere in the model's constructor
        what = f"No causal language model can be built from the config: {error}"
        raise _config_error(folder, what, "model_type") from error


def _check_against_skeleton(folder: Path, stored: dict[str, StoredTensor], skeleton: PreTrainedModel) -> None:
    """Names and shapes, before memory is sized by the config; names may differ where transformers renames them."""
    parameters = dict(skeleton.named_parameters())
    for name, parameter in parameters.items():
        if name in stored and stored[name].shape != tuple(parameter.shape):
            what = f"The tensor has shape {stored[name].shape} where the config wants {tuple(parameter.shape)}."
            raise _tensor_error(stored[name].path, what, name)
    num_elements_wanted = sum(parameter.numel() for parameter in parameters.values())
    num_elements_stored = sum(torch.Size(tensor.shape).numel() for tensor in stored.values())
    missing = sorted(parameters.keys() - stored.keys())
    if missing and num_elements_stored < num_elements_wanted:
        raise _tensor_error(folder, f"The files lack {len(missing)} tensors that the model needs.", missing[0])


def _fill(
    folder: Path, model_class: Any, config: Any, stored: dict[str, StoredTensor], dtype: torch.dtype
) -> PreTrainedModel:
    with _no_progress_bar():
        try:
            model, report = model_class.from_pretrained(
                None, config=config, state_dict=stored, dtype=dtype, output_loading_info=True
            )
        except ModelLoadError:
            raise
        except Exception as error:  # transformers reports failed conversions and shapes as RuntimeError
            remedy = "check that config.json and the weight files belong together"
            raise _error(f"The weights do not fit the model: {error}", str(folder), remedy, "weights") from error
    if report["missing_keys"]:
        names = sorted(report["missing_keys"])
        raise _tensor_error(folder, f"The files lack {len(names)} tensors that the model needs.", names[0])
    return model


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _no_weights(folder: Path) -> ModelLoadError:
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED_SUFFIXES)
    if pickled:
        what = f"The folder holds pickled weights only ({pickled[0]}), which are never unpickled."
        remedy = "convert them to safetensors: model.save_pretrained(folder) on a machine that trusts the file"
        return _error(what, str(folder), remedy, "weights")
    gguf = sorted(path.name for path in folder.glob("*.gguf"))
    remedy = f"load {folder / gguf[0]} itself" if gguf else f"add {_SINGLE}, or shards with {_INDEX}"
    return _error(f"The folder has neither {_SINGLE} nor {_INDEX}.", str(folder), remedy, "weights")


def _config_error(folder: Path, what: str, field: str) -> ModelLoadError:
    remedy = "use a model_type that this version of transformers knows; custom code is never run"
    return _error(what, f"{folder / 'config.json'}, {field}", remedy, field)


def _tensor_error(path: Path, what: str, name: str) -> ModelLoadError:
    return _error(what, f"{path}, {name}", "check that config.json and the weight files belong together", name)


def _error(what: str, where: str, remedy: str, field: str) -> ModelLoadError:
    return ModelLoadError(what, where=where, remedy=remedy, field=field)
