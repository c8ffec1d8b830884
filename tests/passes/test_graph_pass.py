"""What the frame gives a pass: sites with stable indices, a budget, and a memory for near misses."""

from __future__ import annotations

import pytest
import torch
from graph_testing import captured, count

from infercomp.passes.config import PassConfig
from infercomp.passes.graph_pass import MatchBudget, PassContext

aten = torch.ops.aten


def _graph():  # type: ignore[no-untyped-def]
    return captured(lambda x: x.exp().sin().cos().tanh(), torch.randn(3))


def _claims(config: PassConfig) -> tuple[PassContext, list[int | None]]:
    context = PassContext("my_pass", config, MatchBudget(config.limit))
    nodes = [node for node in _graph().graph.nodes if node.op == "call_function"]
    sites = [context.claim(node) for node in nodes]
    return context, [site.index if site else None for site in sites]


@pytest.mark.parametrize(
    ("config", "indices"),
    [
        (PassConfig(), [0, 1, 2, 3]),
        (PassConfig(disable=("my_pass",)), [None] * 4),
        (PassConfig(disable=("my_pass#1",)), [0, None, 2, 3]),
        (PassConfig(disable=("my_pass#0", "my_pass#2")), [None, 1, None, 3]),
        (PassConfig(disable=("my_pass#10", "other#1", "other")), [0, 1, 2, 3]),
        (PassConfig(limit=0), [None] * 4),
        (PassConfig(limit=3), [0, 1, 2, None]),
        (PassConfig(limit=2, disable=("my_pass#0",)), [None, 1, 2, None]),
    ],
)
def test_indices_count_candidates_applied_or_not(config: PassConfig, indices: list[int | None]) -> None:
    context, found = _claims(config)
    assert found == indices
    assert context.num_skipped == indices.count(None)
    assert [site.index for site in context.sites] == [index for index in indices if index is not None]


def test_budget_is_shared_and_never_refills() -> None:
    budget = MatchBudget(2)
    assert [budget.spend() for _ in range(4)] == [True, True, False, False]
    assert all(MatchBudget(None).spend() for _ in range(4))


def test_replace_moves_every_use_and_remembers_it() -> None:
    model_graph = captured(lambda x: (y := x.exp(), y + 1, y * y), torch.randn(3))
    context = PassContext("my_pass", PassConfig(), MatchBudget(None))
    (old,) = model_graph.calls(aten.exp.default)
    old.meta["custom"] = "of the old node"
    with model_graph.inserting_before(old) as emit:
        new = emit(aten.sin.default, old.args[0])
    site = context.claim(old)
    context.replace(site, old, new)
    assert not old.users
    assert len(new.users) == 3
    assert site.replaced == {old.name: new.name}
    assert "custom" not in new.meta
    model_graph.eliminate_dead_code()
    assert count(model_graph, aten.exp.default) == 0


def test_sites_and_near_misses_know_the_models_line() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.exp()  # this line

    (node,) = captured(Model(), torch.randn(3)).calls(aten.exp.default)
    context = PassContext("my_pass", PassConfig(), MatchBudget(None))
    site = context.claim(node)
    context.near_miss(node, "because")
    for where in (site.where, context.near_misses[0].where):
        assert "test_graph_pass.py" in where
        assert "return x.exp()" in where
    assert context.near_misses[0].reason == "because"
