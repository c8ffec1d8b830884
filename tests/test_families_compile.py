"""Every family through ``torch.compile(model, backend="infercomp")``: numbers, recognition, recompiles."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from families import FAMILIES, Family
from references import Float64Model, Watch, assert_errs_like_eager, tensors_of, watched_compilations
from torch import nn

EXACT_BOUND = 1e-9
# All above the sliding window: transformers itself branches on a length below it, which is a compilation of its own.
LENGTHS = (17, 23, 19)
PADDED_LENGTHS = ((13, 17), (17, 14))

VARIANTS = [(family, name) for family in FAMILIES.values() for name in family.attn_implementations]
# Of the spellings of attention that are no family's default some in every run: test_recognize_attention has them all.
OTHERS_IN_EVERY_RUN = ("llama", "gpt_neox", "t5")
# Without a mark it is torch that finds out which sizes change: models differ in windows and in tables of positions.
LENGTHS_IN_EVERY_RUN = ("llama", "gemma2", "t5")
DEFAULTS = [(family, family.attn_implementations[0]) for family in FAMILIES.values() if family.takes_tokens]


@pytest.fixture
def watch() -> Iterator[Watch]:
    with watched_compilations() as watch:
        yield watch


def named(variants: list[tuple[Family, str]]) -> pytest.MarkDecorator:
    rows = []
    for family, implementation in variants:
        is_rare = implementation != family.attn_implementations[0] and family.name not in OTHERS_IN_EVERY_RUN
        marks = [pytest.mark.slow] if is_rare else []
        rows.append(pytest.param(family, implementation, id=f"{family.name}-{implementation}", marks=marks))
    return pytest.mark.parametrize(("family", "implementation"), rows)


def assert_agrees(model: nn.Module, compiled: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """All outputs, caches too, err like eager's; rows that ``attention_mask`` pads are not looked at."""
    with torch.inference_mode():
        eager, found = tensors_of(model(**inputs)), tensors_of(compiled(**inputs))
    exact = tensors_of(Float64Model(model)(**inputs))
    assert len(eager) == len(found) == len(exact) > 0
    mask = inputs.get("attention_mask")
    for position, (reference, one, other) in enumerate(zip(exact, eager, found, strict=True)):
        if mask is None:
            assert_errs_like_eager(reference, one, other)
        elif position == 0:  # logits or hidden states; a padded row attends to nothing and means nothing
            rows = mask.bool()
            assert_errs_like_eager(reference[rows], one[rows], other[rows])


def assert_recognized(family: Family, watch: Watch) -> None:
    for report in watch.reports:
        assert not report.fallbacks
        assert report.matches_of("recognize_attention") == family.num_attention_layers
        for record in report.passes:
            if record.matches:
                assert record.max_error is not None and record.max_error <= EXACT_BOUND, record.name


@named(VARIANTS)
def test_family_compiles(family: Family, implementation: str, watch: Watch) -> None:
    """One compilation for any length, which is marked as dynamic."""
    check_lengths(family, implementation, marks_length=family.takes_tokens)
    assert watch.num_calls == 1
    assert_recognized(family, watch)


@pytest.mark.parametrize(
    "name",
    [pytest.param(f.name, marks=() if f.name in LENGTHS_IN_EVERY_RUN else pytest.mark.slow) for f, _ in DEFAULTS],
)
def test_lengths_as_they_come(name: str, watch: Watch) -> None:
    """The first length has a compilation of its own, all others share one."""
    check_lengths(FAMILIES[name], FAMILIES[name].attn_implementations[0], marks_length=False)
    assert watch.num_calls == 2
    assert_recognized(FAMILIES[name], watch)


def check_lengths(family: Family, implementation: str, marks_length: bool) -> None:
    model = family.build(implementation)
    compiled = torch.compile(model, backend="infercomp", options={"verify": True})
    for length in LENGTHS if family.takes_tokens else LENGTHS[:1]:
        inputs = family.example_inputs(length)
        if marks_length:
            torch._dynamo.mark_dynamic(inputs["input_ids"], 1)
        assert_agrees(model, compiled, inputs)


@named(DEFAULTS)
def test_padded_batch(family: Family, implementation: str, watch: Watch) -> None:
    """Two sequences padded on the right, then on the left: one compilation, right numbers in every real row."""
    model = family.build(implementation)
    compiled = torch.compile(model, backend="infercomp", options={"verify": True})
    for side in ("right", "left"):
        for lengths in PADDED_LENGTHS:
            inputs = family.example_inputs(max(lengths), batch_size=2)
            inputs["attention_mask"] = padding_mask(lengths, side)
            assert_agrees(model, compiled, inputs)
    assert watch.num_calls == 1
    assert_recognized(family, watch)


def padding_mask(lengths: tuple[int, ...], side: str) -> torch.Tensor:
    order = torch.arange(max(lengths))
    mask = torch.stack([order < length for length in lengths]).long()
    return mask if side == "right" else mask.flip(1)


def test_the_comparison_sees_a_dropped_mask() -> None:
    """The numbers above could not agree if one key too many were seen."""
    family = FAMILIES["llama"]
    model = family.build("sdpa")
    inputs = family.example_inputs()
    seen = inputs["input_ids"].clone()
    seen[0, -1] += 1
    exact = Float64Model(model)(**inputs).logits
    with torch.inference_mode():
        eager, other = model(**inputs).logits, model(input_ids=seen).logits
    assert_errs_like_eager(exact[:, :-1], eager[:, :-1], other[:, :-1])
    with pytest.raises(AssertionError, match="twice eager"):
        assert_errs_like_eager(exact, eager, other)
