"""The runner: order, names, leaving out by name and by index, bisection, records and dumps."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from graph_testing import captured, count, named_inputs, outputs, run_passes, text
from torch import nn

from infercomp.codegen.model_graph import ModelGraph
from infercomp.passes.config import PassConfig
from infercomp.passes.graph_pass import Pass, PassContext
from infercomp.passes.pipeline import PIPELINE, check_order, pass_names, run_pipeline
from infercomp.passes.record import PassRecord
from infercomp.runtime.errors import ConfigError, PassError


class Block(nn.Module):
    """Norms, a gate and linears, enough for most passes to find something."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ParameterList([nn.Parameter(torch.rand(8)) for _ in range(3)])
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def _norm(self, x: torch.Tensor, which: int) -> torch.Tensor:
        return self.norms[which] * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self._norm(x, 0).clone()
        h = x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))
        return self._norm(self._norm(h, 1), 2)


@pytest.fixture(scope="module")
def block() -> Block:
    return Block().double()


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(1, 5, 8, dtype=torch.float64)


def _run(
    block: Block, x: torch.Tensor, config: PassConfig, pipeline: tuple[Pass, ...] = PIPELINE
) -> tuple[ModelGraph, dict[str, PassRecord]]:
    model_graph = captured(block, x, dynamic={0: 1})
    inputs = named_inputs(model_graph, [x])
    records = run_pipeline(model_graph, config, example_inputs=inputs, pipeline=pipeline)
    return model_graph, {record.name: record for record in records}


def _places(records: dict[str, PassRecord]) -> dict[str, str]:
    return {f"{record.name}#{site.index}": site.node for record in records.values() for site in record.sites}


def test_the_pipeline_keeps_its_own_order() -> None:
    check_order(PIPELINE)
    assert len(set(pass_names())) == len(PIPELINE)
    known = set(pass_names())
    assert all(name in known for each in PIPELINE for name in each.after)


@pytest.mark.parametrize("moved", [each.name for each in PIPELINE if each.after])
def test_pass_that_stands_too_early_is_refused(moved: str) -> None:
    first = next(each for each in PIPELINE if each.name == moved)
    pipeline = (first, *(each for each in PIPELINE if each.name != moved))
    with pytest.raises(PassError, match=f"{moved} must come after") as caught:
        run_pipeline(None, PassConfig(), pipeline=pipeline)  # type: ignore[arg-type]
    assert caught.value.pass_name == moved
    assert all(name in caught.value.what for name in first.after)


@pytest.mark.parametrize("entry", ["recognise_norm", "recognise_norm#3"])
def test_unknown_name_is_refused_before_anything_runs(entry: str) -> None:
    with pytest.raises(ConfigError, match="did you mean 'recognize_norm'"):
        run_pipeline(None, PassConfig(disable=(entry,)))  # type: ignore[arg-type]


def test_records_say_what_was_done(block: Block, x: torch.Tensor) -> None:
    model_graph, records = _run(block, x, PassConfig(verify=True))
    assert list(records) == [each.name for each in PIPELINE if not each.serving]
    assert records["recognize_norm"].matches == 3
    assert records["recognize_linear"].matches == 3
    assert records["merge_linears"].matches == records["recognize_gated_mlp"].matches == 1
    for record in records.values():
        assert record.matches == len(record.sites)
        assert (record.max_error is not None) == (record.matches > 0)
        assert record.milliseconds >= 0
        assert all("test_pipeline.py" in site.where for site in record.sites)
    torch.testing.assert_close(outputs(model_graph, [x])[0], block(x))


def test_without_verify_nothing_is_measured(block: Block, x: torch.Tensor) -> None:
    _, records = _run(block, x, PassConfig())
    assert all(record.max_error is None for record in records.values())


@pytest.mark.parametrize("name", ["recognize_norm", "recognize_gated_mlp", "merge_linears", "normalize"])
def test_pass_is_left_out_by_name(block: Block, x: torch.Tensor, name: str) -> None:
    model_graph, records = _run(block, x, PassConfig(disable=(name,), verify=True))
    assert records[name].matches == 0
    assert records[name].skipped >= 1
    assert sum(record.matches for record in records.values()) > 0
    torch.testing.assert_close(outputs(model_graph, [x])[0], block(x))


def test_one_match_is_left_out_by_index_and_others_keep_theirs(block: Block, x: torch.Tensor) -> None:
    places = _places(_run(block, x, PassConfig())[1])
    names = [name for name in places if name.startswith(("recognize_norm", "recognize_linear"))]
    assert len(names) == 6
    for name in names:
        model_graph, records = _run(block, x, PassConfig(disable=(name,)))
        found = _places(records)
        assert name not in found
        assert all(found[other] == places[other] for other in names if other != name)
        assert records[name.partition("#")[0]].skipped == 1
        torch.testing.assert_close(outputs(model_graph, [x])[0], block(x))


def test_two_matches_are_left_out_by_index(block: Block, x: torch.Tensor) -> None:
    places = _places(_run(block, x, PassConfig())[1])
    model_graph, records = _run(block, x, PassConfig(disable=("recognize_norm#0", "recognize_norm#2")))
    (site,) = records["recognize_norm"].sites
    assert (site.index, site.node) == (1, places["recognize_norm#1"])
    assert count(model_graph, torch.ops.aten.rsqrt.default) == 2


def test_limit_applies_exactly_the_first_matches_over_all_passes(block: Block, x: torch.Tensor) -> None:
    everything = list(_places(_run(block, x, PassConfig())[1]).items())
    assert len(everything) >= 8
    limits = [*range(0, len(everything), 3), len(everything), len(everything) + 1]
    texts = set()
    for limit in limits:
        model_graph, records = _run(block, x, PassConfig(limit=limit))
        assert list(_places(records).items()) == everything[:limit]
        # A fusion changes no call: it marks which of them share a kernel.
        marks = tuple(node.meta.get("kernel") for node in model_graph.graph.nodes)
        texts.add((text(model_graph), marks))
        torch.testing.assert_close(outputs(model_graph, [x])[0], block(x))
    assert len(texts) == len(limits) - 1, "each match changes the graph"


def test_bisection_finds_the_planted_match(block: Block, x: torch.Tensor) -> None:
    def run(model_graph: ModelGraph, context: PassContext) -> None:
        for number, node in enumerate(model_graph.calls(torch.ops.infercomp.rms_norm.default)):
            site = context.claim(node)
            if site is not None and number == 0:
                node.update_arg(2, 0.5)

    pipeline = tuple(
        each
        for norm in PIPELINE
        for each in ((norm, Pass("planted", run)) if norm.name == "recognize_norm" else (norm,))
    )
    everything = list(_places(_run(block, x, PassConfig(), pipeline)[1]))

    def is_wrong(limit: int) -> bool:
        model_graph, _ = _run(block, x, PassConfig(limit=limit), pipeline)
        return not torch.allclose(outputs(model_graph, [x])[0], block(x))

    low, high = 0, len(everything)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_wrong(middle) else (middle, high)
    assert everything[high - 1] == "planted#0"


def test_serving_passes_run_only_for_serving(block: Block, x: torch.Tensor) -> None:
    ran = []
    served = Pass("serve_it", lambda model_graph, context: ran.append(context.name), serving=True)
    for serving in (False, True):
        run_pipeline(captured(block, x), PassConfig(), serving=serving, pipeline=(served,))
    assert ran == ["serve_it"]


def test_on_change_is_told_of_passes_that_changed_something(block: Block, x: torch.Tensor) -> None:
    told = []
    model_graph = captured(block, x)
    inputs = named_inputs(model_graph, [x])
    records = run_pipeline(
        model_graph,
        PassConfig(disable=("recognize_linear",)),
        example_inputs=inputs,
        on_change=lambda number, name, graph, given: told.append((number, name, graph is model_graph, given)),
    )
    changed = {record.name for record in records if record.matches}
    assert [(number, name) for number, name, _, _ in told] == [
        (number, each.name) for number, each in enumerate(PIPELINE, start=1) if each.name in changed
    ]
    assert "recognize_linear" not in changed
    assert all(is_same and given == inputs for _, _, is_same, given in told)


def test_inputs_of_later_passes_are_those_that_a_pass_left() -> None:
    """A pass that changes the graph's inputs says how its example inputs change; later ones see the new ones."""

    def change(model_graph: ModelGraph, context: PassContext) -> None:
        (node,) = model_graph.calls(torch.ops.aten.exp.default)
        new = model_graph.add_placeholder("exponential", node.meta["val"])
        context.replace(context.claim(node), node, new)
        model_graph.eliminate_dead_code()
        model_graph.remove_input("x")
        context.input_adapter = lambda inputs: {"exponential": inputs["x"].exp()}

    x = torch.randn(3, dtype=torch.float64)
    model_graph = captured(lambda x: x.exp() * 1 + 1, x)
    records = run_passes(model_graph, Pass("change_inputs", change), "normalize", inputs=[x])
    assert model_graph.input_names == ("exponential",)
    assert [record.max_error for record in records] == [0.0, 0.0]


def test_order_is_checked_for_passes_of_others() -> None:
    late = dataclasses.replace(PIPELINE[0], name="late", after=("early",))
    with pytest.raises(PassError, match="late must come after early"):
        check_order((late, dataclasses.replace(PIPELINE[0], name="early")))
