"""What the interpreter runs also compiles: kernels of drawn graphs in both dtypes, for a chip that is not here."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from codegen.cpp.test_kernels import Drawn, Quantized
from codegen.triton.interpreted_graphs import TwoOfFour, WeightOnly
from codegen.triton.interpreted_models import Paged, _paged_operands
from graph_testing import captured

from infercomp.codegen.grouping import Planner
from infercomp.codegen.specs import spec_name
from infercomp.codegen.triton.compile import compile_text
from infercomp.codegen.triton.emit_specs import emit_spec
from infercomp.passes.config import PassConfig
from infercomp.passes.pipeline import run_pipeline


def compile_all(module: torch.nn.Module, *inputs: torch.Tensor, target: str = "cuda:90") -> dict[str, int]:
    """Bytes of the binary of every kernel of a module."""
    model_graph = captured(module, *inputs)
    run_pipeline(model_graph, PassConfig())
    specs = {spec_name(group.spec): group.spec for group in Planner(model_graph, "triton").plan().groups}
    launches = [launch for name, spec in specs.items() for launch in emit_spec(spec, name).launches]
    return {launch.name: len(compile_text(launch.text, target).binary) for launch in launches}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drawn_graphs(dtype: torch.dtype) -> None:
    module = Drawn(24, 70, 3, 1).to(dtype).eval()
    mask = torch.rand(9, 9) > 0.3
    assert compile_all(module, torch.randn(2, 9, 24).to(dtype), torch.randint(0, 13, (2, 9)), mask)


@pytest.mark.slow
def test_integers() -> None:
    assert compile_all(Quantized(64, 50, 32), torch.randn(5, 64), torch.randint(0, 50, (5,)))
    assert compile_all(WeightOnly(1024, 64, 64).bfloat16(), torch.randn(5, 1024).bfloat16())


@pytest.mark.parametrize(
    "target",
    ["cuda:90", "hip:gfx942", *(pytest.param(each, marks=pytest.mark.slow) for each in ("cuda:80", "cuda:100"))],
)
def test_weights_of_which_two_in_every_four_are_kept(target: str) -> None:
    assert compile_all(TwoOfFour(1032, 64).bfloat16(), torch.randn(5, 1032).bfloat16(), target=target)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paged_attention_with_every_option(dtype: torch.dtype) -> None:
    module = Paged(torch.ones(6), torch.ones(6), scale=0.3, sliding_window=90, logit_softcap=2.0)
    operands = _paged_operands([3, 1], [70, 5], (6, 2, 20, 12))
    assert len(compile_all(module, *(x.to(dtype) if x.is_floating_point() else x for x in operands))) == 3
