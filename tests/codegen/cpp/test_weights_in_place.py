"""Weights in place and packed: the same bits, no second copy, and changes in place of a caller's are seen."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graph_testing import captured
from torch import nn

from infercomp.codegen.config import CodegenConfig
from infercomp.codegen.lower import lower
from infercomp.codegen.ops import gated_activation, linear
from infercomp.passes.config import PassConfig
from infercomp.passes.pipeline import run_pipeline
from infercomp.runtime.program import Program

CHANNELS = 70
# Few rows, as many as are multiplied unpacked, one more, a tile and a bit, several blocks of tasks.
ROWS = (2, 4, 5, 13, 1200)


class Products(nn.Module):
    """Plain, gated with halves of one panel and of many, and [K, N] weights, of widths that fill no panel."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.wide = nn.Linear(CHANNELS, 45), nn.Linear(CHANNELS, 64, bias=False)
        self.gated, self.small_gated = nn.Linear(CHANNELS, 2 * 37), nn.Linear(CHANNELS, 2 * 16)
        self.columns = nn.Parameter(torch.randn(CHANNELS, 45))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            self.plain(x),
            F.relu(self.wide(x)),
            gated_activation(*self.gated(x).chunk(2, -1), "silu"),
            gated_activation(*self.small_gated(x).chunk(2, -1), "silu"),
            linear(x, self.columns, None, transposed=True),
        )


def _program(module: nn.Module, x: torch.Tensor, *, owns_weights: bool) -> tuple[Program, dict[str, torch.Tensor]]:
    model_graph = captured(module, x, dynamic={0: 0})
    model_graph.frozen = owns_weights
    run_pipeline(model_graph, PassConfig())
    return lower(model_graph, CodegenConfig(codegen="cpp")), model_graph.weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_in_place_give_the_bits_of_packed_ones(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = Products().to(dtype).eval()
    x = torch.randn(7, CHANNELS).to(dtype)
    packed, in_place = (_program(module, x, owns_weights=owns) for owns in (True, False))
    assert packed[0].packed_weights and not in_place[0].packed_weights
    bound = [program.bind(weights) for program, weights in (packed, in_place)]
    for num_rows in ROWS:
        rows = torch.randn(num_rows, CHANNELS).to(dtype)
        expected, found = (one(rows) for one in bound)
        for position, (one, other) in enumerate(zip(expected, found, strict=True)):
            assert torch.equal(one, other), (position, num_rows)
        # Without a row, so that this test fails too where both are wrong in the same way.
        assert torch.allclose(found[0].float(), module.plain(rows).float(), atol=0.05, rtol=0.05)


def test_a_change_in_place_is_seen() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 40), nn.SiLU(), nn.Linear(40, 3)).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="infercomp", options={"codegen": "cpp", "strict": True})
    x = torch.randn(5, 8)
    with torch.no_grad():
        first = compiled(x)
        model[3].weight.data.mul_(2.0)
        model[1].bias.zero_()
        torch.testing.assert_close(compiled(x), model(x))
        assert not torch.equal(compiled(x), first)
        model[3].weight.data = torch.randn(3, 40)
        torch.testing.assert_close(compiled(x), model(x), msg="other storage is seen too")


def test_what_is_only_packed_leaves_once_it_is() -> None:
    torch.manual_seed(0)
    module, x = Products().eval(), torch.randn(7, CHANNELS)
    program, weights = _program(module, x, owns_weights=True)
    given = dict(weights)
    released = program.bind_releasing(given)
    packed = {name for source in program.packed_weights for name in source.source_names}
    assert packed and not packed & set(given)
    assert set(weights) - packed == set(given), "a bias is read as it is"
    for one, other in zip(released(x), program.bind(weights)(x), strict=True):
        assert torch.equal(one, other)
