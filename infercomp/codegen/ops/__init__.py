"""The op vocabulary: the contract between passes and codegen."""

from .attention import attention, paged_attention, write_kv
from .linear import ACTIVATIONS, gated_activation, linear, merge_weights
from .norm import layer_norm, rms_norm
from .op import VOCABULARY, Op, definition_of, op
from .rope import rotary_embedding

__all__ = [
    "ACTIVATIONS",
    "VOCABULARY",
    "Op",
    "attention",
    "definition_of",
    "gated_activation",
    "layer_norm",
    "linear",
    "merge_weights",
    "op",
    "paged_attention",
    "rms_norm",
    "rotary_embedding",
    "write_kv",
]
