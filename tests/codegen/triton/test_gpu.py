"""Every family against its definition on a real GPU at real shapes: ``pytest -m gpu tests/codegen/triton``.

Needs torch, triton, pytest and hypothesis only.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from codegen.triton import attention_cases, kernel_cases
from codegen.triton.representative_specs import DENSE, MATMULS, NORMS, PAGED, ROWS, SAMPLERS
from codegen.triton.sampling_cases import check_gumbel, check_inverse_cdf, check_unusable_rows

from infercomp.codegen.ops import ACTIVATIONS
from infercomp.codegen.triton.module import provide_descriptor_memory
from infercomp.codegen.triton.specs import (
    NOTHING,
    GatedActivationSpec,
    NormSpec,
    QuantizeSpec,
    RotaryWriteKvSpec,
    WriteKvSpec,
)
from infercomp.runtime.request import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
# (query tokens, cached tokens): a prefill, a chunk of one, decoding steps short and long.
PREFILL_LENGTHS = [(700, 700), (129, 2500), (1, 1), (1, 1300), (33, 40)]
DECODE_LENGTHS = [(1, 1), (1, 511), (1, 512), (1, 513), (1, 7000), (1, 64)]


@pytest.fixture(autouse=True, scope="module")
def descriptor_memory() -> None:
    provide_descriptor_memory()


def has_descriptors() -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability()[0] >= 9


@pytest.mark.parametrize("num_rows", [1, 17, 1000])
@pytest.mark.parametrize("name", MATMULS)
def test_products(name: str, num_rows: int) -> None:
    spec = MATMULS[name]
    if spec.use_descriptors and not has_descriptors():
        pytest.skip("this GPU has no tensor memory access")
    if name == "matmul":
        spec = replace(spec, epilogue=NOTHING)
    # TF32 keeps 10 bits of each factor.
    kernel_cases.check_matmul(spec, num_rows, "cuda", noise=2e-3 if spec.allow_tf32 else 1e-5)


@pytest.mark.parametrize("sizes", [(4096 + 8, 4096 - 32), (100, 72)])
def test_products_with_uneven_edges(sizes: tuple[int, int]) -> None:
    spec = replace(MATMULS["matmul_bf16"], num_columns=sizes[0], num_inner=sizes[1])
    kernel_cases.check_matmul(spec, 77, "cuda", noise=1e-5)


@pytest.mark.parametrize("name", ["matmul", "matmul_split", "matmul_w4", "gemv", "matmul_int8"])
def test_a_row_does_not_depend_on_the_number_of_rows(name: str) -> None:
    spec = replace(MATMULS[name], epilogue=NOTHING)
    generator = torch.Generator().manual_seed(0)
    tensors, _ = kernel_cases.random_weight(spec, "cuda", generator)
    inputs = dict(zip(["weight", "weight_scale", "weight_zero"], tensors, strict=False))
    if spec.is_integer:
        x = torch.randint(-127, 128, (300, spec.num_inner), generator=generator, dtype=torch.int8).cuda()
    else:
        x = (torch.randn(300, spec.num_inner, generator=generator) / 64).to("cuda", torch.float16)
    scale = torch.rand(300, generator=generator).cuda() * 1e-4
    together = kernel_cases.run_matmul(spec, 300, {**inputs, "input": x, "input_scale": scale}, "cuda")
    for begin, end in ((0, 1), (290, 300), (100, 133)):
        part = {**inputs, "input": x[begin:end].clone(), "input_scale": scale[begin:end].clone()}
        assert torch.equal(kernel_cases.run_matmul(spec, end - begin, part, "cuda"), together[begin:end])


@pytest.mark.parametrize("name", PAGED)
def test_paged_attention(name: str) -> None:
    spec = PAGED[name]
    lengths = DECODE_LENGTHS if spec.chunk_keys else PREFILL_LENGTHS
    if spec.max_query_tokens > 1:
        lengths = [*lengths, (4, 1200), (3, 3)]
    # bfloat16 and float16 round the probabilities too.
    attention_cases.check_paged_attention(spec, lengths, "cuda", noise=1e-5)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [(9, 3, 64), (8, 8, 80), (28, 4, 128), (12, 1, 256)]
)
@pytest.mark.parametrize("chunk_keys", [None, 256])
def test_paged_attention_of_other_heads(
    num_heads: int, num_kv_heads: int, head_dim: int, chunk_keys: int | None
) -> None:
    spec = replace(
        PAGED["paged_decode"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        chunk_keys=chunk_keys,
        tile_keys=32,
        tile_rows=16 if chunk_keys else 32,
    )
    attention_cases.check_paged_attention(spec, DECODE_LENGTHS if chunk_keys else PREFILL_LENGTHS, "cuda", noise=1e-5)


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("lengths", [(1, 1), (513, 513), (70, 900)])
def test_dense_attention(name: str, lengths: tuple[int, int]) -> None:
    attention_cases.check_attention(DENSE[name], 2, *lengths, "cuda", noise=1e-5)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("num_rows", [1, 999])
def test_norms(name: str, num_rows: int) -> None:
    kernel_cases.check_norm(NORMS[name], num_rows, "cuda")


@pytest.mark.parametrize("num_columns", [576, 5120, 16384])
def test_norms_of_other_widths(num_columns: int) -> None:
    kernel_cases.check_norm(NormSpec(dtype="fp32", num_columns=num_columns, eps=1e-6, unit_offset=True), 65, "cuda")


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_gated_activations(activation: str) -> None:
    for dtype in ("fp16", "bf16", "fp32"):
        spec = GatedActivationSpec(dtype=dtype, num_columns=1536, activation=activation)
        kernel_cases.check_gated_activation(spec, 300, "cuda")


def test_quantize() -> None:
    for dtype in ("fp16", "bf16", "fp32"):
        kernel_cases.check_quantize(QuantizeSpec(dtype=dtype, num_columns=14336, group_size=128), 100, "cuda")


def test_write_kv() -> None:
    spec = ROWS["write_kv"]
    assert isinstance(spec, WriteKvSpec)
    kernel_cases.check_write_kv(spec, 1000, "cuda")


@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [128, 32])
def test_rotary_write_kv(is_interleaved: bool, rotary_dim: int) -> None:
    spec = ROWS["rotary_write_kv"]
    assert isinstance(spec, RotaryWriteKvSpec)
    changed = replace(spec, is_interleaved=is_interleaved, rotary_dim=rotary_dim)
    kernel_cases.check_rotary_write_kv(changed, 1000, "cuda")


def test_inverse_cdf_draws_what_the_sampler_draws() -> None:
    spec = SAMPLERS["sample_inverse_cdf"]
    params = [
        SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
        for temperature in (0.0, 0.6, 1.5)
        for top_k in (0, 1, 50)
        for top_p in (1.0, 0.9, 0.3)
    ]
    logits = torch.randn(len(params), spec.vocabulary_size, generator=torch.Generator().manual_seed(1)) * 3
    check_inverse_cdf(spec, params, logits.cuda())
    check_inverse_cdf(spec, params, (logits * 4).round().cuda() / 4, seed=1)


def test_gumbel_draws_from_the_distribution() -> None:
    spec = replace(SAMPLERS["sample_gumbel"], vocabulary_size=3000)
    row = torch.randn(3000, generator=torch.Generator().manual_seed(1)) * 2
    check_gumbel(spec, SamplingParams(temperature=0.8, top_k=40, top_p=0.9), row.cuda(), 5000)


@pytest.mark.parametrize("name", SAMPLERS)
def test_rows_that_are_not_numbers_are_marked(name: str) -> None:
    check_unusable_rows(SAMPLERS[name], "cuda")
