"""The attention kernels against their definitions in float64, and the promise that a row's bits are its own."""

from __future__ import annotations

import ctypes
import platform
import subprocess
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from attention_caches import Cache, Int8Cache, Sequences, tiled_keys, tiled_values
from attention_harness import COMPILE, DTYPES, HARNESS, PRETENDING, VARIANTS, Options, call, dtype_name, is_right
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], ctypes.CDLL]:
    def build(flags: list[str]) -> ctypes.CDLL:
        folder = tmp_path_factory.mktemp("attention")
        (folder / "harness.cpp").write_text(HARNESS)
        subprocess.run([*COMPILE, *flags, "-shared", "harness.cpp", "-o", "harness.so"], cwd=folder, check=True)
        return ctypes.CDLL(str(folder / "harness.so"))

    return build


@pytest.fixture(scope="module", params=list(VARIANTS))
def library(request: pytest.FixtureRequest, build: Callable[[list[str]], ctypes.CDLL]) -> ctypes.CDLL:
    return build(VARIANTS[request.param])


# ---- paged -----------------------------------------------------------------------------------------------------------


DIMS = st.sampled_from([2, 8, 16, 24, 30, 32, 64, 80, 96, 128])
WHOLE_WORDS = st.sampled_from([8, 16, 24, 32, 64, 80, 128])


@st.composite
def options_of(draw: st.DrawFn, heads: int) -> Options:
    slopes = 2.0 ** -torch.arange(1, heads + 1).float()
    return Options(
        scale=draw(st.sampled_from([0.125, 0.3, 1.0])),
        sliding_window=draw(st.sampled_from([None, None, 1, 7, 16, 100, 300])),
        logit_softcap=draw(st.sampled_from([None, None, 2.0, 30.0])),
        alibi_slopes=draw(st.sampled_from([None, None, slopes])),
        sinks=draw(st.sampled_from([None, None, torch.linspace(-3, 3, heads)])),
    )


LENGTHS = st.one_of(st.integers(1, 40), st.integers(200, 300), st.integers(500, 530))


def check_paged_attention(
    library: ctypes.CDLL, dtype: str, data: st.DataObject, kind: type[Cache] = Cache, dims: st.SearchStrategy = DIMS
) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    kv_heads = data.draw(st.integers(1, 3))
    heads = kv_heads * data.draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 13]))
    lengths = data.draw(st.lists(LENGTHS, min_size=1, max_size=3))
    chunks = [data.draw(st.one_of(st.just(1), st.integers(0, length))) for length in lengths]
    options = data.draw(options_of(heads))
    sequences = Sequences.random(lengths, heads, kv_heads, data.draw(dims), data.draw(dims), DTYPES[dtype])
    cache = kind(library, sequences, lengths, data.draw(st.sampled_from([16, 32, 48])))
    if sum(chunks):
        assert cache.is_right(cache.attend(chunks, options, data.draw(st.booleans())), options)


@given(data=st.data())
@settings(max_examples=15)
@pytest.mark.parametrize("dtype", DTYPES)
def test_paged_attention_is_its_definition(library: ctypes.CDLL, dtype: str, data: st.DataObject) -> None:
    check_paged_attention(library, dtype, data)


def bits(values: Tensor) -> Tensor:
    return values.view(torch.int32 if values.dtype == torch.float32 else torch.int16)


def same_bits(left: Tensor, right: Tensor) -> bool:
    return torch.equal(bits(left), bits(right))


def check_bits(
    library: ctypes.CDLL, dtype: str, data: st.DataObject, kind: type[Cache] = Cache, dims: st.SearchStrategy = DIMS
) -> None:
    """Whatever the chunks of a prompt, the blocks, the other sequences and what lies behind and around them."""
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    kv_heads = data.draw(st.integers(1, 2))
    heads = kv_heads * data.draw(st.sampled_from([1, 2, 3, 5, 7, 13]))
    length = data.draw(st.one_of(st.integers(2, 70), st.integers(505, 540)))
    others = data.draw(st.lists(st.integers(1, 50), max_size=2))
    options = data.draw(options_of(heads))
    dim, value_dim = data.draw(dims), data.draw(dims)
    sequences = Sequences.random([length, *others], heads, kv_heads, dim, value_dim, DTYPES[dtype])
    alone = Sequences(sequences.queries[:1], sequences.keys[:1], sequences.values[:1])
    expected = kind(library, alone, [length], 16).attend([length], options)[0]
    cuts = sorted({0, length - 1, length, *data.draw(st.lists(st.integers(0, length), max_size=2))})
    for first, end in pairwise(cuts):
        block_size = data.draw(st.sampled_from([16, 32, 48]))
        poison = data.draw(st.sampled_from([float("nan"), float("inf"), 3e38]))
        together = data.draw(st.booleans())
        chosen, lengths = (sequences, [end, *others]) if together else (alone, [end])
        chunks = [end - first, *[data.draw(st.integers(0, n)) for n in lengths[1:]]]
        cache = kind(library, chosen, lengths, block_size, poison)
        output = cache.attend(chunks, options, data.draw(st.booleans()))[0]
        assert same_bits(output, expected[first:end]), (first, end)


@given(data=st.data())
@settings(max_examples=15)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_a_row_are_its_own(library: ctypes.CDLL, dtype: str, data: st.DataObject) -> None:
    check_bits(library, dtype, data)


@given(data=st.data())
@settings(max_examples=10)
def test_attention_over_codes_is_its_definition(library: ctypes.CDLL, data: st.DataObject) -> None:
    check_paged_attention(library, data.draw(st.sampled_from(sorted(DTYPES))), data, Int8Cache, WHOLE_WORDS)


@given(data=st.data())
@settings(max_examples=10)
def test_bits_of_a_row_over_codes_are_its_own(library: ctypes.CDLL, data: st.DataObject) -> None:
    check_bits(library, data.draw(st.sampled_from(sorted(DTYPES))), data, Int8Cache, WHOLE_WORDS)


@pytest.mark.parametrize("scale", ["key_scale", "value_scale"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_scale_of_the_neighbouring_token_is_caught(library: ctypes.CDLL, dtype: str, scale: str) -> None:
    torch.manual_seed(0)
    cache = Int8Cache(library, Sequences.random([70], 2, 1, 32, 32, DTYPES[dtype]), [70], 16)
    assert cache.is_right(cache.attend([60], Options()), Options())
    setattr(cache, scale, getattr(cache, scale).roll(1, 2))
    assert not cache.is_right(cache.attend([60], Options()), Options())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_later_tokens_do_not_reach_earlier_ones(library: ctypes.CDLL, dtype: str, poison: float) -> None:
    torch.manual_seed(0)
    sequences = Sequences.random([45], 6, 2, 32, 24, DTYPES[dtype])
    expected = Cache(library, sequences, [45], 16).attend([45], Options())[0]
    for position in range(0, 45, 7):
        keys, values = sequences.keys[0].clone(), sequences.values[0].clone()
        keys[position + 1 :], values[position + 1 :] = poison, poison
        output = Cache(library, Sequences(sequences.queries, [keys], [values]), [45], 16).attend([45], Options())[0]
        assert same_bits(output[: position + 1], expected[: position + 1])
        assert position == 44 or output[position + 1 :].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_behind_the_window_are_not_looked_up(library: ctypes.CDLL, dtype: str) -> None:
    torch.manual_seed(0)
    options = Options(sliding_window=20)
    sequences = Sequences.random([600, 90], 4, 2, 16, 16, DTYPES[dtype])
    cache = Cache(library, sequences, [600, 90], 16)
    cache.block_tables[0, : (600 - 3 - 20 + 1) // 16] = 1 << 40
    assert cache.is_right(cache.attend([3, 90], options), options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_planted_bugs_are_caught(library: ctypes.CDLL, dtype: str) -> None:
    torch.manual_seed(0)
    slopes, sinks = torch.tensor([0.5, 0.25]), torch.tensor([1.0, -1.0])
    options = Options(sliding_window=9, logit_softcap=5.0, alibi_slopes=slopes, sinks=sinks)
    cache = Cache(library, Sequences.random([70], 2, 1, 32, 32, DTYPES[dtype]), [70], 16)
    outputs = cache.attend([70], options)
    assert cache.is_right(outputs, options)
    wrong = [
        replace(options, scale=options.scale * 1.05),
        replace(options, sliding_window=8),
        replace(options, sliding_window=10),
        replace(options, logit_softcap=4.0),
        replace(options, alibi_slopes=slopes.flip(0)),
        replace(options, sinks=sinks + 0.5),
    ]
    assert not any(cache.is_right(outputs, other) for other in wrong)
    cache.lengths = [69]
    assert not cache.is_right([outputs[0][1:]], options)


# ---- writing ---------------------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=15)
@pytest.mark.parametrize("dtype", DTYPES)
def test_write_kv_fills_its_slots_only(library: ctypes.CDLL, dtype: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    block_size, heads, blocks = data.draw(st.sampled_from([16, 32, 48])), data.draw(st.integers(1, 3)), 4
    dim, value_dim = data.draw(DIMS), data.draw(DIMS)
    tokens = data.draw(st.integers(0, 2 * block_size))
    first = data.draw(st.integers(0, blocks * block_size - tokens))
    slots = torch.arange(first, first + tokens)
    if data.draw(st.booleans()):
        slots = torch.randperm(blocks * block_size)[:tokens]
    # A fused projection's keys and values: strided, side by side.
    fused = torch.randn(tokens, heads, dim + value_dim).to(DTYPES[dtype])
    keys, values = fused[..., :dim], fused[..., dim:]
    before = [torch.randn(blocks, block_size, heads, width).to(DTYPES[dtype]) for width in (dim, value_dim)]
    cache = Cache(library, Sequences([keys], [keys], [values]), [0], block_size)
    cache.keys, cache.values = tiled_keys(before[0]), tiled_values(before[1])
    skipped = torch.rand(tokens) < 0.1
    cache.write(torch.where(skipped, -1, slots), keys, values)
    for cached, new, tiled, actual in zip(
        before, (keys, values), (tiled_keys, tiled_values), (cache.keys, cache.values), strict=True
    ):
        cached.view(-1, *cached.shape[2:])[slots[~skipped]] = new[~skipped]
        assert torch.equal(tiled(cached), actual)


# ---- dense -----------------------------------------------------------------------------------------------------------


def run_dense(
    library: ctypes.CDLL,
    operands: list[Tensor],
    options: Options,
    bias: Tensor | None,
    is_causal: bool,
    backwards: bool,
) -> Tensor:
    query, key, value = operands
    batch, heads, queries, dim = query.shape
    output = torch.full((batch, queries, heads, value.shape[3]), 99.0, dtype=query.dtype).transpose(1, 2)
    numbers = [stride for t in (query, key, value, output) for stride in t.stride()[:3]]
    kinds = {torch.float32: 1, torch.bfloat16: 2, torch.bool: 3}
    numbers += bias.expand(batch, heads, queries, key.shape[2]).stride() if bias is not None else [0] * 4
    numbers += [batch, heads, key.shape[1], queries, key.shape[2], dim, value.shape[3], int(is_causal)]
    numbers += [kinds[bias.dtype] if bias is not None else 0, options.sliding_window or 0, int(backwards)]
    function = getattr(library, f"dense_{dtype_name(query.dtype)}")
    tensors = [*operands, output, bias, options.alibi_slopes, options.sinks]
    call(function, tensors, numbers, options.scale, options.logit_softcap or 0.0)
    return output


@st.composite
def biases(draw: st.DrawFn, *shape: int) -> Tensor | None:
    kind = draw(st.sampled_from([None, torch.float32, torch.bfloat16, torch.bool, "infinite"]))
    if kind is None:
        return None
    shape = tuple(draw(st.sampled_from([1, n])) for n in shape)[draw(st.integers(0, 3)) :]
    seen = torch.rand(shape) < draw(st.sampled_from([0.1, 0.7]))
    if kind == "infinite":
        return torch.where(seen, torch.randn(shape), -torch.inf)
    return seen if kind == torch.bool else torch.randn(shape).to(kind)


def random_heads(batch: int, heads: int, length: int, dim: int, dtype: torch.dtype, transposed: bool) -> Tensor:
    if transposed:
        return torch.randn(batch, length, heads, dim).to(dtype).transpose(1, 2)
    return torch.randn(batch, heads, length, dim).to(dtype)


@given(data=st.data())
@settings(max_examples=15)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_attention_is_its_definition(library: ctypes.CDLL, dtype: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    batch, kv_heads = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    heads = kv_heads * data.draw(st.sampled_from([1, 2, 3, 8]))
    lengths = st.one_of(st.integers(1, 40), st.integers(500, 530))
    queries, keys = data.draw(lengths), data.draw(lengths)
    dim, value_dim = data.draw(DIMS), data.draw(st.one_of(DIMS, st.just(3)))
    options = data.draw(options_of(heads))
    bias = data.draw(biases(batch, heads, queries, keys))
    is_causal = data.draw(st.booleans())
    operands = [
        random_heads(batch, n, length, width, DTYPES[dtype], data.draw(st.booleans()))
        for n, length, width in ((heads, queries, dim), (kv_heads, keys, dim), (kv_heads, keys, value_dim))
    ]
    output = run_dense(library, operands, options, bias, is_causal, data.draw(st.booleans()))
    assert is_right(output, operands, options, bias=bias, is_causal=is_causal)


def test_dense_rows_that_see_nothing_are_zero(library: ctypes.CDLL) -> None:
    operands = [torch.randn(1, 2, n, 16) for n in (9, 4, 4)]
    output = run_dense(library, operands, Options(), None, True, False)
    assert (output[:, :, :5] == 0).all() and (output[:, :, 5:] != 0).all()
    hidden = torch.zeros(9, 4, dtype=torch.bool)
    assert (run_dense(library, operands, Options(), hidden, False, False) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_bits_do_not_depend_on_the_batch(library: ctypes.CDLL, dtype: str) -> None:
    """One head alone is split over tasks; many are not."""
    torch.manual_seed(0)
    operands = [random_heads(3, n, 130, 32, DTYPES[dtype], False) for n in (6, 2, 2)]
    together = run_dense(library, operands, Options(), None, True, False)
    one = [operands[0][1:2, 3:6], operands[1][1:2, 1:2], operands[2][1:2, 1:2]]
    assert same_bits(
        run_dense(library, one, Options(), None, True, False).contiguous(), together[1:2, 3:6].contiguous()
    )
    last = [one[0][:, :, -1:], one[1], one[2]]
    assert same_bits(run_dense(library, last, Options(), None, True, False)[0, :, 0], together[1, 3:6, -1])


# ---- bfloat16 instructions -------------------------------------------------------------------------------------------


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instructions of x86")
def test_compiles_with_bfloat16_instructions(tmp_path: Path) -> None:
    (tmp_path / "harness.cpp").write_text(HARNESS)
    subprocess.run([*COMPILE, "-march=cooperlake", "-fsyntax-only", "harness.cpp"], cwd=tmp_path, check=True)


@pytest.fixture(scope="module")
def pretending(build: Callable[[list[str]], ctypes.CDLL]) -> ctypes.CDLL:
    cpu = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    if "avx512bw" not in cpu or "avx512_bf16" in cpu:
        pytest.skip("the machine has no AVX-512, or all of it")
    return build(PRETENDING)


@given(data=st.data())
@settings(max_examples=15)
def test_pairs_of_bfloat16_are_their_definition(pretending: ctypes.CDLL, data: st.DataObject) -> None:
    check_paged_attention(pretending, "bfloat16", data)


@given(data=st.data())
@settings(max_examples=15)
def test_bits_of_pairs_of_bfloat16(pretending: ctypes.CDLL, data: st.DataObject) -> None:
    check_bits(pretending, "bfloat16", data)
