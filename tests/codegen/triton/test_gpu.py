"""Kernels and models on a real GPU, at the dtypes that the interpreter lacks: ``pytest -m gpu``.

Needs torch, triton, transformers, pytest and hypothesis only.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from codegen.cpp.test_kernels import Drawn, Quantized, _assert_close
from codegen.triton.interpreted_graphs import TwoOfFour
from codegen.triton.interpreted_models import Paged, _paged_operands
from codegen.triton.sampling_cases import SAMPLERS, check_gumbel, check_inverse_cdf, check_unusable_rows
from graph_testing import captured
from references import assert_errs_like_eager
from transformers import LlamaConfig, LlamaForCausalLM

import infercomp
from infercomp.codegen.config import CodegenConfig
from infercomp.codegen.lower import lower
from infercomp.codegen.ops import paged_attention
from infercomp.passes.config import PassConfig
from infercomp.passes.pipeline import run_pipeline
from infercomp.runtime.errors import ConfigError, InputError
from infercomp.runtime.request import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
SIZES = (32, 8, 128, 128)
DTYPES = (torch.float32, torch.bfloat16)
CONFIG = LlamaConfig(
    hidden_size=1024, intermediate_size=2816, num_hidden_layers=3, num_attention_heads=16, num_key_value_heads=4,
    vocab_size=4000, max_position_embeddings=2048,
)  # fmt: skip


@pytest.fixture
def on_gpu() -> Iterator[None]:
    """New tensors lie on the GPU."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        yield


def outputs_of(module: torch.nn.Module, *inputs: torch.Tensor) -> list[torch.Tensor]:
    model_graph = captured(module, *inputs)
    run_pipeline(model_graph, PassConfig())
    with torch.no_grad():
        return list(lower(model_graph, CodegenConfig(codegen="triton")).bind(model_graph.weights)(*inputs))


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (1, 300), (3, 77)])
def test_kernels_agree_with_definitions(dtype: torch.dtype, rows: int, tokens: int) -> None:
    module = Drawn(512, 768, 8, tokens).to(dtype).eval()
    x, ids = torch.randn(rows, tokens, 512).to(dtype), torch.randint(0, 13, (rows, tokens))
    mask = torch.rand(tokens, tokens) > 0.3
    with torch.no_grad():
        eager, exact = module(x, ids, mask), module.double()(x.double(), ids, mask)
    for position, parts in enumerate(zip(outputs_of(module.to(dtype), x, ids, mask), eager, exact, strict=True)):
        _assert_close(*parts, what=position)


@pytest.mark.usefixtures("on_gpu")
def test_integer_kernels_are_exact() -> None:
    module, x = Quantized(512, 300, 64), torch.randn(70, 512)
    got, expected = outputs_of(module, x, torch.arange(70)), module(x, torch.arange(70))
    for position, (mine, definition) in enumerate(zip(got, expected, strict=True)):
        if position != 5:  # runs as its definition, in float32
            assert torch.equal(mine, definition), position


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 70])
def test_weights_of_which_two_in_every_four_are_kept(dtype: torch.dtype, rows: int) -> None:
    module, x = TwoOfFour(1032, 300), torch.randn(rows, 1032).to(dtype)
    module.float_values, module.bias = module.float_values.to(dtype), module.bias.to(dtype)
    *floats, integers = outputs_of(module, x)
    *eager, expected = module(x)
    *exact, _ = module.double()(x.double())
    for position, parts in enumerate(zip(floats, eager, exact, strict=True)):
        _assert_close(*parts, what=position)
    assert torch.equal(integers, expected)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sliding_window", [None, 100])
def test_paged_attention(dtype: torch.dtype, sliding_window: int | None) -> None:
    """A prefill, chunks, and decoding of lengths around the cuts; decoding gives the bits of the other kernel."""
    module = Paged(None, torch.linspace(-3, 3, 32), scale=128**-0.5, sliding_window=sliding_window, logit_softcap=None)
    keys = [700, 2500, 1, 511, 512, 513, 4100]
    operands = _paged_operands([300, 129, 1, 3, 3, 3, 2], keys, SIZES)
    operands = [x.to(dtype) if x.is_floating_point() else x for x in operands]
    (together,) = outputs_of(module, *operands)
    options = {"sinks": module.sinks, **module.options}
    exact = paged_attention.definition(*(x.double() if x.is_floating_point() else x for x in operands), **options)
    assert_errs_like_eager(exact, paged_attention.definition(*operands, **options), together)
    last = operands[-1][1:] - 1
    (alone,) = outputs_of(module, operands[0][last], *operands[1:-1], torch.arange(len(keys) + 1))
    assert torch.equal(alone, together[last])


@pytest.fixture(scope="module", params=DTYPES)
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).to("cuda", request.param).eval()


def test_graphs_and_company_do_not_change_bits(model: LlamaForCausalLM) -> None:
    draw = torch.Generator().manual_seed(3)
    prompts = [
        {"prompt_token_ids": torch.randint(0, 4000, (n,), generator=draw).tolist()} for n in (1, 40, 300, 600, 5)
    ]
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    replayed = infercomp.LLM(model, codegen="triton", num_blocks=200)
    eager = infercomp.LLM(model, codegen="triton", num_blocks=200, decode_graphs=False)
    together = [o.outputs[0].token_ids for o in replayed.generate(prompts, params, use_tqdm=False)]
    assert together == [o.outputs[0].token_ids for o in eager.generate(prompts, params, use_tqdm=False)]
    assert together == [replayed.generate(p, params, use_tqdm=False)[0].outputs[0].token_ids for p in prompts]


def test_logits_err_like_eager(model: LlamaForCausalLM) -> None:
    tokens = torch.randint(0, 4000, (600,)).tolist()
    with torch.no_grad():
        eager = model(torch.tensor([tokens], device="cuda")).logits[0]
        exact = LlamaForCausalLM(CONFIG).to("cuda", torch.float64)
        exact.load_state_dict(model.state_dict())
        reference = exact.eval()(torch.tensor([tokens], device="cuda")).logits[0]
    got = infercomp.LLM(model, codegen="triton", num_blocks=200).logits(tokens)
    _assert_close(got, eager, reference, "logits")


def test_torch_compile(model: LlamaForCausalLM) -> None:
    ids = torch.randint(0, 4000, (2, 65), device="cuda")
    compiled = torch.compile(model, backend="infercomp", options={"codegen": "triton"})
    with torch.inference_mode():
        got, eager = compiled(ids).logits, model(ids).logits
    bound = 1e-4 if got.dtype == torch.float32 else 5e-2
    assert float((got - eager).abs().max()) <= bound * float(eager.abs().max())


@pytest.mark.usefixtures("on_gpu")
def test_bad_indices_are_an_error_of_a_later_call() -> None:
    model_graph = captured(torch.nn.Embedding(5, 16), torch.tensor([[1, 4]]))
    program = lower(model_graph, CodegenConfig(codegen="triton")).bind(model_graph.weights)
    program(torch.tensor([[1, 5]]))
    torch.cuda.synchronize()
    with pytest.raises(InputError, match="out of range"):
        program(torch.tensor([[1, 4]]))


def test_cpp_is_refused_on_a_gpu(model: LlamaForCausalLM) -> None:
    with pytest.raises(ConfigError, match="CPU"):
        infercomp.LLM(model, codegen="cpp")


def test_inverse_cdf_draws_what_the_sampler_draws() -> None:
    spec = SAMPLERS["sample_inverse_cdf"]
    params = [
        SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
        for temperature in (0.0, 0.6, 1.5)
        for top_k in (0, 1, 50)
        for top_p in (1.0, 0.9, 0.3)
    ]
    logits = (torch.randn(len(params), spec.vocabulary_size) * 3).cuda()
    check_inverse_cdf(spec, params, logits)
    check_inverse_cdf(spec, params, (logits * 4).round() / 4, seed=1)


def test_gumbel_draws_from_the_distribution() -> None:
    spec = SAMPLERS["sample_gumbel"]
    check_gumbel(
        spec, SamplingParams(temperature=0.8, top_k=40, top_p=0.9), torch.randn(spec.vocabulary_size).cuda() * 2, 500
    )


@pytest.mark.parametrize("name", SAMPLERS)
def test_rows_that_are_not_numbers_are_marked(name: str) -> None:
    check_unusable_rows(SAMPLERS[name], "cuda")
