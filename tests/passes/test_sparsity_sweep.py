"""sparsity_sweep: layers chosen by a rule, and by what each costs alone under a target density."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sparse_models import counts, of_layers, outputs, sparse

from infercomp import NM, ConfigError
from infercomp.passes import sparsify_linears, sparsity_sweep
from infercomp.passes.n_m_sparsity import nm_of
from infercomp.passes.sparsity_sweep import Unit, until_density

units = st.lists(st.builds(Unit, st.integers(1, 10_000), st.floats(0, 10, allow_nan=False)), min_size=1, max_size=12)


def density_of(found: set[int], of_all: list[Unit], kept: float) -> float:
    total = sum(unit.num_weights for unit in of_all)
    gone = sum((1 - kept) * of_all[position].num_weights for position in found)
    return 1 - gone / total


@given(units, st.sampled_from([0.25, 0.5, 0.75]), st.floats(0, 1))
def test_no_more_is_left_than_wanted_and_no_more_goes_than_needed(
    of_all: list[Unit], kept: float, between: float
) -> None:
    density = kept + (1 - kept) * between
    found = until_density(of_all, kept, density)
    assert density_of(found, of_all, kept) <= density * (1 + 1e-9)
    prices = [unit.cost / unit.num_weights for unit in of_all]
    if found:
        last = max(found, key=lambda position: (prices[position], position))
        assert all(prices[last] <= prices[position] for position in range(len(of_all)) if position not in found)
        assert density_of(found - {last}, of_all, kept) > density * (1 - 1e-6)


def sparse_names(sparsity: NM) -> set[str]:
    return {
        name for name, each in of_layers(sparse(sparsity)[0]).items() if (counts(each, sparsity.m) == sparsity.n).all()
    }


def test_only_layers_of_the_rule() -> None:
    _, record = sparse(NM(2, 4, layers=("*.mlp.down_proj", "o_proj")))
    assert record.matches == 4
    assert {miss.reason for miss in record.near_misses} == {
        "it is the LM head, which stays dense",
        "none of the patterns in layers fits it",
    }
    names = sparse_names(NM(2, 4, layers=("*.mlp.down_proj", "o_proj")))
    assert len(names) == 4 and all("down_proj" in name or "o_proj" in name for name in names)


@pytest.mark.parametrize("score", ["magnitude", "wanda", "sparsegpt"])
def test_the_density_is_reached_by_the_layers_that_cost_least_alone(score: str) -> None:
    sparsity = NM(2, 4, score, density=0.7)
    model_graph, record = sparse(sparsity)
    weights = of_layers(model_graph)
    left = sum(int(each.ne(0).sum()) for each in weights.values()) / sum(each.numel() for each in weights.values())
    assert 0.5 < left <= 0.7
    reasons = [miss.reason for miss in record.near_misses if "LM head" not in miss.reason]
    assert reasons and all("nats, and others less for the density 0.7" in reason for reason in reasons)
    assert 0 < record.matches < len(weights)


def test_a_cost_is_the_divergence_of_the_model_with_one_unit_sparse() -> None:
    """Against the model with its layer made sparse by the rule alone, on the same tokens."""
    found: dict[str, float] = {}

    def kept(model_graph, calibration, readers, layers, sparsity):  # type: ignore[no-untyped-def]
        of_sources = original(model_graph, calibration, readers, layers, sparsity)
        found.update({layers[source]: unit.cost for source, unit in of_sources.items()})
        return of_sources

    original = sparsify_linears.sweep
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparsify_linears, "sweep", kept)
        patch.setattr(sparsity_sweep, "SWEEP_TOKENS", 60)
        sparse(NM(2, 4, density=0.7))
    dense, alone = (outputs(sparse(each)[0]) for each in (None, NM(2, 4, layers=("layers.1.mlp.down_proj",))))
    expected = F.kl_div(
        alone[0].double().log_softmax(-1), dense[0].double().log_softmax(-1), reduction="batchmean", log_target=True
    )
    assert len(found) == 8
    (cost,) = (cost for layer, cost in found.items() if layer.endswith("layers.1.mlp.down_proj"))
    assert cost == pytest.approx(float(expected), rel=1e-3)


def test_the_model_is_dense_again_after_each_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparsity_sweep, "until_density", lambda units, kept, density: set())
    dense, _ = sparse(None)
    swept, _ = sparse(NM(2, 4, density=0.9))
    assert all(torch.equal(each, of_layers(swept)[name]) for name, each in of_layers(dense).items())


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"layers": ("*.no_such_layer",)}, "layers"),
        ({"layers": ()}, "layers"),
        ({"layers": "*"}, "layers"),
        ({"density": 0.4}, "density"),
        ({"density": 1.5}, "density"),
        ({"density": "half"}, "density"),
    ],
)
def test_refusals_name_the_field(fields: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sparse(NM(2, 4, **fields))  # type: ignore[arg-type]
    assert caught.value.field == field


def test_a_density_needs_calibration_data_and_is_json() -> None:
    with pytest.raises(ConfigError) as caught:
        sparse(NM(2, 4, density=0.7), calibration=None)
    assert caught.value.field == "calibration"
    sparsity = NM(2, 4, "wanda", layers=("*.mlp.*",), density=0.75)
    assert nm_of(sparsity.to_json()) == sparsity
    assert json.loads(sparsity.to_json())["layers"] == ["*.mlp.*"]
