"""``LLM`` on generated kernels: the model's own tokens, and bits that do not depend on the company or the cutting."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from references import greedy_tokens
from transformers import LlamaConfig, LlamaForCausalLM

import infercomp
from infercomp.bench.batch_invariance import measure_invariance
from infercomp.codegen.cpp import toolchain
from infercomp.demo_model import demo_model_path
from infercomp.runtime.errors import BuildError

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


def test_bits_do_not_depend_on_company_chunks_or_blocks(llm: infercomp.LLM) -> None:
    found = measure_invariance(llm, 12, seed=7)
    assert found.num_tokens > 12 and found.differences == ()


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, "w8a8", "w4a8-g32"])
def test_bits_of_a_real_model_in_200_workloads(quantization: str | None) -> None:
    llm = infercomp.LLM(demo_model_path(), dtype=torch.bfloat16, codegen="cpp", quantization=quantization)
    assert measure_invariance(llm, 200).differences == ()


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
