"""fuse_pointwise: chains of pointwise calls join while one call alone reads what lies between."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fusions import fused, kernels


def _chain(x: torch.Tensor) -> torch.Tensor:
    return torch.cos(torch.exp(x * 2.0))


def _shared(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.exp(x)
    return torch.cos(y), torch.sin(y)


def _through_a_sum(x: torch.Tensor) -> torch.Tensor:
    return torch.cos(torch.exp(x).sum(-1, keepdim=True) * x)


@pytest.mark.parametrize(
    ("function", "expected"),
    [(_chain, [["mul", "exp", "cos"]]), (_shared, []), (_through_a_sum, [["mul", "cos"]])],
)
def test_chains(function: Callable[..., object], expected: list[list[str]]) -> None:
    model_graph, record = fused(function, torch.randn(3, 4), passes=("fuse_pointwise",))
    assert kernels(model_graph) == expected
    assert record.max_error in (0.0, None)


def test_switched_off() -> None:
    model_graph, record = fused(_chain, torch.randn(3, 4), passes=("fuse_pointwise",), disable=("fuse_pointwise#1",))
    assert kernels(model_graph) == [["mul", "exp"]]
    assert record.skipped == 1
