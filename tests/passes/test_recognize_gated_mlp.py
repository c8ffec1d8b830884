"""recognize_gated_mlp: activation(gate) * up for every activation, and no other product."""

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

from infercomp.codegen.ops import gated_activation

Combine = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
PASSES = ("normalize", "recognize_gated_mlp")

SPELLINGS = {
    "silu": (lambda gate, up: F.silu(gate) * up, "silu"),
    "up first": (lambda gate, up: up * F.silu(gate), "silu"),
    "gelu": (lambda gate, up: F.gelu(gate) * up, "gelu"),
    "gelu, tanh": (lambda gate, up: F.gelu(gate, approximate="tanh") * up, "gelu_tanh"),
    "relu": (lambda gate, up: F.relu(gate) * up, "relu"),
    "sigmoid": (lambda gate, up: torch.sigmoid(gate) * up, "sigmoid"),
    "in float32": (lambda gate, up: F.silu(gate.float()).type_as(gate) * up, "silu"),
}


def _inputs(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [torch.randn(2, 5, 8, dtype=dtype) * 3, torch.randn(2, 5, 8, dtype=dtype)]


@pytest.mark.parametrize(("spelling", "activation"), SPELLINGS.values(), ids=SPELLINGS)
def test_fires(spelling: Combine, activation: str) -> None:
    inputs = _inputs()
    model_graph = captured(spelling, *inputs, dynamic={0: 1, 1: 1})
    records = run_passes(model_graph, *PASSES, inputs=inputs)
    assert (records[1].matches, records[1].near_misses) == (1, ())
    assert records[1].max_error < 1e-9
    FileCheck().check_count("call_function", 1, exactly=True).check(f"(%gate, %up, {activation})").run(
        text(model_graph)
    )
    assert_graph_agrees(model_graph, spelling, inputs, 1e-6 if spelling is SPELLINGS["in float32"][0] else 1e-9)


@pytest.mark.parametrize("spelling", [each for each, _ in SPELLINGS.values()], ids=SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounds_like_eager(spelling: Combine, dtype: torch.dtype) -> None:
    assert_rounds_like_eager(spelling, _inputs(), dtype, *PASSES)


def test_wider_up_is_not_rounded_to_the_gate() -> None:
    gate, up = torch.randn(4, 64, dtype=torch.bfloat16), torch.randn(4, 64)
    model_graph = captured(lambda gate, up: F.silu(gate.float()) * up, gate, up)
    run_passes(model_graph, *PASSES, inputs=[gate, up])
    assert count(model_graph, gated_activation) == 1
    assert_graph_agrees(model_graph, lambda gate, up: F.silu(gate.float()) * up, [gate, up], 1e-6)


NEAR_MISSES = {
    "a number": (lambda gate, up: F.silu(gate) * 2, "multiplied by a number"),
    "up of another shape": (lambda gate, up: F.silu(gate) * up[..., :1], "gate is"),
    "gate of another shape": (lambda gate, up: F.silu(gate[:, :1]) * up, "gate is"),
}


@pytest.mark.parametrize(("spelling", "reason"), NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_miss_is_left_and_recorded(spelling: Combine, reason: str) -> None:
    inputs = _inputs()
    model_graph = captured(spelling, *inputs)
    records = run_passes(model_graph, *PASSES, inputs=inputs)
    assert records[1].matches == count(model_graph, gated_activation) == 0
    (miss,) = records[1].near_misses
    assert reason in miss.reason
    assert_graph_agrees(model_graph, spelling, inputs)


@pytest.mark.parametrize(
    "other",
    [
        lambda gate, up: F.silu(gate) + up,
        lambda gate, up: F.silu(gate) / up,
        lambda gate, up: F.softplus(gate) * up,
        lambda gate, up: F.leaky_relu(gate) * up,
        lambda gate, up: gate * up,
    ],
)
def test_other_products_are_left(other: Combine) -> None:
    inputs = _inputs()
    model_graph = captured(other, *inputs)
    records = run_passes(model_graph, *PASSES, inputs=inputs)
    assert records[1].matches == 0
    assert_graph_agrees(model_graph, other, inputs)


def test_activation_that_is_used_again_stays() -> None:
    def again(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        active = F.silu(gate)
        return active * up + active.exp()

    inputs = _inputs()
    model_graph = captured(again, *inputs)
    run_passes(model_graph, *PASSES, inputs=inputs)
    FileCheck().check("silu.default").check("gated_activation").run(text(model_graph))
    assert_graph_agrees(model_graph, again, inputs)


def test_two_activations_make_one_gate() -> None:
    def both(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return F.silu(gate) * torch.sigmoid(up)

    inputs = _inputs()
    model_graph = captured(both, *inputs)
    run_passes(model_graph, *PASSES, inputs=inputs)
    FileCheck().check("sigmoid").check("(%gate, %sigmoid, silu)").run(text(model_graph))
    assert_graph_agrees(model_graph, both, inputs)
