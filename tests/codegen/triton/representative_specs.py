"""One spec or a few of each family, as a model of 8 billion parameters would ask for them."""

from __future__ import annotations

from infercomp.codegen.triton import fragments
from infercomp.codegen.triton.specs import (
    AttentionSpec,
    GatedActivationSpec,
    KernelSpec,
    MatmulSpec,
    NormSpec,
    Origin,
    PagedAttentionSpec,
    QuantizeSpec,
    RotaryWriteKvSpec,
    SamplingSpec,
    WriteKvSpec,
)

_HALF = {"input_dtype": "fp16", "output_dtype": "fp16", "num_columns": 4096, "num_inner": 4096}
_SINGLE = {"input_dtype": "fp32", "output_dtype": "fp32", "num_columns": 4096, "num_inner": 4096}
_HEADS = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "scale": 128**-0.5}
_EVERY_OPTION = {"sliding_window": 1024, "logit_softcap": 30.0, "has_alibi": True, "has_sinks": True}
_ORIGIN = Origin(
    op="infercomp::linear",
    pass_name="fuse_linear_epilogue",
    nodes=("linear_4", "add_9"),
    source_lines=("modeling_llama.py:233, in forward: self.o_proj(attention) + residual",),
)
# Sixteen rows are the least a matrix instruction takes: a tile for few rows, with K split to fill the chip.
_SKINNY = {"tile_rows": 16, "tile_columns": 64, "tile_inner": 128, "num_warps": 4, "num_stages": 4}

MATMULS: dict[str, MatmulSpec] = {
    "matmul": MatmulSpec(**_HALF, epilogue=fragments.residual("fp16"), origin=_ORIGIN),
    "matmul_bf16": MatmulSpec(**{**_HALF, "input_dtype": "bf16", "output_dtype": "bf16"}),
    "matmul_fp32": MatmulSpec(**_SINGLE, tile_rows=64, tile_columns=64, tile_inner=16),
    "matmul_tf32": MatmulSpec(**_SINGLE, allow_tf32=True, tile_rows=64, tile_inner=32),
    "matmul_descriptors": MatmulSpec(**_HALF, is_persistent=True, use_descriptors=True),
    "matmul_gated": MatmulSpec(**_HALF, is_gated=True, tile_columns=64, epilogue=fragments.gate("silu")),
    "matmul_split": MatmulSpec(**_HALF, **_SKINNY, num_splits=4),
    "matmul_int8": MatmulSpec(**{**_HALF, "input_dtype": "i8"}, weight_format="i8", tile_inner=128),
    "matmul_w8": MatmulSpec(**_HALF, **_SKINNY, weight_format="i8"),
    "matmul_w4": MatmulSpec(**_HALF, **_SKINNY, weight_format="u4", group_size=128, has_zero=True),
    "matmul_w4_g32": MatmulSpec(**_HALF, **{**_SKINNY, "tile_inner": 64}, weight_format="u4", group_size=32),
    "gemv": MatmulSpec(**_HALF, is_single_row=True, tile_rows=1, tile_columns=8, tile_inner=512, num_warps=4),
}
PAGED: dict[str, PagedAttentionSpec] = {
    "paged_prefill": PagedAttentionSpec(dtype="fp16", **_HEADS, block_size=16),
    "paged_prefill_options": PagedAttentionSpec(dtype="fp16", **_HEADS, block_size=16, **_EVERY_OPTION),
    "paged_prefill_fp32": PagedAttentionSpec(dtype="fp32", **_HEADS, block_size=16, tile_rows=32, tile_keys=32),
    "paged_decode": PagedAttentionSpec(dtype="fp16", **_HEADS, block_size=16, chunk_keys=512, tile_rows=16),
    "paged_decode_options": PagedAttentionSpec(
        dtype="bf16", **_HEADS, block_size=16, chunk_keys=512, tile_rows=16, max_query_tokens=4, **_EVERY_OPTION
    ),
    "paged_decode_fp32": PagedAttentionSpec(
        dtype="fp32", **_HEADS, block_size=16, chunk_keys=512, tile_rows=16, tile_keys=16
    ),
}
DENSE: dict[str, AttentionSpec] = {
    "attention": AttentionSpec(dtype="fp16", **_HEADS, is_causal=True),
    "attention_bias": AttentionSpec(dtype="fp16", **_HEADS, bias_dtype="i1", tile_keys=32),
}
NORMS: dict[str, NormSpec] = {
    "rms_norm": NormSpec(dtype="fp16", num_columns=4096, eps=1e-5),
    "add_rms_norm_int8": NormSpec(dtype="fp16", num_columns=4096, eps=1e-5, has_residual=True, is_quantized=True),
    "layer_norm": NormSpec(dtype="bf16", num_columns=768, eps=1e-5, is_layer_norm=True, has_bias=True),
}
ROWS: dict[str, KernelSpec] = {
    "quantize": QuantizeSpec(dtype="fp16", num_columns=4096, group_size=128),
    "gated_activation": GatedActivationSpec(dtype="fp16", num_columns=14336, activation="silu"),
    "write_kv": WriteKvSpec(dtype="fp16", num_kv_heads=8, head_dim=128),
    "rotary_write_kv": RotaryWriteKvSpec(dtype="fp16", num_heads=32, num_kv_heads=8, head_dim=128, rotary_dim=128),
}
SAMPLERS: dict[str, SamplingSpec] = {
    f"sample_{method}": SamplingSpec(logits_dtype="fp32", vocabulary_size=128256, method=method)
    for method in ("greedy", "inverse_cdf", "gumbel")
}
SECOND_STAGES: dict[str, KernelSpec] = {
    "matmul_reduce": MATMULS["matmul_split"].reduction(),
    "paged_combine": PAGED["paged_decode"].combine(),
}
EVERY: dict[str, KernelSpec] = {**MATMULS, **PAGED, **DENSE, **NORMS, **ROWS, **SAMPLERS, **SECOND_STAGES}

# One of each family: their texts are kept in golden/.
GOLDEN = (
    "matmul",
    "matmul_w4",
    "gemv",
    "matmul_reduce",
    "paged_prefill",
    "paged_decode",
    "paged_combine",
    "attention",
    "add_rms_norm_int8",
    "gated_activation",
    "write_kv",
    "rotary_write_kv",
    "sample_inverse_cdf",
)
