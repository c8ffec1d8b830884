"""Run by ``test_interpreted.py`` in a process where Triton interprets kernels instead of compiling them."""

from __future__ import annotations

import pytest
import torch
from codegen.triton import kernel_cases
from codegen.triton.attention_cases import PagedBatch, check_attention, check_paged_attention
from hypothesis import given, settings
from hypothesis import strategies as st

from infercomp.codegen.triton.specs import AttentionSpec, PagedAttentionSpec

OPTIONS = {
    "dtype": st.sampled_from(["fp32", "fp16"]),
    "sliding_window": st.sampled_from([None, None, 1, 7, 20]),
    "logit_softcap": st.sampled_from([None, None, 2.0]),
    "has_alibi": st.booleans(),
    "has_sinks": st.booleans(),
}


@st.composite
def heads(draw: st.DrawFn) -> dict[str, object]:
    num_kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 4)]))
    head_dim = draw(st.sampled_from([16, 24, 32]))
    return {
        "num_heads": num_kv_heads * group,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "value_dim": draw(st.sampled_from([None, 16])),
        "scale": head_dim**-0.5,
        "tile_rows": 16,
        "tile_keys": 16,
        "num_warps": 1,
        **{name: draw(strategy) for name, strategy in OPTIONS.items()},
    }


@settings(max_examples=9)
@given(options=heads(), block_size=st.sampled_from([4, 16, 5]), seed=st.integers(0, 99))
def test_prefill_of_packed_sequences(options: dict[str, object], block_size: int, seed: int) -> None:
    spec = PagedAttentionSpec(**options, block_size=block_size)
    check_paged_attention(spec, [(1, 1), (9, 9), (3, 25), (1, 18)], "cpu", seed)


@settings(max_examples=9)
@given(
    options=heads(), block_size=st.sampled_from([4, 16, 5]), chunk=st.sampled_from([16, 32]), seed=st.integers(0, 99)
)
def test_decode_over_fixed_chunks(options: dict[str, object], block_size: int, chunk: int, seed: int) -> None:
    spec = PagedAttentionSpec(**options, block_size=block_size, chunk_keys=chunk, max_query_tokens=3)
    check_paged_attention(spec, [(1, 1), (1, 50), (3, 33), (2, 16)], "cpu", seed)


@settings(max_examples=9)
@given(
    options=heads(),
    is_causal=st.booleans(),
    bias_dtype=st.sampled_from([None, "fp32", "i1"]),
    lengths=st.sampled_from([(1, 1), (20, 20), (5, 35), (18, 3)]),
    seed=st.integers(0, 99),
)
def test_dense_attention(
    options: dict[str, object], is_causal: bool, bias_dtype: str | None, lengths: tuple[int, int], seed: int
) -> None:
    spec = AttentionSpec(**options, is_causal=is_causal, bias_dtype=bias_dtype)
    check_attention(spec, 2, *lengths, "cpu", seed)


def test_chunked_prefill_gives_the_same_bits() -> None:
    options = {"dtype": "fp32", "num_heads": 6, "num_kv_heads": 2, "head_dim": 16, "scale": 0.25}
    spec = PagedAttentionSpec(**options, block_size=4, tile_rows=16, tile_keys=16, num_warps=1, sliding_window=9)
    whole = PagedBatch(spec, [(30, 30)], "cpu")
    expected = whole.run()
    part = whole.only(0)
    part.query, part.query_start_loc = whole.query[13:].contiguous(), part.query_start_loc.clone()
    part.query_start_loc[1] = part.max_query_tokens = 17
    assert torch.equal(part.run(), expected[13:])


@pytest.mark.parametrize(
    ("bug", "fixed"),
    [
        ("key_position[None, :] < position[:, None]", "key_position[None, :] <= position[:, None]"),
        ("acc * 1.0, ", "acc * rescale[:, None], "),
        ("row % 1", "row % GROUP"),
    ],
)
def test_a_planted_bug_is_caught(bug: str, fixed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"dtype": "fp32", "num_heads": 6, "num_kv_heads": 2, "head_dim": 16, "scale": 0.25}
    spec = PagedAttentionSpec(**options, block_size=4, tile_rows=16, tile_keys=16, num_warps=1)
    text = kernel_cases.emit(spec)
    assert fixed in text
    monkeypatch.setattr(kernel_cases, "emit", lambda _: text.replace(fixed, bug))
    with pytest.raises(AssertionError):
        check_paged_attention(spec, [(9, 9), (3, 25)], "cpu")
