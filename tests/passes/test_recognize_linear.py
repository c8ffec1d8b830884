"""recognize_linear: linear layers of both layouts, and no other product of matrices."""

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
    run_passes,
    text,
)
from torch import nn

from infercomp.codegen.ops import linear

PASSES = ("normalize", "recognize_linear")


class Conv1D(nn.Module):
    """GPT-2's linear layer: the weight is stored [K, N], rows are flattened around ``addmm``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 6))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:-1], self.weight.shape[1])
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(shape)


LAYERS = {
    "with bias": (lambda: nn.Linear(8, 6), "infercomp.linear.default](args = (%input, %p_weight, %p_bias)"),
    "no bias": (lambda: nn.Linear(8, 6, bias=False), "infercomp.linear.default](args = (%input, %p_weight)"),
    "Conv1D": (Conv1D, "(%x, %p_weight, %p_bias), kwargs = {transposed: True})"),
}


@pytest.mark.parametrize(("make", "expected"), LAYERS.values(), ids=LAYERS)
def test_fires(make: Callable[[], nn.Module], expected: str) -> None:
    layer, x = make().double(), torch.randn(2, 5, 8, dtype=torch.float64)
    model_graph = captured(layer, x, dynamic={0: 1})
    records = run_passes(model_graph, *PASSES, inputs=[x])
    assert (records[1].matches, records[1].near_misses) == (1, ())
    FileCheck().check_count("call_function", 1, exactly=True).check(expected).run(text(model_graph))
    for length in (2, 5, 9):
        assert_graph_agrees(model_graph, layer, [torch.randn(2, length, 8, dtype=torch.float64)])


@pytest.mark.parametrize("make", [make for make, _ in LAYERS.values()], ids=LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounds_like_eager(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    assert_rounds_like_eager(make(), [torch.randn(4, 16, 8, dtype=torch.float64)], dtype, *PASSES)


def test_addmm_on_rows_needs_no_reshape() -> None:
    layer, x = Conv1D().double(), torch.randn(5, 8, dtype=torch.float64)
    model_graph = captured(layer, x)
    run_passes(model_graph, *PASSES, inputs=[x])
    assert count(model_graph, linear) == 1
    assert_graph_agrees(model_graph, layer, [x])


def test_rows_that_are_used_twice_stay_rows() -> None:
    class TwoUses(Conv1D):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = torch.addmm(self.bias, x.view(-1, 8), self.weight)
            return rows.view(2, 5, 6) + rows.sum()

    layer, x = TwoUses().double(), torch.randn(2, 5, 8, dtype=torch.float64)
    model_graph = captured(layer, x)
    run_passes(model_graph, *PASSES, inputs=[x])
    FileCheck().check("reshape").check("linear.default](args = (%reshape").check("reshape").run(text(model_graph))
    assert_graph_agrees(model_graph, layer, [x])


def test_rows_that_are_reshaped_to_something_else_stay_rows() -> None:
    class OtherShape(Conv1D):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.addmm(self.bias, x.view(-1, 8), self.weight).view(5, 2, 6)

    layer, x = OtherShape().double(), torch.randn(2, 5, 8, dtype=torch.float64)
    model_graph = captured(layer, x)
    run_passes(model_graph, *PASSES, inputs=[x])
    assert count(model_graph, linear) == 1
    assert_graph_agrees(model_graph, layer, [x])


class _Near(nn.Module):
    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.vector = nn.Parameter(torch.randn(8))
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.weight, self.vector)


NEAR_MISSES = {
    "beta": (lambda x, w, v: torch.addmm(v, x, w, beta=2), "no alpha or beta"),
    "alpha": (lambda x, w, v: torch.addmm(v, x, w, alpha=0.5), "no alpha or beta"),
    "bias is a matrix": (lambda x, w, v: torch.addmm(w, x, w), "a bias [N]"),
    "weight is computed": (lambda x, w, v: torch.addmm(v, x, w * 2), "with a parameter [K, N]"),
    "both are activations": (lambda x, w, v: torch.addmm(v, x, x), "with a parameter [K, N]"),
    "weight is a vector": (lambda x, w, v: F.linear(x, v), "the weight has 1 dimensions"),
}


@pytest.mark.parametrize(("function", "reason"), NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_miss_is_left_and_recorded(function: Callable[..., torch.Tensor], reason: str) -> None:
    layer, x = _Near(function).double(), torch.randn(8, 8, dtype=torch.float64)
    model_graph = captured(layer, x)
    records = run_passes(model_graph, *PASSES, inputs=[x])
    assert records[1].matches == count(model_graph, linear) == 0
    (miss,) = records[1].near_misses
    assert reason in miss.reason
    assert_graph_agrees(model_graph, layer, [x])
