"""Sampling kernels against ``runtime.sampler``, whose arithmetic is float64."""

from __future__ import annotations

import torch

from infercomp.codegen.triton import emit
from infercomp.codegen.triton.module import load_kernel
from infercomp.codegen.triton.specs import SamplingSpec
from infercomp.runtime.request import SamplingParams
from infercomp.runtime.sampler import warp

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SAMPLERS = {
    f"sample_{method}": SamplingSpec(logits_dtype="fp32", vocabulary_size=128256, method=method)
    for method in ("greedy", "inverse_cdf", "gumbel")
}
# What float32 weights may move a cumulative probability by, over a hundred thousand tokens.
TOLERANCE = 1e-5


def run_sampling(
    spec: SamplingSpec, logits: torch.Tensor, params: list[SamplingParams], random: torch.Tensor
) -> list[int]:
    """Tokens of the rows; ``random`` is the uniforms or the seeds."""
    device = logits.device
    named = {
        "tokens": torch.full((len(params),), -7, dtype=torch.int64, device=device),
        "logits": logits,
        "temperatures": torch.tensor([each.temperature for each in params], dtype=torch.float32, device=device),
        "top_ks": torch.tensor([each.top_k for each in params], dtype=torch.int32, device=device),
        "top_ps": torch.tensor([each.top_p for each in params], dtype=torch.float32, device=device),
        "uniforms": random,
        "seeds": random,
    }
    kernel = load_kernel(emit(spec))
    kernel.launch(spec.grid(len(params)), *(named[argument.name] for argument in spec.arguments()))
    return named["tokens"].tolist()


def as_float32(params: SamplingParams) -> SamplingParams:
    """The parameters as the kernel sees them."""
    narrow = torch.tensor([params.temperature, params.top_p], dtype=torch.float32).double().tolist()
    return SamplingParams(temperature=narrow[0], top_p=narrow[1], top_k=params.top_k)


def possible_tokens(row: torch.Tensor, params: SamplingParams, uniform: float) -> tuple[int, int]:
    """First and last token that the sampler gives within ``TOLERANCE`` of the number drawn and of ``top_p``."""
    found: list[int] = []
    for shift in (-TOLERANCE, 0.0, TOLERANCE):
        top_p = min(1.0, max(1e-12, params.top_p + shift)) if params.top_p < 1 else 1.0
        scores = warp(row, SamplingParams(temperature=params.temperature, top_k=params.top_k, top_p=top_p))
        cumulative = scores.softmax(dim=-1).cumsum(dim=-1)
        kept = torch.nonzero(scores > float("-inf")).squeeze(1)
        for moved in (uniform - TOLERANCE, uniform, uniform + TOLERANCE):
            token = int(torch.searchsorted(cumulative, moved * float(cumulative[-1]), side="right"))
            found.append(min(max(token, int(kept[0])), int(kept[-1])))
    return min(found), max(found)


def check_inverse_cdf(spec: SamplingSpec, params: list[SamplingParams], logits: torch.Tensor, seed: int = 0) -> None:
    """Every token is the sampler's for the same uniform number; a row alone gives the same token."""
    uniforms = torch.rand(len(params), generator=torch.Generator().manual_seed(seed)).to(logits.device)
    logits = logits.to(DTYPES[spec.logits_dtype])
    tokens = run_sampling(spec, logits, params, uniforms)
    for row, token in enumerate(tokens):
        values = logits[row].cpu()
        if params[row].temperature == 0:
            assert token == int(values.float().argmax()), f"row {row} is not greedy"
            continue
        expected = possible_tokens(values, as_float32(params[row]), float(uniforms[row]))
        assert token in expected, f"row {row} gave {token}, the sampler {expected} for {params[row]}"
        alone = run_sampling(
            spec, logits[row : row + 1].clone(), params[row : row + 1], uniforms[row : row + 1].clone()
        )
        assert alone == [token]


def check_gumbel(spec: SamplingSpec, params: SamplingParams, row: torch.Tensor, num_draws: int) -> None:
    """Frequencies over many seeds are the warped distribution's, and a seed always gives the same token."""
    logits = row.to(DTYPES[spec.logits_dtype]).expand(num_draws, -1).contiguous()
    seeds = torch.arange(1, num_draws + 1, device=logits.device) * 7919
    tokens = run_sampling(spec, logits, [params] * num_draws, seeds)
    assert tokens[:4] == run_sampling(spec, logits[:4], [params] * 4, seeds[:4])
    expected = warp(logits[0].cpu(), as_float32(params)).softmax(dim=-1)
    counts = torch.bincount(torch.tensor(tokens), minlength=len(expected)).double()
    assert bool((counts[expected == 0] == 0).all()), "a removed token was drawn"
    deviation = (counts - num_draws * expected).abs()
    allowed = 5.0 * (num_draws * expected * (1 - expected)).sqrt() + 1.0
    assert bool((deviation <= allowed).all()), f"{counts.tolist()} of {num_draws} for {expected.tolist()}"


def check_unusable_rows(spec: SamplingSpec, device: str) -> None:
    """NaN, +inf and only -inf give -1, whatever the method; one -inf is only a token that is never chosen."""
    logits = torch.randn(5, spec.vocabulary_size, generator=torch.Generator().manual_seed(3))
    logits[0, 2], logits[1, 3], logits[2] = float("nan"), float("inf"), float("-inf")
    logits[3] = float("-inf")
    logits[3, 4] = -5.0
    random = torch.full((5,), 0.999) if spec.method != "gumbel" else torch.arange(5)
    logits = logits.to(device, DTYPES[spec.logits_dtype])
    tokens = run_sampling(spec, logits, [SamplingParams(temperature=1.0, top_p=0.9)] * 5, random.to(device))
    assert tokens[:4] == [-1, -1, -1, 4] and 0 <= tokens[4] < spec.vocabulary_size
