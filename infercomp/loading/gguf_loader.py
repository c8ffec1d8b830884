"""From a GGUF file to a transformers model: skeleton on the meta device, then tensor by tensor into its parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from infercomp.loading.gguf_blocks import PLAIN_TYPES, read_tensor
from infercomp.loading.gguf_file import GgufFile, GgufTensor
from infercomp.loading.gguf_linears import gguf_linears
from infercomp.loading.stored_linears import StoredLinear
from infercomp.loading.weight_bytes import Place, as_it_is, open_weight_file
from infercomp.runtime.errors import ModelLoadError
from infercomp.runtime.untouched_memory import untouched_zeros

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedModel

_REMEDY = "load the model's safetensors folder, or convert it to GGUF again"
_ROPE_FACTORS = "rope_freqs.weight"
_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def build_gguf_model(
    file: GgufFile, dtype: torch.dtype | None, *, keeps_integers: bool = False, place: Place = as_it_is
) -> tuple[PreTrainedModel, dict[str, StoredLinear]]:
    """The model of the file in eval mode; float32 where the file is quantised, unless ``dtype`` says otherwise.

    With ``keeps_integers``, linears of a Llama whose integers kernels can read come beside the model. In it they are
    zeros that take no memory: who compiles it puts the integers in their place.
    """
    dtype = dtype or stored_dtype(file)
    if file.architecture != "llama":
        return _model_of_transformers(file, dtype), {}
    config = llama_config(file)
    config.dtype = dtype
    return _build_llama(file, config, dtype, keeps_integers, place)


def stored_dtype(file: GgufFile) -> torch.dtype:
    """The widest-spread floating type of the file: norms are float32 beside half-precision matrices."""
    type_names = {tensor.type_name for tensor in file.tensors.values()}
    if not type_names <= PLAIN_TYPES.keys():
        return torch.float32
    return next((PLAIN_TYPES[name] for name in ("BF16", "F16") if name in type_names), torch.float32)


def llama_config(file: GgufFile) -> LlamaConfig:
    """The configuration the metadata describes, checked against the tensors before anything is sized by it."""
    from transformers import LlamaConfig

    num_heads = _count(file, "attention.head_count")
    hidden_size = _count(file, "embedding_length")
    head_size = _count(file, "rope.dimension_count", hidden_size // num_heads)
    num_kv_heads = _count(file, "attention.head_count_kv", num_heads)
    intermediate_size = _count(file, "feed_forward_length")
    num_layers = _count(file, "block_count")
    vocab_size = _tensor(file, "token_embd.weight").shape[0]
    _require_equal(file, "vocab_size", _count(file, "vocab_size", vocab_size), vocab_size)
    _require_equal(file, "attention.key_length", _count(file, "attention.key_length", head_size), head_size)
    _require_shape(file, "token_embd.weight", (vocab_size, hidden_size))
    _require_shape(file, "blk.0.attn_q.weight", (num_heads * head_size, hidden_size))
    _require_shape(file, "blk.0.attn_k.weight", (num_kv_heads * head_size, hidden_size))
    _require_shape(file, "blk.0.ffn_up.weight", (intermediate_size, hidden_size))
    _tensor(file, f"blk.{num_layers - 1}.attn_norm.weight")
    if num_layers > len(file.tensors):
        raise _field_error(file, f"{num_layers} layers do not fit {len(file.tensors)} tensors.", "block_count")
    if num_heads % num_kv_heads or head_size % 2:
        what = f"{num_heads} heads of size {head_size} cannot share {num_kv_heads} key-value heads."
        raise _field_error(file, what, "attention.head_count_kv")
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_size,
        max_position_embeddings=_count(file, "context_length"),
        rms_norm_eps=_number(file, "attention.layer_norm_rms_epsilon", None),
        rope_parameters=_rope_parameters(file),
        tie_word_embeddings="output.weight" not in file.tensors,
        **{
            f"{name}_token_id": file.metadata.get(f"tokenizer.ggml.{key}_token_id")
            for name, key in {"bos": "bos", "eos": "eos", "pad": "padding"}.items()
        },
    )


def _rope_parameters(file: GgufFile) -> dict[str, Any]:
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": _number(file, "rope.freq_base", 10000.0)}
    scaling = file.metadata.get("llama.rope.scaling.type", "none")
    if scaling == "linear":
        parameters |= {"rope_type": "linear", "factor": _number(file, "rope.scaling.factor", None)}
    elif scaling != "none":
        raise _field_error(file, f"Rotary scaling of type {scaling!r} is not supported in GGUF.", "rope.scaling.type")
    return parameters


def _build_llama(
    file: GgufFile, config: LlamaConfig, dtype: torch.dtype, keeps_integers: bool, place: Place
) -> tuple[PreTrainedModel, dict[str, StoredLinear]]:
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    tensor_of_parameter = _match_tensors(file, model)
    linears = _linears_of(file, tensor_of_parameter, config) if keeps_integers else {}
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its buffers are computed, not stored
    stream, _ = open_weight_file(file.path)
    with stream:
        for parameter_name, tensor in tensor_of_parameter.items():
            module_name, _, attribute = parameter_name.rpartition(".")
            if module_name in linears:
                value = untouched_zeros(tensor.shape, dtype)
            else:
                value = torch.empty(tensor.shape, dtype=dtype)
                read_tensor(stream, file.path, tensor, value)
                value = place(_undo_permutation(value, tensor.name, config))
            setattr(model.get_submodule(module_name), attribute, torch.nn.Parameter(value, requires_grad=False))
        if _ROPE_FACTORS in file.tensors:
            _apply_rope_factors(model.model.rotary_emb, file, stream)
    model.tie_weights()
    return model.eval(), linears


def _linears_of(
    file: GgufFile, tensor_of_parameter: dict[str, GgufTensor], config: LlamaConfig
) -> dict[str, StoredLinear]:
    """The linears in integers by the names of their layers; a table that is also the LM head's has both names."""
    tensors = {
        name.removesuffix(".weight"): tensor
        for name, tensor in tensor_of_parameter.items()
        if len(tensor.shape) == 2 and (config.tie_word_embeddings or name != _GLOBAL_NAMES["token_embd.weight"])
    }
    if config.tie_word_embeddings:
        tensors["lm_head"] = file.tensors["token_embd.weight"]

    def rows_of(tensor: GgufTensor) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda part: _undo_permutation(part, tensor.name, config)

    return gguf_linears(file, {layer: (tensor, rows_of(tensor)) for layer, tensor in tensors.items()})


def _match_tensors(file: GgufFile, model: PreTrainedModel) -> dict[str, GgufTensor]:
    """Parameter name -> its tensor; every tensor of the file and every parameter of the model is accounted for."""
    shape_of_parameter = {name: tuple(value.shape) for name, value in model.named_parameters()}
    matched: dict[str, GgufTensor] = {}
    for name, tensor in file.tensors.items():
        if name == _ROPE_FACTORS:
            continue
        parameter_name = _parameter_name(name)
        if parameter_name is None or parameter_name not in shape_of_parameter:
            raise _tensor_error(file, "The tensor is no part of a Llama model.", name)
        _require_shape(file, name, shape_of_parameter[parameter_name])
        matched[parameter_name] = tensor
    missing = shape_of_parameter.keys() - matched.keys()
    if missing:
        raise _tensor_error(file, f"The file lacks {len(missing)} tensors that the model needs.", min(missing))
    return matched


def _parameter_name(tensor_name: str) -> str | None:
    if tensor_name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[tensor_name]
    parts = tensor_name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in _LAYER_NAMES:
        return None
    return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"


def _undo_permutation(value: torch.Tensor, tensor_name: str, config: LlamaConfig) -> torch.Tensor:
    """GGUF keeps the two halves of each query and key head interleaved, as its rotary embedding wants them."""
    if ".attn_q." in tensor_name:
        num_heads = config.num_attention_heads
    elif ".attn_k." in tensor_name:
        num_heads = config.num_key_value_heads
    else:
        return value
    interleaved = value.view(num_heads, -1, 2, value.shape[-1])
    return interleaved.transpose(1, 2).reshape(value.shape)


def _apply_rope_factors(rotary: torch.nn.Module, file: GgufFile, stream: Any) -> None:
    tensor = file.tensors[_ROPE_FACTORS]
    _require_shape(file, _ROPE_FACTORS, tuple(rotary.inv_freq.shape))
    factors = torch.empty(tensor.shape)
    read_tensor(stream, file.path, tensor, factors)
    rotary.inv_freq /= factors
    rotary.original_inv_freq /= factors


def _model_of_transformers(file: GgufFile, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(file.path.parent), gguf_file=file.path.name, dtype=dtype, local_files_only=True
        )
    except Exception as error:  # transformers has no error class of its own for a GGUF it cannot map
        what = f"The architecture {file.architecture!r} cannot be loaded from GGUF: {error}"
        raise _field_error(file, what, "general.architecture", "") from error
    if not all(parameter.is_floating_point() for parameter in model.parameters()):
        what = f"The architecture {file.architecture!r} would keep its weights packed."
        raise _field_error(file, what, "general.architecture", "")
    model.hf_quantizer = None  # the weights are plain numbers now; else the model could not be saved
    vars(model.config).pop("quantization_config", None)
    return model.eval()


def _count(file: GgufFile, key: str, default: int | None = None) -> int:
    value = file.metadata.get(f"llama.{key}", default)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise _field_error(file, f"The metadata field must be a positive integer, not {value!r}.", key)
    return value


def _number(file: GgufFile, key: str, default: float | None) -> float:
    value = file.metadata.get(f"llama.{key}", default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise _field_error(file, f"The metadata field must be a positive number, not {value!r}.", key)
    return float(value)


def _tensor(file: GgufFile, name: str) -> GgufTensor:
    if name not in file.tensors:
        raise _tensor_error(file, "The file lacks a tensor that the model needs.", name)
    return file.tensors[name]


def _require_shape(file: GgufFile, name: str, shape: tuple[int, ...]) -> None:
    if _tensor(file, name).shape != shape:
        raise _tensor_error(file, f"The tensor has shape {file.tensors[name].shape}, not {shape}.", name)


def _require_equal(file: GgufFile, key: str, value: int, expected: int) -> None:
    if value != expected:
        raise _field_error(file, f"The metadata field says {value} where the rest of the file says {expected}.", key)


def _field_error(file: GgufFile, what: str, key: str, prefix: str = "llama.") -> ModelLoadError:
    return ModelLoadError(what, where=f"{file.path}, {prefix}{key}", remedy=_REMEDY, field=prefix + key)


def _tensor_error(file: GgufFile, what: str, name: str) -> ModelLoadError:
    return ModelLoadError(what, where=f"{file.path}, {name}", remedy=_REMEDY, field=name)
