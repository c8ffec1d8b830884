"""Texts of attention. Scores are kept in units of log 2, as exp2 is what chips have."""

from __future__ import annotations

from ..fragments import tanh_statements
from ..specs.attention import AttentionOptions, AttentionSpec, PagedAttentionSpec, PagedCombineSpec
from ..template import Filling, fill, lines_of, read_template
from .parts import LOG2_E, dot_options, frame_holes, masked, tl_dtype

Constants = dict[str, int | float]


def emit_attention(spec: AttentionSpec) -> str:
    """Attention over given keys."""
    holes: dict[str, Filling] = {
        **frame_holes(spec, _constants(spec)),
        **_row_holes(spec, "query_base + wide_row[:, None] * query_row_stride + dim[None, :]"),
        "bias_base": _bias_base(spec),
        "key_range": _dense_key_range(spec),
        "keys": _keys(spec, "num_keys", _dense_addresses(spec), is_causal=spec.is_causal),
        "normalize": _normalize(spec),
    }
    return fill(read_template("attention"), holes)


def emit_paged_attention(spec: PagedAttentionSpec) -> str:
    """Attention over a paged cache: prefill, or one chunk of keys of a decoding step."""
    constants = _constants(spec) | {
        "NUM_HEADS": spec.num_heads,
        "TILE_TOKENS": spec.tile_tokens,
        "QUERY_TOKEN_STRIDE": spec.query_token_stride or spec.num_heads * spec.head_dim,
        "BLOCK_SIZE": spec.block_size,
    }
    if spec.chunk_keys is not None:
        constants["CHUNK_KEYS"] = spec.chunk_keys
    is_first = spec.chunk_keys is None
    holes: dict[str, Filling] = {
        **frame_holes(spec, constants),
        **_row_holes(spec, "query_row[:, None] + dim[None, :]", with_sinks=is_first),
        "rows": lines_of(read_template("paged_rows")),
        "key_range": _paged_key_range(spec),
        "keys": _keys(spec, "end", _paged_addresses(spec), is_causal=True),
    }
    if is_first:
        holes["normalize"] = _normalize(spec)
    return fill(read_template("paged_prefill" if is_first else "paged_decode"), holes)


def emit_paged_combine(spec: PagedCombineSpec) -> str:
    """The second stage of decode."""
    attention = spec.attention
    assert attention.chunk_keys is not None
    constants: Constants = {
        "NUM_HEADS": attention.num_heads,
        "VALUE_DIM": attention.value_width,
        "TILE_VALUE_DIM": attention.tile_value_dim,
        "CHUNK_KEYS": attention.chunk_keys,
        "TILE_CHUNKS": spec.tile_chunks,
    }
    first_chunk = "0"
    if attention.sliding_window is not None:
        first_chunk = f"tl.maximum(position - {attention.sliding_window - 1}, 0) // CHUNK_KEYS"
    holes: dict[str, Filling] = {
        **frame_holes(spec, constants),
        "initial": _initial("1", attention.has_sinks, "tl.zeros((TILE_VALUE_DIM,), dtype=tl.float32)"),
        "first_chunk": first_chunk,
        "dtype": tl_dtype(attention.dtype),
    }
    return fill(read_template("paged_combine"), holes)


def _constants(spec: AttentionOptions) -> Constants:
    return {
        "GROUP": spec.group,
        "HEAD_DIM": spec.head_dim,
        "VALUE_DIM": spec.value_width,
        "TILE_ROWS": spec.tile_rows,
        "TILE_KEYS": spec.tile_keys,
        "TILE_DIM": spec.tile_dim,
        "TILE_VALUE_DIM": spec.tile_value_dim,
    }


def _row_holes(spec: AttentionOptions, query_address: str, *, with_sinks: bool = True) -> dict[str, Filling]:
    zeros = "tl.zeros((TILE_ROWS, TILE_VALUE_DIM), dtype=tl.float32)"
    slopes = ("slope = tl.load(alibi_slopes + head).to(tl.float32)",)
    if isinstance(spec, PagedAttentionSpec):
        slopes = ("slope = tl.load(alibi_slopes + head, mask=is_row, other=0.0).to(tl.float32)[:, None]",)
    initial = _initial("TILE_ROWS", spec.has_sinks and with_sinks, zeros, is_paged=isinstance(spec, PagedAttentionSpec))
    is_value = "is_row[:, None]"
    if spec.tile_value_dim != spec.value_width:
        is_value = "is_row[:, None] & (value_dim < VALUE_DIM)[None, :]"
    return {
        "load_query": masked(query_address, ["is_row[:, None]", *_dim_tail(spec)]),
        "initial": (*(slopes if spec.has_alibi else ()), *initial),
        "is_output": is_value,
    }


def _initial(rows: str, has_sinks: bool, zeros: str, *, is_paged: bool = False) -> tuple[str, ...]:
    """Maximum, sum and weighted values so far: nothing, or the sink, a key that has a logit and no value."""
    if not has_sinks:
        return (
            f'row_max = tl.full(({rows},), float("-inf"), dtype=tl.float32)',
            f"row_sum = tl.zeros(({rows},), dtype=tl.float32)",
            f"acc = {zeros}",
        )
    # A tile of a paged kernel mixes heads; elsewhere the whole program has one.
    load = "tl.load(sinks + head, mask=is_row, other=0.0)" if is_paged else "tl.load(sinks + head)"
    return (
        f"row_max = tl.zeros(({rows},), dtype=tl.float32) + {load}.to(tl.float32) * {LOG2_E}",
        'row_sum = tl.where(row_max == float("-inf"), 0.0, 1.0)',
        f"acc = {zeros}",
    )


def _normalize(spec: AttentionOptions) -> tuple[str, ...]:
    """A row whose keys are all hidden has a sum of 0 and gives zeros."""
    divisor = "tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]"
    return (f"result = (acc / {divisor}).to({tl_dtype(spec.dtype)})",)


def _dim_tail(spec: AttentionOptions) -> list[str]:
    return ["(dim < HEAD_DIM)[None, :]"] if spec.tile_dim != spec.head_dim else []


def _keys(spec: AttentionOptions, num_keys: str, addresses: tuple[str, ...], *, is_causal: bool) -> tuple[str, ...]:
    """One tile of keys: scores, the running softmax, and the weighted values."""
    changes = _score_changes(spec)
    value_tail = ["(value_dim < VALUE_DIM)[None, :]"] if spec.tile_value_dim != spec.value_width else []
    holes: dict[str, Filling] = {
        "num_keys": num_keys,
        "addresses": addresses,
        "load_key": masked("key_address", ["is_key[:, None]", *_dim_tail(spec)]),
        # Cache beyond the sequence's end may hold NaN, which a probability of 0 would not remove.
        "load_value": masked("value_address", ["is_key[:, None]", *value_tail]),
        "scale": repr(spec.scale if changes else spec.scale * LOG2_E),
        "scores": (*changes, f"scores = scores * {LOG2_E}") if changes else (),
        "visibility": _visibility(spec, is_causal=is_causal),
        "dtype": tl_dtype(spec.dtype),
        "dot_options": dot_options(spec.dtype, allow_tf32=spec.allow_tf32),
    }
    return lines_of(fill(read_template("attention_keys"), holes))


def _score_changes(spec: AttentionOptions) -> tuple[str, ...]:
    """Softcap, ALiBi, bias: in the order of the definition."""
    lines: list[str] = []
    if spec.logit_softcap is not None:
        limit = float(spec.logit_softcap)
        tanh = tanh_statements("capped", "scaled")
        lines += [f"scaled = scores * {1.0 / limit!r}", *tanh, f"scores = capped * {limit!r}"]
    if spec.has_alibi:
        lines += ["distance = (key_position[None, :] - position[:, None]).to(tl.float32)", "scores += slope * distance"]
    if isinstance(spec, AttentionSpec) and spec.bias_dtype is not None:
        lines += _bias_changes(spec)
    return tuple(lines)


def _bias_changes(spec: AttentionSpec) -> list[str]:
    place = "bias_base + wide_row[:, None] * bias_row_stride + key_position[None, :]"
    conditions = ["is_row[:, None]", "is_key[None, :]"]
    if spec.bias_dtype == "i1":
        seen = f"is_seen = {masked(place, conditions, '0')} != 0"
        return [seen, 'scores = tl.where(is_seen, scores, float("-inf"))']
    return [f"scores += {masked(place, conditions)}.to(tl.float32)"]


def _visibility(spec: AttentionOptions, *, is_causal: bool) -> tuple[str, ...]:
    lines = ["is_visible = is_key[None, :]"]
    if is_causal:
        lines.append("is_visible &= key_position[None, :] <= position[:, None]")
    if spec.sliding_window is not None:
        lines.append(f"is_visible &= position[:, None] - key_position[None, :] < {spec.sliding_window}")
    return tuple(lines)


def _paged_key_range(spec: PagedAttentionSpec) -> tuple[str, ...]:
    """``begin`` is a multiple of TILE_KEYS, so that tiles are the same for every row that sees them."""
    chunk = "chunk * CHUNK_KEYS" if spec.chunk_keys else ""
    if spec.sliding_window is None:
        return (f"begin = {chunk or 0}",)
    seen = (
        f"first_seen = tl.maximum(num_keys - num_tokens + tile * TILE_TOKENS - {spec.sliding_window - 1}, 0)",
        "begin = first_seen // TILE_KEYS * TILE_KEYS",
    )
    return (*seen, f"begin = tl.maximum(begin, {chunk})") if chunk else seen


def _dense_key_range(spec: AttentionSpec) -> tuple[str, ...]:
    lines = ["first_row = tl.min(row)", "begin = 0", "end = num_keys"]
    if spec.is_causal:
        lines[2] = "end = tl.minimum(first_row + TILE_ROWS + num_keys - num_queries, num_keys)"
    if spec.sliding_window is not None:
        seen = f"first_row + num_keys - num_queries - {spec.sliding_window - 1}"
        lines[1] = f"begin = tl.maximum({seen}, 0) // TILE_KEYS * TILE_KEYS"
    return tuple(lines)


def _paged_addresses(spec: PagedAttentionSpec) -> tuple[str, ...]:
    if spec.block_size % spec.tile_keys == 0:
        block = ("block = tl.load(table + first_key // BLOCK_SIZE).to(tl.int64)",)
    else:
        block = ("block = tl.load(table + key_position // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)",)
    key_place = f"slot[:, None] * {spec.num_kv_heads * spec.head_dim} + kv_head * HEAD_DIM + dim[None, :]"
    value_place = f"slot[:, None] * {spec.num_kv_heads * spec.value_width} + kv_head * VALUE_DIM + value_dim[None, :]"
    return (
        *block,
        "slot = block * BLOCK_SIZE + key_position % BLOCK_SIZE",
        f"key_address = key_cache + {key_place}",
        f"value_address = value_cache + {value_place}",
    )


def _dense_addresses(spec: AttentionSpec) -> tuple[str, ...]:
    return (
        "key_address = key_base + key_position.to(tl.int64)[:, None] * key_row_stride + dim[None, :]",
        "value_address = value_base + key_position.to(tl.int64)[:, None] * value_row_stride + value_dim[None, :]",
    )


def _bias_base(spec: AttentionSpec) -> tuple[str, ...]:
    if spec.bias_dtype is None:
        return ()
    return ("bias_base = bias + batch * bias_batch_stride + head * bias_head_stride",)
