"""Triton text of the attention specs: an online softmax over tiles of keys (FlashAttention-2, Dao 2023).

Paged attention cuts keys at multiples of ``CHUNK_KEYS`` counted from position 0. Each chunk has a softmax of
its own, and chunks are joined in ascending order (FlashDecoding, Dao et al. 2023, with the cuts fixed instead of
fitted to the chip). One kernel does all chunks of a tile of query tokens in a loop; where every sequence
has one token, a second one gives each chunk to a program, and a third joins them by the same
arithmetic. So a row's result depends on its own keys alone, not on the batch nor on how a prompt is cut.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch

from ..specs import AttentionSpec, PagedAttentionSpec
from .kernel_text import Emitted, Launch, divided_up, module_text, size_text
from .scalar_text import TYPES, Scope
from .specs.base import power_of_two_at_least
from .tanh_text import tanh_statements

CHUNK_KEYS = 512
TILE_ROWS = 64
LOG2_E = 1.4426950408889634

_SOFTMAX = (
    "next_max = tl.maximum(row_max, tl.max(scores, axis=1))",
    "# A row that has seen no key yet has no maximum; subtracting one from another would give NaN.",
    'shift = tl.where(next_max == float("-inf"), 0.0, next_max)',
    "rescale = tl.exp2(row_max - shift)",
    "probabilities = tl.exp2(scores - shift[:, None])",
    "row_sum = row_sum * rescale + tl.sum(probabilities, axis=1)",
    "row_max = next_max",
)
_JOIN = (
    "next_max = tl.maximum(total_max, row_max)",
    'shift = tl.where(next_max == float("-inf"), 0.0, next_max)',
    "old = tl.exp2(total_max - shift)",
    "new = tl.exp2(row_max - shift)",
    "total_sum = total_sum * old + row_sum * new",
    "total = total * old[:, None] + acc * new[:, None]",
    "total_max = next_max",
)
_FIND_SEQUENCE = (
    "# Sequence s owns tiles from query_start_loc[s] // TILE_TOKENS + s on.",
    "left = tl.full((), 0, tl.int32)",
    "right = {num_sequences}.to(tl.int32)",
    "while left < right:",
    "    middle = (left + right) // 2",
    "    first_tile = tl.load({starts} + middle).to(tl.int32) // TILE_TOKENS + middle",
    "    if first_tile <= tl.program_id(0):",
    "        left = middle + 1",
    "    else:",
    "        right = middle",
    "sequence = left - 1",
)


def _width(dim: int) -> int:
    return max(16, power_of_two_at_least(dim))


def _tile_keys(spec: PagedAttentionSpec | AttentionSpec) -> int:
    """Keys of a tile, by the width of heads alone: wide heads leave less room."""
    widest = max(_width(spec.head_dim), _width(spec.value_head_dim))
    return 64 if widest <= 128 else 32


def _start(prefix: str, rows: int | str, width: int) -> list[str]:
    """An online softmax that has seen nothing."""
    names = ("row_max", "row_sum", "acc") if not prefix else ("total_max", "total_sum", "total")
    return [
        f'{names[0]} = tl.full(({rows},), float("-inf"), dtype=tl.float32)',
        f"{names[1]} = tl.zeros(({rows},), dtype=tl.float32)",
        f"{names[2]} = tl.zeros(({rows}, {width}), dtype=tl.float32)",
    ]


def _sink(sinks: str | None, names: tuple[str, str], head: str, mask: str) -> list[str]:
    """A sink is a key that has a logit and no value: it is there before all others."""
    if sinks is None:
        return []
    return [
        f"{names[0]} = tl.zeros_like({names[1]}) + tl.load({sinks} + {head}{mask}) * {LOG2_E}",
        f'{names[1]} = tl.where({names[0]} == float("-inf"), 0.0, {names[1]} + 1.0)',
    ]


def _scores(spec: PagedAttentionSpec | AttentionSpec, bias: Sequence[str] = ()) -> list[str]:
    """Scores of a tile, changed in the order of the definition, in units of log2."""
    precision = _precision(spec)
    lines = [f"scores = tl.dot(query_tile, key_tile.T{precision}) * {spec.scale!r}"]
    if spec.logit_softcap is not None:
        limit = float(spec.logit_softcap)
        lines += [f"scaled = tl.div_rn(scores, {limit!r})", *tanh_statements("capped", "scaled")]
        lines.append(f"scores = capped * {limit!r}")
    if spec.alibi_slopes is not None:
        lines.append("scores += slope * (key_position[None, :] - position[:, None]).to(tl.float32)")
    lines += [*bias, f"scores = scores * {LOG2_E}", "is_visible = is_key[None, :]"]
    if isinstance(spec, PagedAttentionSpec) or spec.is_causal:
        lines.append("is_visible &= key_position[None, :] <= position[:, None]")
    if spec.sliding_window is not None:
        lines.append(f"is_visible &= position[:, None] - key_position[None, :] < {spec.sliding_window}")
    return [*lines, 'scores = tl.where(is_visible, scores, float("-inf"))']


def _precision(spec: PagedAttentionSpec | AttentionSpec) -> str:
    return ', input_precision="ieee"' if spec.buffers[0].dtype == torch.float32 else ""


def _load(address: str, rows: str, dim: str, extent: int) -> str:
    conditions = [f"{rows}[:, None]"] + ([f"({dim} < {extent})[None, :]"] if _width(extent) != extent else [])
    return f"tl.load({address}, mask={' & '.join(conditions)}, other=0.0)"


def _values(spec: PagedAttentionSpec | AttentionSpec) -> list[str]:
    """The weighted values; beyond a sequence's end a cache may hold NaN, which a probability of 0 would not remove."""
    return [
        f"value_tile = {_load('value_address', 'is_key', 'value_dim', spec.value_head_dim)}",
        f"acc = tl.dot(probabilities.to(value_tile.dtype), value_tile, acc * rescale[:, None]{_precision(spec)})",
    ]


def _indented(lines: Sequence[str], depth: int = 1) -> list[str]:
    return ["    " * depth + line for line in lines]


class _Paged:
    """The names and sizes of one paged spec's text."""

    def __init__(self, spec: PagedAttentionSpec) -> None:
        self.spec = spec
        self.query, self.keys, self.values, self.tables, self.lengths, self.starts = (
            buffer.name for buffer in spec.buffers[:6]
        )
        self.output = spec.buffers[-1].name
        self.group = spec.num_heads // spec.num_kv_heads
        self.tile_rows = max(TILE_ROWS, power_of_two_at_least(self.group))
        self.tile_tokens = self.tile_rows // self.group
        self.scope = Scope("", 1, {}, ())

    def index(self, expression: sympy.Expr) -> str:
        text = self.scope.index(expression)
        return f"tl.full((), {text}, tl.int64)" if text.isdigit() else text

    @property
    def num_chunks(self) -> str:
        """Chunks that the longest sequence of a step may have."""
        return divided_up(f"({size_text(self.spec.table_width)} * {size_text(self.spec.block_size)})", CHUNK_KEYS)

    def constants(self) -> dict[str, int | float]:
        return {
            "CHUNK_KEYS": CHUNK_KEYS,
            "TILE_TOKENS": self.tile_tokens,
            "TILE_ROWS": self.tile_rows,
            "TILE_KEYS": _tile_keys(self.spec),
            "GROUP": self.group,
        }

    def sequence(self) -> list[str]:
        return [
            f"sequence_begin = tl.load({self.starts} + sequence)",
            f"num_tokens = (tl.load({self.starts} + sequence + 1) - sequence_begin).to(tl.int32)",
            f"num_keys = tl.load({self.lengths} + sequence).to(tl.int32)",
        ]

    def rows(self) -> list[str]:
        """Rows of a tile: tokens, each with the query heads that share a key head."""
        spec = self.spec
        return [
            "row = tl.arange(0, TILE_ROWS)",
            "token = tile * TILE_TOKENS + row // GROUP",
            "head = kv_head * GROUP + row % GROUP",
            "is_row = (row < TILE_TOKENS * GROUP) & (token < num_tokens)",
            "position = num_keys - num_tokens + token",
            "packed_token = sequence_begin.to(tl.int64) + token",
            f"dim = tl.arange(0, {_width(spec.head_dim)})",
            f"value_dim = tl.arange(0, {_width(spec.value_head_dim)})",
            f"query_row = {self.query} + {self.scope.index(spec.query_offset)} + packed_token * "
            f"{self.scope.index(spec.query_strides[0])} + head * {self.scope.index(spec.query_strides[1])}",
            f"query_tile = {_load('query_row[:, None] + dim[None, :]', 'is_row', 'dim', spec.head_dim)}",
            f"table = {self.tables} + sequence.to(tl.int64) * {self.scope.index(spec.table_width)}",
            *([f"slope = tl.load({spec.alibi_slopes} + head, mask=is_row, other=0.0)[:, None]"]
              if spec.alibi_slopes else []),
        ]  # fmt: skip

    def tile(self) -> list[str]:
        """One tile of keys."""
        spec = self.spec
        block_size = self.scope.index(spec.block_size)
        keys, values = spec.num_kv_heads * spec.head_dim, spec.num_kv_heads * spec.value_head_dim
        return [
            "key_position = first_key + tl.arange(0, TILE_KEYS)",
            "is_key = key_position < num_keys",
            f"block_size = ({self.index(spec.block_size)}).to(tl.int32)",
            "block = tl.load(table + key_position // block_size, mask=is_key, other=0).to(tl.int64)",
            f"slot = block * {block_size} + key_position % block_size",
            f"key_address = {self.keys} + slot[:, None] * {keys} + kv_head * {spec.head_dim} + dim[None, :]",
            f"key_tile = {_load('key_address', 'is_key', 'dim', spec.head_dim)}",
            *_scores(spec),
            *_SOFTMAX,
            f"value_address = {self.values} + slot[:, None] * {values} + kv_head * {spec.value_head_dim} + "
            "value_dim[None, :]",
            *_values(spec),
        ]

    def first_visible(self) -> list[str]:
        """Where the keys that the tile's first token sees begin, at a multiple of TILE_KEYS."""
        window = self.spec.sliding_window
        if window is None:
            return ["begin = 0"]
        return [
            f"begin = tl.maximum(num_keys - num_tokens + tile * TILE_TOKENS - {window - 1}, 0)",
            "begin = begin // TILE_KEYS * TILE_KEYS",
        ]

    def is_output(self) -> str:
        tail = self.spec.value_head_dim != _width(self.spec.value_head_dim)
        return f"is_row[:, None]{f' & (value_dim < {self.spec.value_head_dim})[None, :]' if tail else ''}"

    def finish(self) -> list[str]:
        """A row whose keys are all hidden has a sum of 0 and gives zeros."""
        kind = TYPES[self.spec.buffers[-1].dtype]
        place = f"{self.output} + (packed_token * {self.spec.num_heads} + head)[:, None] * {self.spec.value_head_dim}"
        return [
            "divisor = tl.where(total_sum == 0.0, 1.0, total_sum)[:, None]",
            f"result = tl.div_rn(total, tl.broadcast_to(divisor, total.shape)).to({kind})",
            f"tl.store({place} + value_dim[None, :], result, mask={self.is_output()})",
        ]

    def text(self, name: str, body: list[str], num_warps: int, num_stages: int) -> str:
        used = {key: value for key, value in self.constants().items() if any(key in line for line in body)}
        return module_text(
            self.spec, name, body, constants=used, num_workspaces=3, num_warps=num_warps, num_stages=num_stages
        )


def emit_paged_attention(spec: PagedAttentionSpec, name: str) -> Emitted:
    paged = _Paged(spec)
    tokens, sequences = size_text(spec.num_tokens), size_text(spec.num_sequences)
    is_decode = f"{tokens} == {sequences}"
    tiles = f"{tokens} // {paged.tile_tokens} + {sequences}"
    heads = str(spec.num_kv_heads)
    slots = f"{tokens} * {spec.num_heads} * {paged.num_chunks} * ({tokens} == {sequences})"
    return Emitted(
        (
            Launch(f"{name}_prefill", _prefill(paged, f"{name}_prefill"), (tiles, heads, "1"), f"not {is_decode}"),
            Launch(f"{name}_decode", _decode(paged, f"{name}_decode"), (paged.num_chunks, heads, sequences), is_decode),
            Launch(f"{name}_join", _join(paged, f"{name}_join"), (heads, sequences, "1"), is_decode),
        ),
        (f"{slots} * {spec.value_head_dim}", slots, slots),
    )


def _prefill(paged: _Paged, name: str) -> str:
    spec = paged.spec
    width = _width(spec.value_head_dim)
    names = {"num_sequences": paged.index(spec.num_sequences), "starts": paged.starts}
    chunk = [
        *_start("", "TILE_ROWS", width),
        "for first_key in range(tl.maximum(begin, first_chunk), tl.minimum(first_chunk + CHUNK_KEYS, end), TILE_KEYS):",
        *_indented(paged.tile()),
        *_JOIN,
    ]
    body = [
        "kv_head = tl.program_id(1)",
        *(line.format(**names) for line in _FIND_SEQUENCE),
        *paged.sequence(),
        "tile = tl.program_id(0) - (sequence_begin.to(tl.int32) // TILE_TOKENS + sequence)",
        "if tile * TILE_TOKENS >= num_tokens:",
        "    return",
        *paged.rows(),
        *_start("total", "TILE_ROWS", width),
        *_sink(spec.sinks, ("total_max", "total_sum"), "head", ", mask=is_row, other=0.0"),
        "end = num_keys - num_tokens + tl.minimum((tile + 1) * TILE_TOKENS, num_tokens)",
        *paged.first_visible(),
        "for first_chunk in range(begin // CHUNK_KEYS * CHUNK_KEYS, end, CHUNK_KEYS):",
        *_indented(chunk),
        *paged.finish(),
    ]
    return paged.text(name, body, 8 if width > 64 else 4, 2)


def _decode(paged: _Paged, name: str) -> str:
    """One chunk of one sequence's only token: its partial softmax goes to the workspaces."""
    spec = paged.spec
    body = [
        "chunk = tl.program_id(0)",
        "kv_head = tl.program_id(1)",
        "sequence = tl.program_id(2)",
        *paged.sequence(),
        "if chunk * CHUNK_KEYS >= num_keys:",
        "    return",
        "tile = 0",
        *paged.rows(),
        *_start("", "TILE_ROWS", _width(spec.value_head_dim)),
        *paged.first_visible(),
        "first = tl.maximum(begin, chunk * CHUNK_KEYS)",
        "for first_key in range(first, tl.minimum((chunk + 1) * CHUNK_KEYS, num_keys), TILE_KEYS):",
        *_indented(paged.tile()),
        f"place = (packed_token * {spec.num_heads} + head) * tl.num_programs(0) + chunk",
        "tl.store(w1 + place, row_max, mask=is_row)",
        "tl.store(w2 + place, row_sum, mask=is_row)",
        f"partial = w0 + place[:, None] * {spec.value_head_dim} + value_dim[None, :]",
        f"tl.store(partial, acc, mask={paged.is_output()})",
    ]
    return paged.text(name, body, 8 if _width(spec.value_head_dim) > 64 else 4, 2)


def _join(paged: _Paged, name: str) -> str:
    """The chunks of one sequence's token and one key head, in ascending order."""
    spec = paged.spec
    width, rows = _width(spec.value_head_dim), power_of_two_at_least(paged.group)
    chunk = [
        "place = (packed_token * {heads} + head) * num_chunks + chunk",
        'row_max = tl.load(w1 + place, mask=is_row, other=float("-inf"))',
        "row_sum = tl.load(w2 + place, mask=is_row, other=0.0)",
        "partial = w0 + place[:, None] * {width} + value_dim[None, :]",
        f"acc = tl.load(partial, mask={paged.is_output()}, other=0.0)",
    ]
    body = [
        "kv_head = tl.program_id(0)",
        "sequence = tl.program_id(1)",
        *paged.sequence(),
        f"row = tl.arange(0, {rows})",
        "is_row = row < GROUP",
        "head = kv_head * GROUP + row",
        "packed_token = sequence_begin.to(tl.int64) + row * 0",
        "tile = 0",
        f"value_dim = tl.arange(0, {width})",
        f"num_chunks = tl.cdiv({paged.index(spec.table_width)} * {paged.index(spec.block_size)}, CHUNK_KEYS)",
        *_start("total", rows, width),
        *_sink(spec.sinks, ("total_max", "total_sum"), "head", ", mask=is_row, other=0.0"),
        *paged.first_visible(),
        "for chunk in range(begin // CHUNK_KEYS, tl.cdiv(num_keys, CHUNK_KEYS)):",
        *_indented([line.format(heads=spec.num_heads, width=spec.value_head_dim) for line in chunk]),
        *_indented(_JOIN),
        *paged.finish(),
    ]
    return paged.text(name, body, 4, 2)


def emit_attention(spec: AttentionSpec, name: str) -> Emitted:
    """Over given keys and values; the grid is over tiles of queries, heads and batch."""
    tile_rows = TILE_ROWS
    scope = Scope("", 1, {}, ())
    width, head_dim = _width(spec.value_head_dim), spec.head_dim
    group = spec.num_heads // spec.num_kv_heads
    queries, keys = (_whole(scope.index(extent)) for extent in spec.extents[1:])
    names = ("query", "key", "value")
    heads = {"query": "head", "key": "kv_head", "value": "kv_head"}
    bases = [
        f"{role}_base = {buffer} + {scope.index(offset)} + batch * {scope.index(strides[0])} + "
        f"{heads[role]} * {scope.index(strides[1])}"
        for role, buffer, offset, strides in zip(names, spec.operands, spec.offsets, spec.strides, strict=True)
    ]
    row_strides = {role: scope.index(strides[2]) for role, strides in zip(names, spec.strides, strict=True)}
    tile = [
        "key_position = first_key + tl.arange(0, TILE_KEYS)",
        "is_key = key_position < num_keys",
        f"key_address = key_base + key_position.to(tl.int64)[:, None] * {row_strides['key']} + dim[None, :]",
        f"key_tile = {_load('key_address', 'is_key', 'dim', head_dim)}",
        *_scores(spec, _bias(spec, scope)),
        *_SOFTMAX,
        f"value_address = value_base + key_position.to(tl.int64)[:, None] * {row_strides['value']} + "
        "value_dim[None, :]",
        *_values(spec),
    ]
    output_place = f"((batch * {spec.num_heads} + head) * num_queries + row)[:, None] * {spec.value_head_dim}"
    tail = f" & (value_dim < {spec.value_head_dim})[None, :]" if width != spec.value_head_dim else ""
    body = [
        "row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)",
        "head = tl.program_id(1).to(tl.int64)",
        "batch = tl.program_id(2).to(tl.int64)",
        f"kv_head = head // {group}",
        f"num_queries = {queries}",
        f"num_keys = ({keys}).to(tl.int32)",
        "is_row = row < num_queries",
        "position = row + (num_keys - num_queries.to(tl.int32))",
        f"dim = tl.arange(0, {_width(head_dim)})",
        f"value_dim = tl.arange(0, {width})",
        *bases,
        f"query_address = query_base + row.to(tl.int64)[:, None] * {row_strides['query']} + dim[None, :]",
        f"query_tile = {_load('query_address', 'is_row', 'dim', head_dim)}",
        *([f"slope = tl.load({spec.alibi_slopes} + head)"] if spec.alibi_slopes else []),
        *_start("", "TILE_ROWS", width),
        *_sink(spec.sinks, ("row_max", "row_sum"), "head", ""),
        *_range(spec),
        "for first_key in range(begin, end, TILE_KEYS):",
        *_indented(tile),
        "divisor = tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]",
        f"result = tl.div_rn(acc, tl.broadcast_to(divisor, acc.shape)).to({TYPES[spec.buffers[-1].dtype]})",
        f"tl.store({spec.buffers[-1].name} + {output_place} + value_dim[None, :], result, mask=is_row[:, None]{tail})",
    ]
    constants = {"TILE_ROWS": tile_rows, "TILE_KEYS": _tile_keys(spec)}
    text = module_text(
        spec, name, body, constants=constants, num_warps=8 if width > 64 else 4, num_stages=2, allows_contraction=True
    )
    batch, num_queries, _ = map(size_text, spec.extents)
    return Emitted((Launch(name, text, (divided_up(num_queries, tile_rows), str(spec.num_heads), batch)),))


def _whole(text: str) -> str:
    return f"tl.full((), {text}, tl.int64)" if text.isdigit() else text


def _range(spec: AttentionSpec) -> list[str]:
    """Keys that any row of the tile may see."""
    shift = "num_keys - num_queries.to(tl.int32)"
    lines = ["begin = 0", "end = num_keys"]
    if spec.is_causal:
        lines[1] = f"end = tl.minimum((tl.program_id(0) + 1) * TILE_ROWS + {shift}, num_keys)"
    if spec.sliding_window is not None:
        first = f"tl.program_id(0) * TILE_ROWS + {shift} - {spec.sliding_window - 1}"
        lines[0] = f"begin = tl.maximum({first}, 0) // TILE_KEYS * TILE_KEYS"
    return lines


def _bias(spec: AttentionSpec, scope: Scope) -> list[str]:
    if spec.bias is None:
        return []
    buffer, dtype, offset, strides = spec.bias
    batch, head, row, key = map(scope.index, strides)
    place = (
        f"{buffer} + {scope.index(offset)} + batch * {batch} + head * {head} + "
        f"row.to(tl.int64)[:, None] * {row} + key_position.to(tl.int64)[None, :] * {key}"
    )
    loaded = f"tl.load({place}, mask=is_row[:, None] & is_key[None, :], other=0)"
    if dtype == torch.bool:
        return [f'scores = tl.where({loaded} != 0, scores, float("-inf"))']
    return [f"scores += {loaded}.to(tl.float32)"]
