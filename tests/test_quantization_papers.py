"""benchmarks/quantization_papers.py: what the methods are compared with is what its papers say, and no straw man."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

BENCHMARKS = str(Path(__file__).resolve().parents[1] / "benchmarks")


@pytest.fixture(autouse=True)
def benchmarks_are_found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield


def drawn(seed: int, shape: tuple[int, ...] = (16, 64)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) ** 3


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_grids_hold_half_a_step_and_no_more_levels_than_their_bits(bits: int) -> None:
    from simulated_rounding import head_wise, layer_wise

    weight = drawn(0)
    whole, by_head = layer_wise(bits)(weight), head_wise(bits, 4)(weight)
    step = weight.abs().amax() / (2 ** (bits - 1) - 1)
    assert (whole - weight).abs().amax() <= step / 2 * (1 + 1e-6)
    assert len(whole.unique()) <= 2**bits
    for head, rounded in zip(weight.split(4), by_head.split(4), strict=True):
        torch.testing.assert_close(rounded, layer_wise(bits)(head))


def test_outliers_are_kept_by_what_keeps_them() -> None:
    from simulated_rounding import linear_bins, without_outliers

    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)) * 0.05
    weight[3, 5] = 4.0
    assert linear_bins(3)(weight)[3, 5] == 4.0
    assert without_outliers(3)(weight)[3, 5] != 4.0


def test_a_claim_is_measured_from_training_to_row(tmp_path: Path) -> None:
    from quantization_papers import bert_claims

    (claim, *_) = bert_claims(["qbert"], tmp_path, steps=1)
    assert [row["is_simulated"] for row in claim["rows"]] == [False, True, True, False]
    assert [row["bits"] for row in claim["rows"]] == [4.125, 4.0, 4.0, 32.0]
    rounded, of_heads, whole, floats = (row["mean_nats"] for row in claim["rows"])
    assert floats == 0 < min(rounded, of_heads, whole)
    assert claim["holds"] == (rounded < min(of_heads, whole))
    assert [path.name for path in tmp_path.iterdir()] == ["small-bert-plain-1.safetensors"]


def test_as_many_weights_get_more_bits_as_hawq_gave_them() -> None:
    from quantization_papers import Unit, with_first

    from infercomp import HAWQ

    units = [Unit(("a",), 4, True), Unit(("b", "c"), 6, False), Unit(("d",), 3, False), Unit(("e",), 3, True)]
    recipe = HAWQ()
    more, fewer = recipe.choices
    assert with_first(units, recipe).layers == (("a", more), ("d", more), ("*", fewer))
    of_others = with_first(sorted(units, key=lambda unit: unit.is_chosen), recipe).layers
    assert of_others == (("b", more), ("c", more), ("*", fewer))
