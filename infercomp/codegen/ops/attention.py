"""Attention over given keys and values.

``s = softcap(scale * q kᵀ) + bias + slope * (key position - query position)``, hidden keys removed,
``softmax(s) v``. The last query is aligned with the last key (as in FlashAttention: with a cache,
queries are the newest positions). A row whose keys are all hidden gives zeros, as in PyTorch's
``scaled_dot_product_attention``.
"""

from __future__ import annotations

import torch

from .op import compute_dtype, op

ATTENTION_OPTIONS = "float scale, int? sliding_window=None, float? logit_softcap=None"


def _hidden_keys(
    query_length: int, key_length: int, is_causal: bool, sliding_window: int | None, device: torch.device
) -> torch.Tensor | None:
    if not is_causal and sliding_window is None:
        return None
    key = torch.arange(key_length, device=device)
    query = torch.arange(query_length, device=device)[:, None] + (key_length - query_length)
    hidden = key > query if is_causal else torch.zeros_like(key > query)
    if sliding_window is not None:
        hidden = hidden | (query - key >= sliding_window)
    return hidden


def _alibi(slopes: torch.Tensor, query_length: int, key_length: int, dtype: torch.dtype) -> torch.Tensor:
    key = torch.arange(key_length, device=slopes.device)
    query = torch.arange(query_length, device=slopes.device)[:, None] + (key_length - query_length)
    return slopes.to(dtype)[:, None, None] * (key - query).to(dtype)


def _scores(
    query: torch.Tensor, key: torch.Tensor, scale: float, logit_softcap: float | None, dtype: torch.dtype
) -> torch.Tensor:
    batch, num_heads, query_length, head_dim = query.shape
    num_kv_heads = key.shape[1]
    # Query heads that share a key head become extra rows of one matmul, so keys are never repeated.
    rows = query.to(dtype).reshape(batch, num_kv_heads, -1, head_dim)
    scores = (rows @ key.to(dtype).transpose(-1, -2)) * scale
    if logit_softcap is not None:
        scores = torch.tanh(scores / logit_softcap) * logit_softcap
    return scores.reshape(batch, num_heads, query_length, key.shape[2])


def _fake_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_, **__):  # type: ignore[no-untyped-def]
    return query.new_empty(*query.shape[:3], value.shape[-1])


@op(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? bias=None, Tensor? alibi_slopes=None,"
    f" Tensor? sinks=None, *, {ATTENTION_OPTIONS}, bool is_causal=False) -> Tensor",
    fake=_fake_attention,
)
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    *,
    scale: float,
    sliding_window: int | None = None,
    logit_softcap: float | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """query [B, H, Sq, D], key [B, Hkv, Skv, D], value [B, Hkv, Skv, Dv] -> [B, H, Sq, Dv].

    H is a multiple of Hkv (GQA, Ainslie et al. 2023). ``bias`` broadcasts to [B, H, Sq, Skv]: floats
    are added, bools say which keys are seen. ``sliding_window`` W hides keys W or more positions
    back. ``alibi_slopes`` [H] (Press et al. 2021). ``sinks`` [H] are logits of a key with no value
    (gpt-oss). Computed in float32 (float64 for float64 inputs), rounded once to query's dtype.
    """
    batch, num_heads, query_length, _ = query.shape
    num_kv_heads, key_length = key.shape[1], key.shape[2]
    dtype = compute_dtype(query)
    scores = _scores(query, key, scale, logit_softcap, dtype)
    if alibi_slopes is not None:
        scores = scores + _alibi(alibi_slopes, query_length, key_length, dtype)
    if bias is not None:
        scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias.to(dtype)
    hidden = _hidden_keys(query_length, key_length, is_causal, sliding_window, query.device)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        column = sinks.to(dtype).reshape(1, -1, 1, 1).expand(batch, num_heads, query_length, 1)
        scores = torch.cat([scores, column], dim=-1)
    probabilities = torch.ops.aten._safe_softmax.default(scores, -1)[..., :key_length]
    rows = probabilities.reshape(batch, num_kv_heads, -1, key_length)
    output = rows @ value.to(dtype)
    return output.reshape(batch, num_heads, query_length, value.shape[-1]).to(query.dtype)
