"""The model families that infercomp is shown to handle, each small, with random but lively weights.

Weights are scaled up after initialisation: transformers draws them so small that a model of two
layers would copy its embedding, and a dropped mask or a swapped head would not show in the logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

VOCAB_SIZE = 128
NUM_LAYERS = 2
NUM_POSITIONS = 256
SLIDING_WINDOW = 12
EXAMPLE_LENGTH = 17  # longer than the window, so that a window ignored is a wrong number

_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": NUM_POSITIONS,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_WINDOWED = {**_GROUPED, "head_dim": 8, "sliding_window": SLIDING_WINDOW}
_GEMMA = {**_WINDOWED, "query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"]}
_SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GPT2 = {
    **_SPECIAL_TOKENS,
    "vocab_size": VOCAB_SIZE,
    "n_embd": 32,
    "n_layer": NUM_LAYERS,
    "n_head": 4,
    "n_positions": NUM_POSITIONS,
}
_WITHOUT_INTERMEDIATE = {name: value for name, value in _SIZES.items() if name != "intermediate_size"}
_EAGER = ("eager",)


@dataclass(frozen=True)
class Family:
    """One architecture of transformers in a few thousand parameters."""

    name: str
    config_class: type
    config_arguments: Mapping[str, Any] = field(repr=False)
    model_class: type | None = None
    """None for a decoder: AutoModelForCausalLM builds it."""
    attn_implementations: tuple[str, ...] = ("sdpa", "eager")
    num_attention_layers: int = NUM_LAYERS

    @property
    def is_decoder(self) -> bool:
        return self.model_class is None

    @property
    def takes_tokens(self) -> bool:
        return self.config_class is not transformers.ViTConfig

    def build(self, attn_implementation: str, seed: int = 0) -> nn.Module:
        """The model in eval mode and without gradients; the same weights for every implementation."""
        torch.manual_seed(seed)
        config = self.config_class(**self.config_arguments, attn_implementation=attn_implementation)
        if self.model_class is None:
            model = transformers.AutoModelForCausalLM.from_config(config)
        else:
            model = self.model_class(config)
        enliven(model)
        return model.eval().requires_grad_(False)

    def example_inputs(
        self, length: int = EXAMPLE_LENGTH, batch_size: int = 1, seed: int = 1
    ) -> dict[str, torch.Tensor]:
        """Keyword arguments of the model; ``length`` means nothing to a vision model."""
        generator = torch.Generator().manual_seed(seed)
        if not self.takes_tokens:
            return {"pixel_values": torch.randn(batch_size, 3, 32, 32, generator=generator)}
        return {"input_ids": torch.randint(3, VOCAB_SIZE, (batch_size, length), generator=generator)}


@torch.no_grad()
def enliven(model: nn.Module) -> None:
    """Scale weights in place until every part of the model moves its output and greedy text does not stand still.

    Embeddings stay small beside the rest, or a model whose head is tied to them repeats its input for ever.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) * 0.2)
        elif "embed" in name or "wte" in name:
            parameter.mul_(4)
        else:
            parameter.mul_(15)


def _family(name: str, config: str, arguments: Mapping[str, Any], model: str | None = None, **options: Any) -> Family:
    model_class = getattr(transformers, model) if model else None
    return Family(name, getattr(transformers, config), arguments, model_class, **options)


_ALL = (
    _family("llama", "LlamaConfig", _GROUPED),
    _family("mistral", "MistralConfig", _WINDOWED),
    _family("qwen2", "Qwen2Config", _GROUPED),
    _family("qwen3", "Qwen3Config", {**_GROUPED, "head_dim": 16}),
    _family("gemma2", "Gemma2Config", _GEMMA, attn_implementations=_EAGER),
    _family("gemma3", "Gemma3TextConfig", _GEMMA),
    _family("phi3", "Phi3Config", {**_GROUPED, **_SPECIAL_TOKENS}),
    _family("gpt2", "GPT2Config", _GPT2),
    _family("opt", "OPTConfig", {**_WITHOUT_INTERMEDIATE, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    _family("gpt_neox", "GPTNeoXConfig", {**_SIZES, "rotary_pct": 0.5, "bos_token_id": 1, "eos_token_id": 2}),
    _family("gptj", "GPTJConfig", {**_GPT2, "rotary_dim": 4}, attn_implementations=_EAGER),
    _family("falcon", "FalconConfig", {**_WITHOUT_INTERMEDIATE, "bos_token_id": 1, "eos_token_id": 2}),
    _family(
        "bloom",
        "BloomConfig",
        {
            **_SPECIAL_TOKENS,
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 32,
            "n_layer": NUM_LAYERS,
            "n_head": 4,
            "tie_word_embeddings": False,  # its norm on the embedding makes a small tied model repeat its input
        },
        attn_implementations=_EAGER,
    ),
    _family(
        "mpt",
        "MptConfig",
        {"vocab_size": VOCAB_SIZE, "d_model": 32, "n_layers": NUM_LAYERS, "n_heads": 4, "max_seq_len": NUM_POSITIONS},
        attn_implementations=_EAGER,
    ),
    _family("bert", "BertConfig", _SIZES, "BertModel"),
    _family("roberta", "RobertaConfig", _SIZES, "RobertaModel"),
    _family(
        "distilbert",
        "DistilBertConfig",
        {
            "vocab_size": VOCAB_SIZE,
            "dim": 32,
            "hidden_dim": 64,
            "n_layers": NUM_LAYERS,
            "n_heads": 4,
            "max_position_embeddings": NUM_POSITIONS,
        },
        "DistilBertModel",
    ),
    _family(
        "vit",
        "ViTConfig",
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": NUM_LAYERS,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
        },
        "ViTModel",
    ),
    _family(
        "t5",
        "T5Config",
        {"vocab_size": VOCAB_SIZE, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": NUM_LAYERS, "num_heads": 4},
        "T5EncoderModel",
    ),
)

FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
DECODERS: dict[str, Family] = {name: family for name, family in FAMILIES.items() if family.is_decoder}
