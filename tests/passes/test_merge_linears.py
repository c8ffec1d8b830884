"""merge_linears: linears of one input become one, with equal values, unless a weight cannot be moved."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
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

from infercomp.codegen.ops import linear, merge_weights

PASSES = ("normalize", "recognize_linear", "merge_linears")


class Projections(nn.Module):
    """Query, key and value of one input; keys and values are narrower."""

    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, size, bias=bias) for size in (12, 4, 6))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.q(x), self.k(x), self.v(x)


def _x(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, 5, 8)), dtype=torch.float64)


@pytest.mark.parametrize("bias", [False, True])
def test_fires(bias: bool) -> None:
    layer, x = Projections(bias=bias).double(), _x()
    model_graph = captured(layer, x, dynamic={0: 1})
    records = run_passes(model_graph, *PASSES, inputs=[x])
    assert (records[2].matches, records[2].near_misses) == (1, ())
    assert records[2].max_error < 1e-9
    assert (count(model_graph, linear), count(model_graph, merge_weights)) == (1, 1 + bias)
    check = FileCheck().check("merge_weights.default](args = ([%p_q_weight, %p_k_weight, %p_v_weight],)")
    if bias:
        check.check("merge_weights.default](args = ([%p_q_bias, %p_k_bias, %p_v_bias],)")
    check.check("2, 0, 12)").check("2, 12, 16)").check("2, 16, 22)").run(text(model_graph))
    for length in (2, 5, 11):
        assert_graph_agrees(model_graph, layer, [_x(2, length, 8)])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounds_like_eager(bias: bool, dtype: torch.dtype) -> None:
    assert_rounds_like_eager(Projections(bias=bias), [_x(4, 16, 8)], dtype, *PASSES)


def test_each_input_has_its_own_group() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Projections(), Projections()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sum(each.sum(-1) for each in (*self.first(x), *self.second(x.exp())))

    layer, x = Layers().double(), _x()
    model_graph = captured(layer, x)
    records = run_passes(model_graph, *PASSES, inputs=[x])
    assert records[2].matches == count(model_graph, merge_weights) == 2
    assert_graph_agrees(model_graph, layer, [x])


def test_linears_far_apart_are_merged_before_the_first() -> None:
    class Apart(Projections):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.k(x).exp() + self.q(x).relu()[..., :4]

    layer, x = Apart().double(), _x()
    model_graph = captured(layer, x)
    run_passes(model_graph, *PASSES, inputs=[x])
    FileCheck().check("([%p_k_weight, %p_q_weight],)").check_count("linear", 1).check("exp").run(text(model_graph))
    assert_graph_agrees(model_graph, layer, [x])


class Near(Projections):
    """Two projections of one input by a function of the layer, for what must not be merged."""

    def __init__(self, function: Callable[..., tuple[torch.Tensor, ...]]) -> None:
        super().__init__(bias=True)
        self.matrix = nn.Parameter(torch.randn(8, 4))
        self.function = function

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.function(self, x)


def _tie_weights(layer: Near) -> None:
    layer.v.weight = nn.Parameter(layer.q.weight.data[:6])


NEAR_MISSES = {
    "bias on only some": (lambda m, x: (m.q(x), F.linear(x, m.k.weight)), "some have a bias and some do not"),
    "weight is computed": (lambda m, x: (m.q(x), F.linear(x, m.k.weight * 2, m.k.bias)), "a weight is computed"),
    "bias is computed": (lambda m, x: (m.q(x), F.linear(x, m.k.weight, m.k.bias * 2)), "a bias is computed"),
    "one weight twice": (lambda m, x: (m.q(x), F.linear(x, m.q.weight, m.q.bias * 2)), "share one weight"),
    "weight used elsewhere": (lambda m, x: (m.q(x), m.k(x), m.q.weight.sum()), "also used elsewhere"),
    "bias used elsewhere": (lambda m, x: (m.q(x), m.k(x), m.k.bias.sum()), "also used elsewhere"),
    "one bias twice": (
        lambda m, x: (m.q(x), F.linear(x, m.q.weight[:] + 0 * x.sum(), m.q.bias)),
        "a weight is computed",
    ),
    "stored the other way": (lambda m, x: (m.k(x), torch.addmm(m.v.bias[:4], x, m.matrix)), "is stored [K, N]"),
}


@pytest.mark.parametrize(("function", "reason"), NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_miss_is_left_and_recorded(function: Callable[..., tuple[torch.Tensor, ...]], reason: str) -> None:
    layer, x = Near(function).double(), _x(5, 8)
    model_graph = captured(layer, x)
    records = run_passes(model_graph, *PASSES, inputs=[x])
    assert records[2].matches == count(model_graph, merge_weights) == 0
    (miss,) = records[2].near_misses
    assert reason in miss.reason
    assert_graph_agrees(model_graph, layer, [x])


def test_shared_bias_is_not_merged() -> None:
    layer, x = Near(lambda m, x: (m.q(x), F.linear(x, m.matrix.new_ones(12, 8), m.q.bias))).double(), _x()
    layer.other = nn.Parameter(torch.randn(12, 8, dtype=torch.float64))
    layer.function = lambda m, x: (m.q(x), F.linear(x, m.other, m.q.bias))
    model_graph = captured(layer, x)
    records = run_passes(model_graph, *PASSES, inputs=[x])
    assert records[2].matches == 0
    assert "also used elsewhere" in records[2].near_misses[0].reason


def test_parameter_that_shares_memory_is_not_merged() -> None:
    """Two names, one memory: laying one of them out anew would cut the tie."""
    layer, x = Near(lambda m, x: (m.q(x), m.v(x))).double(), _x()
    _tie_weights(layer)
    model_graph = captured(layer, x)
    records = run_passes(model_graph, *PASSES, inputs=[x])
    assert records[2].matches == 0
    assert "shares its memory" in records[2].near_misses[0].reason
    assert_graph_agrees(model_graph, layer, [x])


def test_one_linear_alone_is_no_group() -> None:
    layer, x = nn.Linear(8, 4).double(), _x()
    model_graph = captured(layer, x)
    records = run_passes(model_graph, *PASSES, inputs=[x])
    assert (records[2].matches, records[2].near_misses) == (0, ())
    assert torch.equal(outputs(model_graph, [x])[0], layer(x))
