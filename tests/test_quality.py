"""Accounts of served models: every figure against one that is computed another way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import DECODERS
from hypothesis import given, settings
from hypothesis import strategies as st
from small_llm import byte_model, byte_tokenizer, make_llm
from torch import nn

from infercomp import LLM, W8A8, ConfigError
from infercomp.account import size_of, tokens_per_second
from infercomp.passes.quantize_linears import _Quantizer
from infercomp.quality import Quality, measure_quality

TEXT = "All happy families are alike; each unhappy family is unhappy in its own way. " * 8
EVALUATED = TEXT[:500]


def drawn_logits(num_tokens: int, vocab_size: int, seed: int) -> torch.Tensor:
    return 3 * torch.randn(num_tokens, vocab_size, generator=torch.Generator().manual_seed(seed))


def by_windows(logits: Sequence[torch.Tensor]) -> Callable[[Sequence[int]], torch.Tensor]:
    """A model that answers window after window with these."""
    remaining = iter(logits)
    return lambda window: next(remaining)


def probabilities(logits: torch.Tensor) -> np.ndarray[Any, Any]:
    exponents = np.exp(logits.double().numpy())
    return exponents / exponents.sum(-1, keepdims=True)


@given(
    lengths=st.lists(st.integers(2, 140), min_size=1, max_size=3),
    vocab_size=st.integers(3, 40),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_quality_is_that_of_the_formulas(lengths: list[int], vocab_size: int, seed: int) -> None:
    ours = [drawn_logits(length, vocab_size, seed + 1) for length in lengths]
    theirs = [x + drawn_logits(len(x), vocab_size, seed) / 4 for x in ours]
    draw = np.random.default_rng(seed)
    windows = [draw.integers(0, vocab_size, length).tolist() for length in lengths]
    found = measure_quality(by_windows(ours), by_windows(theirs), windows)
    p, q = (np.concatenate([probabilities(x) for x in each]) for each in (theirs, ours))
    nats = (p * np.log(p / q)).sum(-1)
    assert found.num_tokens == sum(lengths)
    assert found.mean_nats == pytest.approx(nats.mean(), rel=1e-9)
    assert found.p99_nats == pytest.approx(np.quantile(nats, 0.99), rel=1e-9)
    assert found.top_1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    for perplexity, logits in ((found.perplexity, ours), (found.reference_perplexity, theirs)):
        likelihoods = [
            probabilities(x)[range(len(window) - 1), window[1:]] for x, window in zip(logits, windows, strict=True)
        ]
        assert perplexity == pytest.approx(np.exp(-np.log(np.concatenate(likelihoods)).mean()), rel=1e-9)


def test_divergence_is_of_the_reference_from_ours_and_not_the_other_way() -> None:
    ours, theirs = torch.tensor([[5.0, 0.0, 0.0]] * 2), torch.tensor([[0.0, 0.0, 0.0]] * 2)
    forward = measure_quality(lambda _: ours, lambda _: theirs, [[0, 1]]).mean_nats
    backward = measure_quality(lambda _: theirs, lambda _: ours, [[0, 1]]).mean_nats
    assert forward == pytest.approx(float(-np.log(3) - np.log(probabilities(ours)[0]).mean())) != backward


def test_a_model_does_not_differ_from_itself() -> None:
    llm = make_llm()
    quality = measure_quality(llm.logits, llm.logits, [list(range(3, 40)), list(range(50, 60))])
    assert quality == Quality(47, 0.0, 0.0, 1.0, quality.perplexity, quality.perplexity)


def test_steps_are_told() -> None:
    told: list[str] = []
    measure_quality(lambda _: torch.zeros(2, 3), lambda _: torch.zeros(2, 3), [[0, 1], [1, 2]], told.append)
    assert told == ["window 1", "window 2"]


# Bytes of a weight [N, K]: codes, and what each row or group has beside them.
BYTES: dict[str | None, Callable[[int, int], float]] = {
    None: lambda n, k: 4 * n * k,
    "w8a8": lambda n, k: n * k + 4 * n,
    "w8a16": lambda n, k: n * k + 4 * n,
    "w4a16": lambda n, k: n * k / 2 + n * k / 32 * (2 + 1),
    "w4a16-g32-sym": lambda n, k: n * k / 2 + n * k / 32 * 2,
}


def linear_shapes(model: nn.Module) -> list[tuple[int, int]]:
    return [
        (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]


@pytest.mark.parametrize(
    ("quantization", "codegen"),
    [*((each, "reference") for each in BYTES), *(pytest.param(each, "cpp", marks=pytest.mark.slow) for each in BYTES)],
)
def test_sizes_are_those_counted_by_hand(quantization: str | None, codegen: str) -> None:
    size = size_of(make_llm(quantization=quantization, quantize_lm_head=False, codegen=codegen)._served)
    model = byte_model()
    shapes = linear_shapes(model)
    expected = sum(BYTES[quantization](*shape) for shape in shapes)
    num_weights = sum(n * k for n, k in shapes)
    others = sum(4 * each.numel() for each in model.parameters()) - 4 * num_weights
    assert size.linear_bytes == expected
    assert size.bits_per_weight == pytest.approx(8 * expected / num_weights)
    # Beside its parameters a model has the frequencies of its rotations.
    assert 0 <= size.model_bytes - (expected + others) < 1024
    config = model.config
    assert size.kv_bytes_per_token == 4 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def test_weights_in_16_bits_have_16_and_tied_ones_count_once() -> None:
    model = DECODERS["gpt2"].build("sdpa").to(torch.bfloat16)
    size = size_of(LLM(model, num_blocks=8)._served)
    hidden, layers = model.config.n_embd, model.config.n_layer
    assert size.bits_per_weight == 16 and size.linear_bytes == 2 * layers * 12 * hidden * hidden
    assert 0 <= size.model_bytes - sum(2 * each.numel() for each in model.parameters()) < 1024


def test_speed_is_a_positive_number_and_leaves_the_engine_idle() -> None:
    llm = make_llm()
    assert tokens_per_second(llm, list(range(3, 30)), num_steps=3) > 0
    assert not llm._engine.has_unfinished_requests()


def exact_errors(rounded: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> dict[str, float]:
    """The errors in float64, of what ``rounded`` makes of inputs and a weight, on the model's own activations."""
    model = byte_model().double()
    squares: dict[str, list[float]] = {}

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Linear, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            sums = squares.setdefault(name, [0.0, 0.0])
            sums[0] += float((rounded(inputs[0], module.weight) - output).square().sum())
            sums[1] += float(output.square().sum())

        return look

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.register_forward_hook(hook(f"model.{name}"))
    ids = torch.tensor(byte_tokenizer()(EVALUATED)["input_ids"])
    with torch.no_grad():
        for window in ids.split(model.config.max_position_embeddings - 1):
            if len(window) > 1:
                model(input_ids=window[None])
    return {name: (error / size) ** 0.5 for name, (error, size) in squares.items()}


def rows_in_8_bits(x: torch.Tensor) -> torch.Tensor:
    step = x.abs().amax(-1, keepdim=True) / 127
    return (x / step).round() * step


EXACT = {
    "w8a16": lambda x, weight: x @ rows_in_8_bits(weight).t(),
    "w8a8": lambda x, weight: rows_in_8_bits(x) @ rows_in_8_bits(weight).t(),
}


def evaluated(quantization: str | W8A8, **options: Any) -> LLM:
    return make_llm(quantization=quantization, quantize_lm_head=False, evaluation=[EVALUATED], **options)


@pytest.fixture(scope="module")
def w8a16() -> LLM:
    return evaluated("w8a16")


@pytest.mark.parametrize("quantization", EXACT)
def test_errors_of_layers_are_those_in_float64(quantization: str, w8a16: LLM) -> None:
    llm = w8a16 if quantization == "w8a16" else evaluated(quantization)
    expected, found = exact_errors(EXACT[quantization]), llm.report.layer_errors
    assert found.keys() == expected.keys()
    for name, error in expected.items():
        # A value between two codes may fall to either side in float32.
        assert found[name] == pytest.approx(error, rel=0.02), name


def test_a_wrong_layer_is_seen_in_its_place_and_in_no_other(w8a16: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    right = w8a16.report.layer_errors
    rounded = _Quantizer._rounded

    def broken(self: _Quantizer, source: Any, *arguments: Any) -> Any:
        codes, scale = rounded(self, source, *arguments)
        return (codes, 1.5 * scale) if "layers_0_mlp_down_proj" in source.name else (codes, scale)

    monkeypatch.setattr(_Quantizer, "_rounded", broken)
    found = evaluated("w8a16").report.layer_errors
    (broken_layer,) = [name for name in found if found[name] != right[name]]
    assert broken_layer.endswith("layers.0.mlp.down_proj") and found[broken_layer] == pytest.approx(0.5, abs=0.02)


def test_errors_are_measured_against_the_floats_and_not_what_they_were_rounded_to() -> None:
    """GPTQ moves the weights before they are quantised, which then costs nothing more."""
    errors = evaluated("w4a16-g32-gptq", calibration=[TEXT]).report.layer_errors
    assert len(errors) == 14 and min(errors.values()) > 0.01


SPLIT = {
    "LLM.int8()": W8A8(outlier_threshold=4.0),
    "PEG": W8A8(embedding_groups=2),
}


@pytest.mark.parametrize("recipe", SPLIT.values(), ids=SPLIT)
def test_a_layer_that_was_split_is_measured_whole(recipe: W8A8) -> None:
    """Parts round less than the whole does, and their weights are counted once."""
    llm = evaluated(recipe, calibration=[TEXT])
    split, whole = llm.report.layer_errors, exact_errors(EXACT["w8a8"])
    assert split.keys() == whole.keys() and llm.report.matches_of("split_channels")
    assert all(0 < split[name] < 1.1 * whole[name] for name in whole)
    assert sum(split.values()) < sum(whole.values())
    linears = [each for each in llm._served.form.linears if not each.is_head]
    assert sum(each.num_weights for each in linears) == sum(n * k for n, k in linear_shapes(byte_model()))


def test_errors_are_in_the_report_and_survive_saving(w8a16: LLM, tmp_path: Path) -> None:
    llm = w8a16
    errors = llm.report.layer_errors
    assert "median of 14 layers" in str(llm.report) and max(errors, key=errors.__getitem__) in str(llm.report)
    llm.save(tmp_path / "saved")
    saved = LLM(tmp_path / "saved", num_blocks=8)
    assert saved.report.layer_errors == errors
    assert size_of(saved._served) == size_of(llm._served)
    with pytest.raises(ConfigError, match="needs no evaluation"):
        LLM(tmp_path / "saved", evaluation=[TEXT])


def test_a_short_text_is_refused_before_anything_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infercomp.serving.rewrite_graph", lambda *_, **__: pytest.fail("rewritten"))
    with pytest.raises(ConfigError, match="evaluation has 5 tokens") as caught:
        make_llm(quantization="w8a16", evaluation=["short"])
    assert caught.value.field == "evaluation"
