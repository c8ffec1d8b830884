"""The op vocabulary: the contract between passes and codegen."""

from .attention import attention
from .clustered import clustered_weight_linear
from .grouped import group_embedding, group_linear, group_weight_linear, quantize_weight_groups
from .linear import ACTIVATIONS, gated_activation, linear, merge_weights
from .norm import layer_norm, rms_norm
from .op import VOCABULARY, Op, definition_of, op
from .paged_attention import paged_attention, write_kv
from .quantized import (
    int8_embedding,
    int8_linear,
    int8_weight_linear,
    quantize_per_tensor,
    quantize_per_token,
    quantize_weight_int8,
)
from .rope import rotary_embedding
from .sparse import sparse_group_weight_linear, sparse_int8_linear, sparse_weight_linear

__all__ = [
    "ACTIVATIONS",
    "VOCABULARY",
    "Op",
    "attention",
    "clustered_weight_linear",
    "definition_of",
    "gated_activation",
    "group_embedding",
    "group_linear",
    "group_weight_linear",
    "int8_embedding",
    "int8_linear",
    "int8_weight_linear",
    "layer_norm",
    "linear",
    "merge_weights",
    "op",
    "paged_attention",
    "quantize_per_tensor",
    "quantize_per_token",
    "quantize_weight_groups",
    "quantize_weight_int8",
    "rms_norm",
    "rotary_embedding",
    "sparse_group_weight_linear",
    "sparse_int8_linear",
    "sparse_weight_linear",
    "write_kv",
]
