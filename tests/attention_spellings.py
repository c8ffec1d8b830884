"""The ways in which models spell attention: a strategy that draws one, its inputs, and the function itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class MaskSpelling:
    """One mask of the scores: how it is applied, what it fills with, and over which of [B, H] it differs."""

    how: str  # add, masked_fill, where_hidden, where_seen, of sdpa: float, bool
    fill: str  # inf, lowest
    shape: str  # rows (2-d), heads (3-d), batches, all (4-d)


@dataclass(frozen=True)
class Spelling:
    """A program around one attention. Sizes first, then how each part is written."""

    dtype: torch.dtype
    batch: int
    num_kv_heads: int
    group: int
    query_length: int
    key_length: int
    head_dim: int
    value_dim: int
    layout: str  # heads, transposed, permuted, rows
    strided: bool
    product: str  # matmul, merged_matmul, bmm, baddbmm, sdpa
    key_order: str  # transpose, permute, mT
    repeat: str  # expand, interleave, broadcast
    scale: str  # none, mul, div, left, tensor, query, key, both, last
    masks: tuple[MaskSpelling, ...]
    masks_merged: bool
    softcap: bool
    upcast: str  # none, dtype, float, all
    dropout: bool
    is_causal: bool

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group

    @property
    def factor(self) -> float:
        return 1 / math.sqrt(self.head_dim)


def masks() -> st.SearchStrategy[MaskSpelling]:
    return st.builds(
        MaskSpelling,
        how=st.sampled_from(("add", "masked_fill", "where_hidden", "where_seen")),
        fill=st.sampled_from(("inf", "lowest")),
        shape=st.sampled_from(("rows", "heads", "batches", "all")),
    )


@st.composite
def spellings(draw: st.DrawFn) -> Spelling:
    """Programs that have to be recognised, whatever their sizes."""
    product = draw(st.sampled_from(("matmul", "matmul", "merged_matmul", "bmm", "baddbmm", "sdpa", "sdpa")))
    merged = product in ("merged_matmul", "bmm", "baddbmm")
    num_masks = draw(st.integers(0, 1 if product == "sdpa" else 2))
    scales = ("none", "mul", "div", "left", "tensor", "query", "key", "both", "last")
    scale = draw(st.sampled_from(("none", "mul") if product == "sdpa" else scales))
    num_kv_heads, group = draw(st.sampled_from(((1, 1), (1, 3), (2, 1), (2, 2), (2, 3), (3, 1))))
    repeats = ("expand", "interleave") if merged or num_kv_heads > 1 else ("expand", "interleave", "broadcast")
    return Spelling(
        dtype=draw(st.sampled_from(DTYPES)),
        batch=draw(st.integers(1, 3)),
        num_kv_heads=num_kv_heads,
        group=group,
        query_length=draw(st.sampled_from((1, 3, 4, 6))),
        key_length=draw(st.sampled_from((1, 4, 5, 7))),
        head_dim=draw(st.sampled_from((1, 3, 4, 8))),
        value_dim=draw(st.sampled_from((1, 4, 5))),
        layout=draw(st.sampled_from(("heads", "transposed", "permuted", "rows"))),
        strided=draw(st.booleans()),
        product=product,
        key_order=draw(st.sampled_from(("transpose", "permute", "mT"))),
        repeat=draw(st.sampled_from(repeats)),
        scale=scale,
        masks=tuple(draw(masks()) for _ in range(num_masks)),
        masks_merged=merged and draw(st.booleans()),
        softcap=product not in ("baddbmm", "sdpa") and scale != "last" and draw(st.booleans()),
        upcast=draw(st.sampled_from(("none", "dtype", "float", "all"))),
        dropout=draw(st.booleans()),
        is_causal=product == "sdpa" and num_masks == 0 and draw(st.booleans()),
    )


def drawn_inputs(spelling: Spelling, seed: int = 0) -> list[torch.Tensor]:
    """Queries, keys, values (float64, in the layout that the model gets them in), and one hidden-mask a mask."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (spelling.query_length, spelling.key_length, spelling.key_length)
    heads = (spelling.num_heads, spelling.num_kv_heads, spelling.num_kv_heads)
    widths = (spelling.head_dim, spelling.head_dim, spelling.value_dim)
    tensors = []
    for length, num_heads, width in zip(lengths, heads, widths, strict=True):
        shape = _stored_shape(spelling, num_heads, length, width)
        stride = 2 if spelling.strided else 1
        stored = torch.randn(*shape[:-1], shape[-1] * stride, generator=generator, dtype=torch.float64)
        tensors.append(stored[..., ::stride])
    return [*tensors, *(_drawn_mask(spelling, mask, generator) for mask in spelling.masks)]


def _stored_shape(spelling: Spelling, num_heads: int, length: int, width: int) -> tuple[int, ...]:
    if spelling.layout == "heads":
        return spelling.batch, num_heads, length, width
    if spelling.layout == "rows":
        return spelling.batch, length, num_heads * width
    return spelling.batch, length, num_heads, width


def _drawn_mask(spelling: Spelling, mask: MaskSpelling, generator: torch.Generator) -> torch.Tensor:
    """True where a key is hidden; every query sees the first key, as a row of no key has no agreed value."""
    leading = {
        "rows": (),
        "heads": (spelling.num_heads,),
        "batches": (spelling.batch, 1),
        "all": (spelling.batch, spelling.num_heads),
    }[mask.shape]
    hidden = torch.rand(*leading, spelling.query_length, spelling.key_length, generator=generator) < 0.4
    hidden[..., 0] = False
    return hidden


def spelled(spelling: Spelling) -> Callable[..., torch.Tensor]:
    """The program in eager PyTorch: ``function(query, key, value)``, then as many masks as the spelling has."""

    def function(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        first: torch.Tensor | None = None,
        second: torch.Tensor | None = None,
    ) -> torch.Tensor:
        hidden = [mask for mask in (first, second) if mask is not None]
        query = _as_heads(spelling, query, spelling.num_heads, spelling.head_dim)
        key = _as_heads(spelling, key, spelling.num_kv_heads, spelling.head_dim)
        value = _as_heads(spelling, value, spelling.num_kv_heads, spelling.value_dim)
        if spelling.product == "sdpa":
            return _by_sdpa(spelling, query, key, value, *hidden)
        dtype = query.dtype
        if spelling.upcast == "all" and dtype.itemsize < 4:
            query, key, value = query.float(), key.float(), value.float()
        key, value = (_repeated(spelling, operand) for operand in (key, value))
        output = _by_hand(spelling, query, key, value, *hidden)
        return output.transpose(1, 2).reshape(spelling.batch, spelling.query_length, -1)

    return function


def _as_heads(spelling: Spelling, stored: torch.Tensor, num_heads: int, width: int) -> torch.Tensor:
    if spelling.layout == "heads":
        return stored
    if spelling.layout == "rows":
        stored = stored.reshape(spelling.batch, -1, num_heads, width)
    return stored.permute(0, 2, 1, 3) if spelling.layout == "permuted" else stored.transpose(1, 2)


def _repeated(spelling: Spelling, operand: torch.Tensor) -> torch.Tensor:
    if spelling.group == 1 or spelling.repeat == "broadcast":
        return operand
    if spelling.repeat == "interleave":
        return operand.repeat_interleave(spelling.group, dim=1)
    batch, heads, length, width = operand.shape
    expanded = operand[:, :, None].expand(batch, heads, spelling.group, length, width)
    return expanded.reshape(batch, heads * spelling.group, length, width)


def _by_sdpa(
    spelling: Spelling, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *hidden: torch.Tensor
) -> torch.Tensor:
    mask = None
    for how, where in zip(spelling.masks, hidden, strict=True):
        mask = ~where if how.how == "masked_fill" else _additive(how, where, query)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=spelling.is_causal,
        scale=None if spelling.scale == "none" else 0.3,
        enable_gqa=spelling.group > 1,
    )


def _additive(mask: MaskSpelling, hidden: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    zeros = torch.zeros(hidden.shape, dtype=like.dtype)
    return zeros.masked_fill(hidden, _fill(mask, like.dtype))


def _fill(mask: MaskSpelling, dtype: torch.dtype) -> float:
    return -math.inf if mask.fill == "inf" else torch.finfo(dtype).min


def _by_hand(
    spelling: Spelling, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *hidden: torch.Tensor
) -> torch.Tensor:
    merged = spelling.product not in ("matmul", "sdpa")
    if merged:
        query, key, value = (operand.reshape(-1, *operand.shape[-2:]) for operand in (query, key, value))
    scores = _scaled_product(spelling, query, _key_transposed(spelling, key))
    if spelling.softcap:
        scores = torch.tanh(scores / 3.0) * 3.0
    scores = _masked(spelling, scores, *hidden)
    probabilities = _softmax(spelling, scores, value.dtype)
    if spelling.dropout:
        probabilities = F.dropout(probabilities, p=0.1, training=False)
    if not merged:
        return torch.matmul(probabilities, value)
    product = torch.matmul if spelling.product == "merged_matmul" else torch.bmm
    output = product(probabilities, value)
    return output.reshape(spelling.batch, spelling.num_heads, spelling.query_length, spelling.value_dim)


def _key_transposed(spelling: Spelling, key: torch.Tensor) -> torch.Tensor:
    if spelling.key_order == "permute":
        return key.permute(*range(key.dim() - 2), key.dim() - 1, key.dim() - 2)
    return key.mT if spelling.key_order == "mT" else key.transpose(-1, -2)


def _scaled_product(spelling: Spelling, query: torch.Tensor, key_transposed: torch.Tensor) -> torch.Tensor:
    factor, scale = spelling.factor, spelling.scale
    if scale in ("query", "both"):
        query = query * (factor if scale == "query" else math.sqrt(factor))
    if scale in ("key", "both"):
        key_transposed = key_transposed * (factor if scale == "key" else math.sqrt(factor))
    if spelling.product == "baddbmm":
        return _by_baddbmm(spelling, query, key_transposed)
    product = torch.bmm if spelling.product == "bmm" else torch.matmul
    scores = product(query, key_transposed)
    if scale == "mul":
        return scores * factor
    if scale == "left":
        return factor * scores
    if scale == "div":
        return scores / (1 / factor)
    return scores * torch.tensor(factor) if scale == "tensor" else scores


def _by_baddbmm(spelling: Spelling, query: torch.Tensor, key_transposed: torch.Tensor) -> torch.Tensor:
    shape = (query.shape[0], query.shape[1], key_transposed.shape[-1])
    alpha = spelling.factor if spelling.scale in ("mul", "div", "left", "tensor") else 1.0
    bias = torch.arange(shape[-1], dtype=query.dtype) * 0.25
    return torch.baddbmm(bias.expand(shape), query, key_transposed, beta=0.5, alpha=alpha)


def _masked(spelling: Spelling, scores: torch.Tensor, *hidden: torch.Tensor) -> torch.Tensor:
    merged_shape = scores.shape
    apart = scores.dim() == 3 and not spelling.masks_merged
    if apart:
        scores = scores.reshape(spelling.batch, spelling.num_heads, *scores.shape[-2:])
    for mask, where in zip(spelling.masks, hidden, strict=True):
        if scores.dim() == 3 and mask.shape != "rows":
            where = where.expand(spelling.batch, spelling.num_heads, *where.shape[-2:]).reshape(merged_shape)
        scores = _with_mask(mask, where, scores)
    if spelling.scale == "last":
        scores = scores * spelling.factor
    # As in BART: masks over [B, H, Sq, Skv], the softmax over [B * H, Sq, Skv].
    return scores.reshape(merged_shape) if apart else scores


def _with_mask(mask: MaskSpelling, hidden: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    fill = _fill(mask, scores.dtype)
    if mask.how == "masked_fill":
        return scores.masked_fill(hidden, fill)
    if mask.how == "where_hidden":
        return torch.where(hidden, torch.full((), fill, dtype=scores.dtype), scores)
    if mask.how == "where_seen":
        return torch.where(~hidden, scores, fill)
    return scores + _additive(mask, hidden, scores)


def _softmax(spelling: Spelling, scores: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if spelling.upcast == "dtype" and dtype.itemsize < 4:
        return F.softmax(scores, dim=-1, dtype=torch.float32).to(dtype)
    if spelling.upcast == "float" and dtype.itemsize < 4:
        return torch.softmax(scores.float(), -1).to(dtype)
    return scores.softmax(-1)
