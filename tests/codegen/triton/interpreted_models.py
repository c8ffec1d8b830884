"""Run by ``test_interpreted.py`` in a process where Triton interprets kernels instead of compiling them.

Whole models on Triton kernels, and attention over a paged cache against its definition.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from codegen.cpp.test_kernels import PHASES
from codegen.triton.interpreted_graphs import outputs_of
from hypothesis import given, settings
from hypothesis import strategies as st
from references import assert_errs_like_eager, greedy_tokens
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import infercomp
from infercomp.bench.batch_invariance import measure_invariance
from infercomp.codegen.ops import paged_attention
from infercomp.codegen.triton import emit_attention
from infercomp.runtime.decode_graphs import Replay, Step
from infercomp.runtime.errors import InputError
from infercomp.runtime.kv_pools import allocate_pools
from infercomp.runtime.step import StepInputs

CONFIG = LlamaConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=130, max_position_embeddings=640,
)  # fmt: skip
GREEDY = infercomp.SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


def _product_in_order(left: Any, right: Any, dtype: Any) -> Any:
    """A row's sums in ascending k, as a GPU has them: BLAS has an order of its own for each shape and processor."""
    total = np.zeros((*left.shape[:-1], right.shape[-1]), dtype)
    for k in range(left.shape[-1]):
        total += left[..., k : k + 1].astype(dtype) * right[..., k : k + 1, :].astype(dtype)
    return total


@pytest.fixture(autouse=True)
def _dots_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies matrices by numpy."""
    monkeypatch.setattr(np, "matmul", _product_in_order)


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


@pytest.fixture(scope="module")
def llm() -> infercomp.LLM:
    return infercomp.LLM(_model(), codegen="triton", num_blocks=80)


def test_every_op_has_a_kernel(llm: infercomp.LLM) -> None:
    elsewhere = {op for op, how in llm.report.ops.items() if how != "triton"}
    assert elsewhere <= {"aten.sym_size", "infercomp.merge_weights"}


def test_tokens_are_those_of_the_model(llm: infercomp.LLM) -> None:
    prompts = [{"prompt_token_ids": list(range(1, 1 + length))} for length in (1, 7, 30)]
    got = llm.generate(prompts, GREEDY, use_tqdm=False)
    expected = [greedy_tokens(_model(), prompt["prompt_token_ids"], 6) for prompt in prompts]
    assert [o.outputs[0].token_ids for o in got] == expected


def test_bits_do_not_depend_on_company_chunks_or_blocks(llm: infercomp.LLM) -> None:
    """Steps of one token a sequence take other kernels than the rest."""
    found = measure_invariance(llm, 2, seed=7, lengths=(1, 5, 17, 40))
    assert found.num_tokens and found.differences == ()


def test_bad_token_ids_are_an_error(llm: infercomp.LLM) -> None:
    with pytest.raises(InputError):
        llm.generate({"prompt_token_ids": [1, 130]}, GREEDY, use_tqdm=False)


def test_torch_compile_errs_like_eager() -> None:
    model = _model()
    compiled = torch.compile(model, backend="infercomp", options={"codegen": "triton"})
    ids = torch.randint(0, 130, (2, 9))
    with torch.inference_mode():
        eager, got = model(ids).logits, compiled(ids).logits
        exact = _model().double()(ids).logits
    assert_errs_like_eager(exact, eager, got)


class Paged(nn.Module):
    def __init__(self, slopes: torch.Tensor | None, sinks: torch.Tensor | None, **options: object) -> None:
        super().__init__()
        self.options = options
        self.register_buffer("slopes", slopes)
        self.register_buffer("sinks", sinks)

    def forward(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
    ) -> torch.Tensor:
        tables = (block_tables, seq_lens, query_start_loc)
        return paged_attention(query, key_cache, value_cache, *tables, self.slopes, self.sinks, **self.options)


@st.composite
def paged_cases(draw: st.DrawFn) -> tuple[Paged, list[int], tuple[int, int, int, int]]:
    """A module, the keys of its sequences, and (heads, key heads, head size, value size)."""
    num_heads, num_kv_heads = draw(st.sampled_from([(1, 1), (4, 2), (6, 2), (5, 1)]))
    module = Paged(
        2.0 ** -torch.arange(1, num_heads + 1).float() if draw(st.booleans()) else None,
        torch.linspace(-3, 3, num_heads) if draw(st.booleans()) else None,
        scale=0.3,
        sliding_window=draw(st.sampled_from([None, 1, 7, 90])),
        logit_softcap=draw(st.sampled_from([None, 2.0])),
    )
    keys = draw(st.lists(st.one_of(st.integers(1, 70), st.integers(505, 570)), min_size=1, max_size=3))
    return module, keys, (num_heads, num_kv_heads, draw(st.sampled_from([8, 20])), draw(st.sampled_from([8, 12])))


def _paged_operands(queries: list[int], keys: list[int], sizes: tuple[int, int, int, int]) -> list[torch.Tensor]:
    """Blocks of 8 positions in shuffled order, in caches whose other places are NaN."""
    num_heads, num_kv_heads, *dims = sizes
    width = -(-max(keys) // 8)
    tables = torch.randperm(len(keys) * width).reshape(len(keys), width)
    caches = [torch.full((len(keys) * width, 8, num_kv_heads, dim), torch.nan) for dim in dims]
    for table, length in zip(tables, keys, strict=True):
        slots = table.repeat_interleave(8)[:length] * 8 + torch.arange(length) % 8
        for cache in caches:
            cache.view(-1, *cache.shape[2:])[slots] = torch.randn(length, *cache.shape[2:])
    starts = torch.tensor([0, *queries]).cumsum(0)
    return [torch.randn(sum(queries), num_heads, dims[0]), *caches, tables, torch.tensor(keys), starts]


@settings(max_examples=5, deadline=None, phases=PHASES)
@given(paged_cases(), st.data())
def test_paged_attention_is_its_definition(
    case: tuple[Paged, list[int], tuple[int, int, int, int]], data: st.DataObject
) -> None:
    module, keys, sizes = case
    queries = [data.draw(st.integers(1, min(length, 40))) for length in keys]
    operands = _paged_operands(queries, keys, sizes)
    _check_paged(module, operands)


def _check_paged(module: Paged, operands: list[torch.Tensor]) -> None:
    (got,), ops = outputs_of(module, *operands)
    assert [op.how for op in ops] == ["triton"]
    options = {"alibi_slopes": module.slopes, "sinks": module.sinks, **module.options}
    wide = [x.double() if x.is_floating_point() else x for x in operands]
    exact = paged_attention.definition(*wide, **options)
    assert_errs_like_eager(exact, paged_attention.definition(*operands, **options), got)


@pytest.mark.parametrize(
    ("statements", "fixed", "bug"),
    [
        ("_SOFTMAX", "row_sum * rescale", "row_sum"),
        ("_JOIN", "acc * new[:, None]", "acc"),
        ("_JOIN", "total_sum * old", "total_sum"),
    ],
)
def test_a_planted_bug_is_caught(statements: str, fixed: str, bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = Paged(None, None, scale=0.3, sliding_window=None, logit_softcap=None)
    operands = _paged_operands([1, 1], [600, 90], (4, 2, 8, 8))
    _check_paged(module, operands)
    lines = getattr(emit_attention, statements)
    assert any(fixed in line for line in lines)
    monkeypatch.setattr(emit_attention, statements, tuple(line.replace(fixed, bug) for line in lines))
    with pytest.raises(AssertionError):
        _check_paged(module, operands)


@settings(max_examples=6, deadline=None, phases=PHASES)
@given(paged_cases())
def test_decoding_gives_the_bits_of_a_prefill(case: tuple[Paged, list[int], tuple[int, int, int, int]]) -> None:
    """The newest token of each sequence alone, its keys split among programs, and at the end of a longer chunk."""
    module, keys, sizes = case
    operands = _paged_operands([min(length, 3) for length in keys], keys, sizes)
    (together,), ops = outputs_of(module, *operands)
    assert [op.how for op in ops] == ["triton"]
    last = operands[-1][1:] - 1
    newest = [operands[0][last], *operands[1:-1], torch.arange(len(keys) + 1)]
    (alone,), _ = outputs_of(module, *newest)
    assert torch.equal(alone, together[last])


def test_padded_decoding_steps_give_the_same_tokens(llm: infercomp.LLM) -> None:
    """Buckets and padding as CUDA graphs have them, on kernels, with a capture that records a call."""

    def recorded(step: Step, inputs: StepInputs) -> Replay:
        step(inputs)
        return lambda: step(inputs)

    served, runtime = llm._served, llm.config.runtime
    pools = allocate_pools(served.form.cache_specs, 9, runtime.block_size)
    graphs = served.with_graphs(pools, 8, runtime, recorded)
    plain_pools = {name: pool.clone() for name, pool in pools.items()}
    plain = served.with_pools(plain_pools)
    for lengths in ([3, 20, 1], [4, 21]):
        tables = torch.arange(3 * len(lengths)).reshape(-1, 3)[:, :2]
        last = torch.tensor(lengths) - 1
        inputs = StepInputs(
            input_ids=torch.arange(len(lengths)) + 7,
            positions=last,
            slot_mapping=tables.gather(1, last[:, None] // 16)[:, 0] * 16 + last % 16,
            block_tables=tables,
            seq_lens=last + 1,
            query_start_loc=torch.arange(len(lengths) + 1),
            logits_indices=torch.arange(len(lengths)),
        )
        assert torch.equal(graphs(inputs), plain(inputs))
    assert [bucket.num_sequences for bucket in graphs.buckets] == [2, 4]
    for name, pool in pools.items():
        assert torch.equal(pool[:8], plain_pools[name][:8])
