"""GOBO: clusters against plain loops, L1 that falls, outliers that are kept, and models of codes served and saved."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import infercomp
from infercomp import GOBO, ConfigError, LayerRecipes
from infercomp.codegen.ops.clustered import restored_clusters
from infercomp.passes import cluster_weights
from infercomp.passes.cluster_weights import clusters_of, fitted_centroids, is_outlier, outlier_room

TOKENS = list(range(3, 40))


def random_weight(seed: int, rows: int = 32, channels: int = 64, num_outliers: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = 0.05 * torch.randn(rows, channels, generator=generator)
    places = torch.randperm(weight.numel(), generator=generator)[:num_outliers]
    weight.flatten()[places] *= 40
    return weight


def centroids_in_loops(values: list[float], num_bins: int) -> tuple[list[float], list[float]]:
    """The paper's iteration, one weight at a time."""
    values = sorted(values)
    ends = [i * len(values) // num_bins for i in range(num_bins + 1)]
    bins = [values[first:last] for first, last in itertools.pairwise(ends)]
    centroids = [math.fsum(each) / len(each) if each else 0.0 for each in bins]
    best, norms = centroids, list[float]()
    while True:
        nearest = [min(range(num_bins), key=lambda i, w=value: abs(w - centroids[i])) for value in values]
        norm = math.fsum(abs(value - centroids[i]) for value, i in zip(values, nearest, strict=True))
        if norms and norm >= norms[-1] * (1 - 1e-12):
            return best, norms
        norms.append(norm)
        best, previous = centroids, centroids
        bins = [[v for v, i in zip(values, nearest, strict=True) if i == number] for number in range(num_bins)]
        centroids = [math.fsum(b) / len(b) if b else old for b, old in zip(bins, previous, strict=True)]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.integers(16, 300), st.sampled_from((4, 8, 16)))
def test_centroids_are_those_of_plain_loops(seed: int, count: int, num_bins: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found, norms = fitted_centroids(values, num_bins)
    expected, expected_norms = centroids_in_loops(values.tolist(), num_bins)
    assert len(norms) == len(expected_norms)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(expected_norms), rtol=1e-9, atol=1e-9)
    assert all(after < before for before, after in itertools.pairwise(norms))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.integers(16, 300), st.sampled_from((4, 8, 16)))
def test_squares_end_where_no_value_is_nearer_to_another_mean(seed: int, count: int, num_bins: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    centroids, norms = fitted_centroids(values, num_bins, "squares")
    nearest = (values[:, None] - centroids).abs().argmin(1)
    for number in nearest.unique():
        assert float(values[nearest == number].mean()) == pytest.approx(float(centroids[number]), abs=1e-9)
    early, _ = fitted_centroids(values, num_bins)
    squares, early_squares = (
        float((values[:, None] - each).abs().amin(1).square().sum()) for each in (centroids, early)
    )
    assert squares <= early_squares * (1 + 1e-12) and norms


def test_centroids_of_the_first_bins_alone_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: means that do not follow their weights, so that nothing is iterated."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected, _ = centroids_in_loops(values.tolist(), 8)
    means = cluster_weights._means
    monkeypatch.setattr(cluster_weights, "_means", lambda s, e, old: old if bool(old.any()) else means(s, e, old))
    found, norms = fitted_centroids(values, 8)
    assert len(norms) == 1 and float((found - torch.tensor(expected)).abs().max()) > 1e-3


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 9), st.integers(0, 9), st.sampled_from((2, 3, 4)))
def test_weights_are_the_nearest_centroid_or_themselves(
    seed: int, blocks: int, words: int, planted: int, bits: int
) -> None:
    weight = random_weight(seed, 16 * blocks, 8 * words, planted)
    recipe = GOBO(bits=bits)
    codes, table, counts, columns, excess = clusters_of(weight, recipe)
    assert (codes.shape, table.shape) == ((len(weight), weight.shape[1] // 2), (blocks, 2**bits))
    assert int(torch.stack((codes & 15, codes >> 4)).max()) < 2**bits and bool((table == table[0]).all())
    restored = restored_clusters(codes, table, counts, columns, excess)
    nearest = table[0][(weight[..., None] - table[0]).abs().argmin(-1)]
    outliers = is_outlier(weight, recipe.outlier_log_density)
    kept = (restored - weight).abs() <= weight.abs() * 2**-23
    assert bool(kept[outliers].all()) and int(counts.sum()) == max(1, int(outliers.sum())) == len(columns) == len(
        excess
    )
    torch.testing.assert_close((restored - weight).abs()[~kept], (nearest - weight).abs()[~kept])


def test_outliers_are_those_of_the_gaussian() -> None:
    weight = random_weight(1).double()
    gaussian = torch.distributions.Normal(weight.mean(), weight.std(correction=0))
    assert torch.equal(is_outlier(weight, -4.0), gaussian.log_prob(weight) < -4.0)
    assert 3 <= int(is_outlier(weight, -4.0).sum()) < 0.01 * weight.numel()
    assert not is_outlier(torch.ones(4, 4), -4.0).any()
    assert outlier_room([torch.tensor([1] * 16 + [0] * 15 + [17])]) == 32


def test_it_errs_less_than_round_to_nearest_of_the_layer_on_bert() -> None:
    """The paper's claim in kind: at 3 bits, one table a layer beats one step a layer, and outliers are few."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=99
    )
    bert = BertModel(config).eval()
    linears = [each for each in bert.encoder.modules() if isinstance(each, nn.Linear)]
    for number, each in enumerate(linears):  # trained layers have a few weights of 20 deviations
        each.weight.data.flatten()[torch.randperm(each.weight.numel())[: 2 + number % 3]] *= 20
    ids = torch.randint(0, 99, (2, 24))
    plain = [each.weight.data.clone() for each in linears]
    with torch.no_grad():
        expected = bert(ids).last_hidden_state
        errors = {}
        for name in ("gobo", "nearest"):
            for linear, weight in zip(linears, plain, strict=True):
                step = weight.abs().max() / 3
                gobo = restored_clusters(*clusters_of(weight, GOBO()))
                linear.weight.data = gobo if name == "gobo" else (weight / step).round().clamp(-4, 3) * step
            errors[name] = float((bert(ids).last_hidden_state - expected).norm() / expected.norm())
    assert 3 * errors["gobo"] < errors["nearest"]
    assert sum(int(is_outlier(each, -4.0).sum()) for each in plain) < 0.005 * sum(each.numel() for each in plain)


def small_llama(dtype: torch.dtype = torch.float32, intermediate_size: int = 160) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=intermediate_size, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=130, max_position_embeddings=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            parameter.data.flatten()[torch.randperm(parameter.numel())[:9]] *= 20
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [3, 4])
def test_a_model_of_codes_is_served_by_kernels_and_saved(dtype: torch.dtype, bits: int, tmp_path: Path) -> None:
    recipe = GOBO(bits=bits)
    llm = infercomp.LLM(small_llama(dtype), codegen="cpp", num_blocks=16, quantization=recipe)
    assert llm.report.ops["infercomp.clustered_weight_linear"] == "cpp"
    logits = llm.logits(TOKENS)
    reference = infercomp.LLM(small_llama(dtype), codegen="reference", num_blocks=16, quantization=recipe)
    bound = 1e-5 if dtype == torch.float32 else 0.02
    assert float((logits - reference.logits(TOKENS)).abs().max()) < bound * float(logits.abs().max())
    llm.save(tmp_path / "model")
    assert torch.equal(infercomp.LLM(tmp_path / "model", codegen="cpp", num_blocks=16).logits(TOKENS), logits)


def test_what_cannot_be_codes_stays_floats_with_a_reason() -> None:
    def misses(recipe: infercomp.passes.linear_recipes.Recipe, **sizes: int) -> list[str]:
        llm = infercomp.LLM(small_llama(**sizes), codegen="reference", num_blocks=16, quantization=recipe)  # type: ignore[arg-type]
        record = next(each for each in llm.report.passes if each.name == "quantize_linears")
        return [each.reason for each in record.near_misses]

    assert all("not in 16s" in reason for reason in misses(GOBO(), intermediate_size=100)) and misses(
        GOBO(), intermediate_size=100
    )
    many = misses(LayerRecipes((("*.down_proj", GOBO(outlier_log_density=2.0)),)))
    assert sum("of its weights are outliers" in reason for reason in many) == 2


def test_torch_compile_is_refused() -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    compiled = torch.compile(model, backend="infercomp", options={"quantization": "gobo"})
    with pytest.raises(ConfigError, match="use LLM"), torch.no_grad():
        compiled(torch.randn(2, 32))
