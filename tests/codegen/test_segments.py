"""Segments: kernels around calls that run elsewhere, phases in order of need, slots that never hold two live values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from graph_testing import captured
from torch import nn

from infercomp.codegen.grouping import Planner
from infercomp.codegen.segments import Segment, dependencies, exported_nodes, plan_arena, schedule
from infercomp.passes.config import PassConfig
from infercomp.passes.pipeline import run_pipeline


class Blocks(nn.Module):
    def __init__(self, *, sorts: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.norm, self.sorts = nn.LayerNorm(16), sorts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + F.silu(layer(self.norm(x)))
        if self.sorts:
            x = torch.sort(x, -1).values
        return self.norm(x) * 2


def _segments(*, sorts: bool):  # type: ignore[no-untyped-def]
    model_graph = captured(Blocks(sorts=sorts), torch.randn(3, 16))
    run_pipeline(model_graph, PassConfig())
    plan = Planner(model_graph).plan()
    items = schedule(plan, dependencies(model_graph.graph, plan))
    return items, exported_nodes(model_graph.graph, plan)


def test_one_segment_where_nothing_runs_elsewhere() -> None:
    items, exported = _segments(sorts=False)
    assert [type(item) for item in items] == [Segment]
    assert len(exported) == 1


def test_a_call_without_a_kernel_cuts_the_segment() -> None:
    items, _ = _segments(sorts=True)
    kinds = ["segment" if isinstance(item, Segment) else "call" for item in items]
    assert kinds[0] == kinds[-1] == "segment"
    assert "call" in kinds


def test_equal_layers_share_their_kernels() -> None:
    (segment,), _ = _segments(sorts=False)
    assert len(segment.groups) == 10
    assert len({group.spec for group in segment.groups}) <= 5


def test_phases_follow_needs_and_slots_hold_one_live_value_at_a_time() -> None:
    (segment,), exported = _segments(sorts=False)
    phase_of = {node: segment.phases[id(group)] for group in segment.groups for node in group.results}
    for group in segment.groups:
        for source in group.sources:
            if source in phase_of:
                assert phase_of[source] < segment.phases[id(group)]
    slot_of, slots = plan_arena(segment, exported)
    last_read = dict(phase_of)
    for group in segment.groups:
        for source in group.sources:
            if source in last_read:
                last_read[source] = max(last_read[source], segment.phases[id(group)])
    for one, slot in slot_of.items():
        for other in slot_of:
            if other is not one and slot_of[other] == slot:
                assert last_read[one] < phase_of[other] or last_read[other] < phase_of[one]
    assert len(slots) < len(slot_of)
