"""A program with inputs bound once gives what it gives when they are passed, in steps and between them."""

from __future__ import annotations

import pytest
import torch
from graph_testing import captured
from torch import nn

from infercomp.codegen.config import CodegenConfig
from infercomp.codegen.lower import lower
from infercomp.runtime.native_step import NativeStep
from infercomp.runtime.program import BoundProgram


class _TwoSteps(nn.Module):
    """A call without a kernel (cumsum) cuts the graph into two steps and reads a weight and an input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 40), nn.Linear(40, 3)
        self.offset = nn.Parameter(torch.randn(40))

    def forward(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        middle = torch.cumsum(self.first(x) * y, 0) + torch.cumsum(self.offset, 0)
        return self.second(middle) + torch.cumsum(z, 0)


@pytest.fixture(scope="module")
def bound() -> BoundProgram:
    torch.manual_seed(0)
    module = _TwoSteps().eval()
    model_graph = captured(module, torch.randn(7, 8), torch.randn(7, 40), torch.randn(3), dynamic={0: 0, 1: 0})
    program = lower(model_graph, CodegenConfig(codegen="cpp"))
    assert sum(isinstance(step, NativeStep) for step in program.steps) > 1
    return program.bind(model_graph.weights)


@pytest.mark.parametrize("fixed", [(), (1,), (2,), (0, 2), (1, 2)])
def test_bound_inputs_give_the_bits_of_passed_ones(bound: BoundProgram, fixed: tuple[int, ...]) -> None:
    names = bound.program.input_names
    given = [torch.randn(5, 8), torch.randn(40, 5).t(), torch.randn(3)]
    function = bound.with_inputs({names[i]: given[i] for i in fixed})
    for num_rows in (5,) if {0, 1} & set(fixed) else (5, 9):
        if num_rows != 5:
            given = [torch.randn(num_rows, 8), torch.randn(num_rows, 40), given[2]]
        (expected,) = bound(*given)
        (found,) = function(*(value for i, value in enumerate(given) if i not in fixed))
        assert torch.equal(expected, found)


def test_a_change_in_place_of_what_is_bound_is_seen(bound: BoundProgram) -> None:
    x, y, z = torch.randn(5, 8), torch.randn(5, 40), torch.zeros(3)
    function = bound.with_inputs({bound.program.input_names[1]: y})
    before = function(x, z)[0].clone()
    y.mul_(2)
    assert torch.equal(function(x, z)[0], bound(x, y, z)[0])
    assert not torch.equal(function(x, z)[0], before)


def test_the_same_step_is_timed_wherever_it_is_bound(bound: BoundProgram) -> None:
    x, y, z = torch.randn(5, 8), torch.randn(5, 40), torch.zeros(3)
    function = bound.with_inputs({bound.program.input_names[1]: y})
    step = bound.program.steps[0]
    with step.timed() as timings:
        function(x, z)
        bound(x, y, z)
    function(x, z)
    assert len(timings) == 2 and all(len(timing.call_nanoseconds) == len(step.calls) for timing in timings)
