"""``LLM`` on generated kernels: the model's own tokens, and bits that do not depend on the company or the cutting."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from references import greedy_tokens
from transformers import LlamaConfig, LlamaForCausalLM

import infercomp
from infercomp.codegen.cpp import toolchain
from infercomp.demo_model import demo_model_path
from infercomp.runtime.errors import BuildError
from infercomp.runtime.kv_pools import allocate_pools
from infercomp.runtime.step import StepInputs

CONFIG = LlamaConfig(
    hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
    vocab_size=130, max_position_embeddings=256,
)  # fmt: skip


def _model(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).to(dtype).eval()


OPTIONS = {"w8a8": {"quantization": "w8a8"}, "gobo": {"quantization": "gobo"}, "int8 cache": {"kv_cache_dtype": "int8"}}


@pytest.fixture(scope="module", params=["float32", "bfloat16", *OPTIONS])
def llm(request: pytest.FixtureRequest) -> infercomp.LLM:
    dtype = torch.bfloat16 if request.param == "bfloat16" else torch.float32
    options = OPTIONS.get(request.param, {})
    return infercomp.LLM(_model(dtype), codegen="cpp", num_blocks=64, **options)


def test_every_op_has_a_kernel(llm: infercomp.LLM) -> None:
    elsewhere = {op for op, how in llm.report.ops.items() if how != "cpp"}
    assert elsewhere <= {"aten.sym_size", "infercomp.merge_weights"}


def test_tokens_are_those_of_the_model() -> None:
    prompts = [{"prompt_token_ids": list(range(1, 1 + length))} for length in (1, 7, 30)]
    params = infercomp.SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    model = _model(torch.float32)
    expected = [greedy_tokens(model, prompt["prompt_token_ids"], 24) for prompt in prompts]
    got = infercomp.LLM(model, codegen="cpp").generate(prompts, params, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in got] == expected


def _logits(
    llm: infercomp.LLM, sequences: list[list[int]], chunks: list[list[int]], shuffle: random.Random
) -> dict[tuple[int, int], torch.Tensor]:
    """Logits of every token when sequences are computed together, cut as ``chunks`` says, in shuffled blocks."""
    block_size, num_blocks = 16 * shuffle.choice([1, 2, 3]), 40
    pools = allocate_pools(llm._served.form.cache_specs, num_blocks, block_size)
    for pool in pools.values():
        pool.fill_(float("nan") if pool.is_floating_point() else -128)
    free = shuffle.sample(range(num_blocks), num_blocks)
    tables = [[free.pop() for _ in range(-(-len(s) // block_size))] for s in sequences]
    step, done, result = llm._served.with_pools(pools), [0] * len(sequences), {}
    while any(chunks):
        active = [i for i, left in enumerate(chunks) if left]
        shuffle.shuffle(active)
        active = active[: shuffle.randint(1, len(active))]
        spans = [(i, done[i], done[i] + chunks[i].pop(0)) for i in active]
        rows = [(i, p) for i, start, stop in spans for p in range(start, stop)]
        width = max(len(tables[i]) for i in active)
        starts = torch.tensor([0, *(stop - start for _, start, stop in spans)]).cumsum(0)
        inputs = StepInputs(
            input_ids=torch.tensor([sequences[i][p] for i, p in rows]),
            positions=torch.tensor([p for _, p in rows]),
            slot_mapping=torch.tensor([tables[i][p // block_size] * block_size + p % block_size for i, p in rows]),
            block_tables=torch.tensor([tables[i] + [0] * (width - len(tables[i])) for i in active]),
            seq_lens=torch.tensor([stop for _, _, stop in spans]),
            query_start_loc=starts,
            logits_indices=torch.arange(len(rows)),
        )
        result |= dict(zip(rows, step(inputs), strict=True))
        for i, _, stop in spans:
            done[i] = stop
    return result


def test_bits_do_not_depend_on_company_chunks_or_blocks(llm: infercomp.LLM) -> None:
    _assert_bits_do_not_depend(llm, num_workloads=12, vocab_size=130)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, "w8a8", "w4a8-g32"])
def test_bits_of_a_real_model_in_200_workloads(quantization: str | None) -> None:
    llm = infercomp.LLM(demo_model_path(), dtype=torch.bfloat16, codegen="cpp", quantization=quantization)
    _assert_bits_do_not_depend(llm, num_workloads=200, vocab_size=40_000)


def _assert_bits_do_not_depend(llm: infercomp.LLM, num_workloads: int, vocab_size: int) -> None:
    draw = random.Random(7)
    sequences = [[draw.randrange(vocab_size) for _ in range(length)] for length in (1, 5, 17, 40, 77)]
    alone = [llm.logits(sequence) for sequence in sequences]
    for _ in range(num_workloads):
        chosen = draw.sample(range(len(sequences)), draw.randint(1, len(sequences)))
        together = _logits(llm, [sequences[i] for i in chosen], [_cuts(draw, len(sequences[i])) for i in chosen], draw)
        for (i, position), row in together.items():
            assert torch.equal(row, alone[chosen[i]][position]), (chosen[i], position)


def _cuts(draw: random.Random, length: int) -> list[int]:
    cuts = []
    while length:
        cuts.append(draw.choice([1, min(length, draw.randint(1, 20)), length]))
        length -= cuts[-1]
    return cuts


def test_invariance_notices_a_changed_neighbour(llm: infercomp.LLM) -> None:
    """The comparison above is of bits: one token changed at the front is seen in the last row."""
    tokens = list(range(1, 20))
    changed = [tokens[0] + 1, *tokens[1:]]
    assert not torch.equal(llm.logits(tokens)[-1], llm.logits(changed)[-1])


def test_a_dump_shows_the_kernels_and_which_calls_share_one(tmp_path: Path) -> None:
    infercomp.LLM(_model(torch.float32), codegen="cpp", dump=str(tmp_path))
    kernels = "\n".join(path.read_text() for path in sorted((tmp_path / "kernels").glob("*.cpp")))
    assert "// ops: infercomp.linear.default, infercomp.gated_activation.default" in kernels
    assert "modeling_llama.py" in kernels
    last = sorted(tmp_path.glob("[0-9][0-9]_*.py"))[-1].read_text()
    assert "in the kernel of linear_default" in last


def test_without_a_compiler_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    toolchain.compiler.cache_clear()
    try:
        with pytest.raises(BuildError, match='codegen="reference"'):
            infercomp.LLM(_model(torch.float32), codegen="cpp", cache_dir=str(tmp_path / "cache"))
    finally:
        toolchain.compiler.cache_clear()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BuildError, match="cache_dir"):
        infercomp.LLM(_model(torch.float32), codegen="cpp", cache_dir=str(tmp_path / "file" / "cache"))
