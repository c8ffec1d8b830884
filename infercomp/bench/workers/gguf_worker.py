"""Writes a model as a GGUF file for the peers that read one: llama-shaped models, every matrix in one type.

The layout of names and keys is llama.cpp's (gguf-py's constants); queries and keys are reordered from
transformers' rotary halves to the neighbouring pairs that llama.cpp turns.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import gguf
import torch

from infercomp.bench.protocol import serve
from infercomp.loading.loader import load
from infercomp.runtime.errors import BenchmarkError

_LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}

_FILE_TYPES = {
    "F32": gguf.LlamaFileType.ALL_F32,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}
# As llama.cpp's own conversions and infercomp do: these cost too much accuracy at 4 bits.
_VOCABULARY_MATRICES = ("token_embd.weight", "output.weight")
_Q8_0 = gguf.GGMLQuantizationType.Q8_0


def export(model: str, weight_type: str, file: str) -> None:
    """Write ``model`` with matrices of ``weight_type``: F32, F16, BF16, Q8_0 or Q4_0."""
    loaded = load(model)
    module: Any = loaded.model
    _require_llama(module.config)
    kind = gguf.GGMLQuantizationType[weight_type]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_file_type(_FILE_TYPES[weight_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _write_sizes(writer, module.config)
    _write_vocabulary(writer, loaded.tokenizer, module.config.vocab_size)
    for name, tensor in _tensors(module):
        values = tensor.float().contiguous().numpy()
        if tensor.dim() == 1 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, values)
        else:
            kept = _Q8_0 if weight_type == "Q4_0" and name in _VOCABULARY_MATRICES else kind
            writer.add_tensor(name, gguf.quants.quantize(values, kept), raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _require_llama(config: Any) -> None:
    rotary = getattr(config, "rope_parameters", None) or {}
    is_plain = rotary.get("rope_type", "default") == "default"
    has_bias = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
    if config.model_type != "llama" or not is_plain or has_bias:
        raise BenchmarkError(
            f"no GGUF file is written for a model of type {config.model_type!r}"
            + ("" if is_plain else f" with {rotary['rope_type']!r} rotary embedding"),
            remedy="leave llama.cpp and openvino out of --vs; only plain llama models are converted",
            field="vs",
        )


def _write_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _write_vocabulary(writer: gguf.GGUFWriter, tokenizer: Any, vocab_size: int) -> None:
    """The tokenizer's own tokens and merges, else numbers: peers are given ids, and their text is not looked at."""
    tokens, merges = [f"<{i}>" for i in range(vocab_size)], ["< 0>"]
    types = [gguf.TokenType.NORMAL] * vocab_size
    if tokenizer is not None:
        for token, i in tokenizer.get_vocab().items():
            tokens[i] = token
        for i in tokenizer.all_special_ids:
            types[i] = gguf.TokenType.CONTROL
        merges = _merges(tokenizer) or merges
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0]['content'] }}")


def _merges(tokenizer: Any) -> list[str]:
    pairs = json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("merges", [])
    return [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]


def _tensors(module: Any) -> Iterator[tuple[str, torch.Tensor]]:
    config = module.config
    yield "token_embd.weight", module.get_input_embeddings().weight
    yield "output_norm.weight", module.model.norm.weight
    if module.get_output_embeddings().weight is not module.get_input_embeddings().weight:
        yield "output.weight", module.get_output_embeddings().weight
    for number, layer in enumerate(module.model.layers):
        for ours, theirs in _NORMS.items():
            yield f"blk.{number}.{theirs}.weight", layer.get_submodule(ours).weight
        for ours, theirs in _LINEARS.items():
            weight = layer.get_submodule(ours).weight
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(theirs)
            yield f"blk.{number}.{theirs}.weight", weight if heads is None else pairs_from_halves(weight, heads)


def pairs_from_halves(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows [H * D, K] of heads whose channels i and i + D / 2 turn together, put next to each other."""
    halves = weight.unflatten(0, (num_heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)


def main() -> None:
    serve({"export": export})


if __name__ == "__main__":
    main()
