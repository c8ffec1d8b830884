"""The C++ text of one kernel a family, kept in golden/: what a change of an emitter does is seen in review."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from codegen.cpp.golden_models import graph_of, group_of, models
from graph_testing import captured

from infercomp.codegen.cpp.emit import emit_units
from infercomp.codegen.grouping import Planner
from infercomp.codegen.kernel_set import origin_of
from infercomp.codegen.specs import spec_name
from infercomp.passes.config import PassConfig
from infercomp.passes.pipeline import run_pipeline

FOLDER = Path(__file__).parent / "golden"
NAMES = (
    "attention", "loop_reduction", "matmul_bfloat16", "matmul_float32", "matmul_int4", "matmul_int8",
    "matmul_sparse", "paged_attention", "paged_attention_int8", "write_kv", "write_kv_int8",
)  # fmt: skip


def kernel_text(name: str) -> str:
    group = group_of(graph_of(name))
    kernel = spec_name(group.spec)
    (text,) = emit_units({kernel: group.spec}, {kernel: origin_of(group)}, 1)
    return text


@pytest.mark.parametrize("name", NAMES)
def test_text_is_the_accepted_one(name: str) -> None:
    path, text = FOLDER / f"{name}.cpp", kernel_text(name)
    if os.environ.get("INFERCOMP_ACCEPT_GOLDEN") == "1":
        path.write_text(text)
    assert path.read_text() == text, "set INFERCOMP_ACCEPT_GOLDEN=1 to accept the new text"


@pytest.mark.parametrize("name", NAMES)
def test_the_header_says_where_the_kernel_came_from(name: str) -> None:
    header = [line for line in kernel_text(name).splitlines() if line.startswith("// ")]
    assert any(line.startswith("// ops: infercomp.") for line in header)
    assert any(line.startswith("// nodes: ") for line in header)
    assert any(line.startswith("// operands: b0 = ") for line in header)
    assert any("golden_models.py:" in line for line in header)


def test_no_golden_file_is_left_over() -> None:
    assert sorted(path.name for path in FOLDER.iterdir()) == [f"{name}.cpp" for name in NAMES]
    assert sorted(models()) == sorted(NAMES)


def test_the_header_names_the_pass_that_fused() -> None:
    class Residual(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(32, 32)

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return rows + self.linear(rows)

    model_graph = captured(Residual(), torch.randn(3, 32))
    run_pipeline(model_graph, PassConfig())
    (group,) = Planner(model_graph).plan().groups
    assert "fused by: fuse_linear_epilogue" in origin_of(group)
