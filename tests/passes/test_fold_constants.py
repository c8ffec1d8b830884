"""fold_constants: what no input reaches is computed once; what somebody may still change never is."""

from __future__ import annotations

import pytest
import torch
from graph_testing import (
    FileCheck,
    assert_graph_agrees,
    assert_rounds_like_eager,
    captured,
    count,
    outputs,
    run_passes,
    text,
)
from torch import nn

from infercomp.passes import fold_constants
from infercomp.passes.fold_constants import _evaluate
from infercomp.runtime.errors import VerificationError

aten = torch.ops.aten
PASSES = ("normalize", "fold_constants")


def _frequencies(x: torch.Tensor) -> torch.Tensor:
    return x * (1.0 / 10000 ** (torch.arange(0, 8, dtype=x.dtype) / 8)).cos()


class _Scaled(nn.Module):
    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))
        self.register_buffer("table", torch.randn(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (1 + self.weight).exp() + self.table.cos()


@pytest.mark.parametrize("make", [lambda: _frequencies, lambda: _Scaled().double()], ids=["numbers", "weights"])
def test_fires_and_keeps_values(make) -> None:  # type: ignore[no-untyped-def]
    function, x = make(), torch.randn(2, 5, 8, dtype=torch.float64)
    model_graph = captured(function, x, dynamic={0: 1})
    expected = outputs(model_graph, [x])
    records = run_passes(model_graph, *PASSES, inputs=[x])
    assert records[1].matches >= 1
    assert (records[1].numeric_class, records[1].max_error) == ("bit-identical", 0.0)
    FileCheck().check("placeholder[target=folded_").check_not("cos.default").check_not("arange").run(text(model_graph))
    FileCheck().check("folded_").check("placeholder[target=x]").run(text(model_graph))
    assert torch.equal(outputs(model_graph, [x])[0], expected[0])
    assert_graph_agrees(model_graph, function, [x])


def test_wrong_constant_is_caught_in_the_graphs_own_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments) -> torch.Tensor:  # type: ignore[no-untyped-def]
        return torch.nextafter(_evaluate(*arguments), torch.tensor(9.0))

    monkeypatch.setattr(fold_constants, "_evaluate", wrong)
    x = torch.randn(2, 5, 8)
    with pytest.raises(VerificationError, match="fold_constants#0"):
        run_passes(captured(_frequencies, x), *PASSES, inputs=[x])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounds_like_eager(dtype: torch.dtype) -> None:
    assert_rounds_like_eager(_Scaled(), [torch.randn(2, 5, 8, dtype=torch.float64)], dtype, *PASSES)


def test_dtype_of_a_constant_is_kept() -> None:
    x = torch.randn(2, 8)
    model_graph = captured(lambda x: (x.sum(), torch.arange(4).half() * 2, torch.arange(3) + 1), x)
    run_passes(model_graph, *PASSES, inputs=[x])
    assert [each.dtype for each in outputs(model_graph, [x])] == [torch.float32, torch.float16, torch.int64]
    assert count(model_graph, aten.arange.default) == 0


def test_parameter_of_the_user_is_not_folded() -> None:
    """In torch.compile the user still owns the parameters, and may load others into them."""
    module, x = _Scaled().double(), torch.randn(2, 5, 8, dtype=torch.float64)
    model_graph = captured(module, x)
    model_graph.frozen = False
    records = run_passes(model_graph, *PASSES, inputs=[x])
    assert records[1].matches == 0
    with torch.no_grad():
        module.weight.add_(1)
        module.table.mul_(3)
    assert_graph_agrees(model_graph, module, [x])


def test_constant_of_the_graph_is_folded_though_the_user_owns_the_parameters() -> None:
    x, table = torch.randn(2, 3), torch.randn(3)
    model_graph = captured(lambda x: x + table.exp(), x)
    model_graph.frozen = False
    model_graph.weight_sources.clear()
    records = run_passes(model_graph, *PASSES, inputs=[x])
    assert records[1].matches == 1
    assert count(model_graph, aten.exp.default) == 0


def test_what_an_input_reaches_is_not_folded() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.arange(x.shape[1]) + torch.zeros_like(x[0, :, 0]).exp()

    x = torch.randn(2, 5, 8)
    model_graph = captured(function, x, dynamic={0: 1})
    records = run_passes(model_graph, *PASSES, inputs=[x])
    assert records[1].matches == 0
    for length in (2, 7):
        assert_graph_agrees(model_graph, function, [torch.randn(2, length, 8)])


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.rand(4),
        lambda: torch.randn(4) * 2,
        lambda: torch.dropout(torch.ones(4), 0.5, True),
        lambda: torch.bernoulli(torch.full((4,), 0.5)),
    ],
    ids=["rand", "randn", "dropout", "bernoulli"],
)
def test_random_values_are_never_folded(draw) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(4)
    model_graph = captured(lambda x: x + draw(), x)
    run_passes(model_graph, *PASSES)
    random = [
        node for node in model_graph.graph.nodes if "nondeterministic_seeded" in str(getattr(node.target, "tags", ""))
    ]
    assert len(random) == 1
    drawn = {tuple(outputs(model_graph, [x])[0].tolist()) for _ in range(20)}
    assert len(drawn) > 1


def test_large_values_are_computed_from_small_ones_that_are_folded() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        small = torch.arange(300, dtype=x.dtype).exp()
        return x + small[:, None] * small[None, :]

    x = torch.randn(300, 300, dtype=torch.float64)
    model_graph = captured(function, x)
    run_passes(model_graph, *PASSES, inputs=[x])
    FileCheck().check_not("arange").check_not("exp.default").check("mul.Tensor").run(text(model_graph))
    assert all(weight.numel() <= 300 for weight in model_graph.weights.values())
    assert_graph_agrees(model_graph, function, [x])


def test_only_what_is_still_used_is_kept() -> None:
    x = torch.randn(3)
    model_graph = captured(lambda x: x + (torch.arange(3) * 2).float().sin(), x)
    run_passes(model_graph, *PASSES, inputs=[x])
    assert len(model_graph.weights) == 1
    assert count(model_graph, aten.add.Tensor) == len([n for n in model_graph.graph.nodes if n.op == "call_function"])
