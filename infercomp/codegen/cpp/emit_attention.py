"""C++ text of the attention specs: their values put into the structs of attention.h."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..specs import AttentionSpec, PagedAttentionSpec
from .emit_loops import operand_lines, size_lines
from .scalar_text import BUFFER_TYPES, index_text

_BIAS_KINDS = {torch.float32: "FLOAT", torch.bfloat16: "BFLOAT16", torch.bool: "BOOL"}


def _options(spec: PagedAttentionSpec | AttentionSpec) -> Iterator[str]:
    yield f"    a.scale = {spec.scale!r}f;"
    if spec.sliding_window is not None:
        yield f"    a.sliding_window = {spec.sliding_window};"
    if spec.logit_softcap is not None:
        yield f"    a.logit_softcap = {spec.logit_softcap!r}f;"
    if spec.alibi_slopes is not None:
        yield f"    a.alibi_slopes = {spec.alibi_slopes};"
    if spec.sinks is not None:
        yield f"    a.sinks = {spec.sinks};"


def _kernel(name: str, struct: str, spec: PagedAttentionSpec | AttentionSpec, fields: list[str]) -> str:
    return "\n".join(
        [
            f"static {struct} {name}_arguments(void* const* operands, const int64_t* sizes) {{",
            *operand_lines(spec.buffers),
            *size_lines(spec),
            f"    {struct} a{{}};",
            *_options(spec),
            *(f"    a.{field};" for field in fields),
            "    return a;",
            "}",
            "",
            f"static int64_t {name}_tasks(void* const* operands, const int64_t* sizes) {{",
            f"    return num_tasks({name}_arguments(operands, sizes));",
            "}",
            "",
            f"static void {name}(void* const* operands, const int64_t* sizes, int64_t task, Errors&) {{",
            f"    const {struct} a = {name}_arguments(operands, sizes);",
            f"    run_task(a, task, scratch<{struct}>(scratch_bytes(a)));",
            "}",
            "",
        ]
    )


def emit_paged_attention(spec: PagedAttentionSpec, name: str) -> str:
    query, key_cache, value_cache, tables, lengths, starts, *rest, output = (buffer.name for buffer in spec.buffers)
    kind = BUFFER_TYPES[spec.buffers[0].dtype]
    fields = [
        f"query = {query} + {index_text(spec.query_offset)}",
        f"key_cache = {key_cache}",
        f"value_cache = {value_cache}",
        f"output = {output}",
        f"block_tables = {tables}",
        f"seq_lens = {lengths}",
        f"query_start_loc = {starts}",
        f"query_token_stride = {index_text(spec.query_strides[0])}",
        f"query_head_stride = {index_text(spec.query_strides[1])}",
        f"output_token_stride = {spec.num_heads * spec.value_head_dim}",
        f"block_table_stride = {index_text(spec.table_width)}",
        f"tokens = {index_text(spec.num_tokens)}",
        f"sequences = {index_text(spec.num_sequences)}",
        f"query_heads = {spec.num_heads}",
        f"kv_heads = {spec.num_kv_heads}",
        f"head_dim = {spec.head_dim}",
        f"value_dim = {spec.value_head_dim}",
        f"block_size = {index_text(spec.block_size)}",
    ]
    if spec.has_scales:
        kind += f", {BUFFER_TYPES[spec.buffers[1].dtype]}"
        fields += [f"key_scale = {rest[0]}", f"value_scale = {rest[1]}"]
    return _kernel(name, f"PagedAttention<{kind}>", spec, fields)


def emit_attention(spec: AttentionSpec, name: str) -> str:
    kind = BUFFER_TYPES[spec.buffers[-1].dtype]
    batch, queries, keys = (index_text(extent) for extent in spec.extents)
    fields = []
    for role, buffer, offset, strides in zip(
        ("query", "key", "value"), spec.operands, spec.offsets, spec.strides, strict=True
    ):
        fields.append(f"{role} = {buffer} + {index_text(offset)}")
        fields += [f"{role}_strides[{i}] = {index_text(stride)}" for i, stride in enumerate(strides)]
    width = spec.value_head_dim
    fields += [
        f"output = {spec.buffers[-1].name}",
        f"output_strides[0] = {spec.num_heads * width} * ({queries})",
        f"output_strides[1] = {width} * ({queries})",
        f"output_strides[2] = {width}",
        f"batch = {batch}",
        f"query_heads = {spec.num_heads}",
        f"kv_heads = {spec.num_kv_heads}",
        f"queries = {queries}",
        f"keys = {keys}",
        f"head_dim = {spec.head_dim}",
        f"value_dim = {width}",
        f"is_causal = {'true' if spec.is_causal else 'false'}",
    ]
    if spec.bias is not None:
        buffer, dtype, offset, strides = spec.bias
        fields += [f"bias_kind = BiasKind::{_BIAS_KINDS[dtype]}", f"bias = {buffer} + {index_text(offset)}"]
        fields += [f"bias_strides[{i}] = {index_text(stride)}" for i, stride in enumerate(strides)]
    return _kernel(name, f"DenseAttention<{kind}>", spec, fields)
