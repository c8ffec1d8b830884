"""What the report says of kernels, what ``strict`` refuses, and what a compiler's refusal leads to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from graph_testing import captured
from small_llm import byte_model, make_llm
from torch import nn

from infercomp.codegen.config import CodegenConfig
from infercomp.codegen.cpp import toolchain
from infercomp.codegen.lower import lower
from infercomp.codegen.model_graph import ModelGraph
from infercomp.passes.config import PassConfig
from infercomp.passes.pipeline import pass_names, run_pipeline
from infercomp.report import Report, merged_report
from infercomp.runtime.errors import CompilerRefusedError, FallbackWarning, UnsupportedError

CPP = CodegenConfig(codegen="cpp")


class Cumulative(nn.Module):
    """A linear layer and a call that no kernel is generated for."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cumsum(self.linear(rows), -1) + 1


def cumulative_graph(mark: bool) -> ModelGraph:
    graph = captured(Cumulative(), torch.randn(3, 8))
    run_pipeline(graph, PassConfig(disable=tuple(name for name in pass_names() if name.startswith("fuse_"))))
    if mark:
        for node in graph.graph.nodes:
            if node.op == "call_function":
                node.meta["kernel"] = "planted"
    return graph


def test_a_call_without_a_kernel_and_a_group_taken_apart_are_in_the_report() -> None:
    program = lower(cumulative_graph(mark=True), CPP)
    report = Report((), program.ops, (), 1, program.kernel_uses, program.taken_apart)
    (refused,) = (execution for execution in report.executions if execution.reason)
    assert (refused.op, refused.how, refused.reason) == ("aten.cumsum", "aten", "no kernel is generated for it")
    (group,) = report.taken_apart
    assert group.ops[-2:] == ("aten.cumsum", "aten.add") and "test_kernel_accounts.py" in (group.where or "")
    assert sum(kernel.calls for kernel in report.kernels) == len(group.ops) - 1
    text = str(report)
    assert all(kernel.name in text for kernel in report.kernels)
    assert "groups taken apart" in text and "calls without a kernel" in text
    assert json.loads(report.to_json())["taken_apart"][0]["reason"] == group.reason


def test_equal_kernels_of_several_graphs_are_added() -> None:
    program = lower(cumulative_graph(mark=True), CPP)
    report = Report((), program.ops, (), 1, program.kernel_uses, program.taken_apart)
    merged = merged_report([report, report])
    assert [kernel.calls for kernel in merged.kernels] == [2 * kernel.calls for kernel in report.kernels]
    assert [group.count for group in merged.taken_apart] == [2]


def test_strict_names_the_call_that_has_no_kernel() -> None:
    with pytest.raises(UnsupportedError, match=r"aten\.cumsum \(cumsum\w*\): no kernel is generated") as caught:
        lower(cumulative_graph(mark=False), CPP, strict=True)
    assert "test_kernel_accounts.py" in (caught.value.where or "") and caught.value.remedy
    assert caught.value.field == "strict"
    lower(cumulative_graph(mark=False), CodegenConfig(codegen="reference"), strict=True)


def test_strict_takes_a_model_whose_every_call_has_a_kernel() -> None:
    report = make_llm(codegen="cpp", block_size=16, strict=True).report
    assert report.kernels and not report.fallbacks


def test_without_kernels_the_report_says_why_in_one_line() -> None:
    assert 'no kernels: codegen="reference"' in str(make_llm(codegen="reference").report)


@pytest.fixture
def refusing_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The real compiler behind a script that breaks every file that holds a matrix product."""
    script = tmp_path / "c++"
    real = toolchain.compiler()
    script.write_text(
        f"""#!/bin/sh
for argument; do
    case "$argument" in *unit_*.cpp) grep -q matmul_ "$argument" && echo 'int planted = "error";' >> "$argument" ;; esac
done
exec {real} "$@"
"""
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    toolchain.compiler.cache_clear()
    yield
    toolchain.compiler.cache_clear()


@pytest.mark.usefixtures("refusing_compiler")
def test_kernels_that_the_compiler_refuses_run_as_definitions(tmp_path: Path) -> None:
    options = {"codegen": "cpp", "block_size": 16, "cache_dir": str(tmp_path / "cache")}
    with pytest.warns(FallbackWarning, match="the C\\+\\+ compiler refused"):
        llm = make_llm(**options)
    (fallback,) = llm.report.fallbacks
    kept = next(line for line in fallback.splitlines() if "where:" in line).split()[-1]
    assert "planted" in fallback and 'int planted = "error";' in Path(kept).read_text()
    assert "cpp" not in llm.report.ops.values() and not llm.report.kernels
    assert any(kept in (execution.reason or "") for execution in llm.report.executions)
    assert torch.allclose(llm.logits([1, 2, 3]), byte_model()(torch.tensor([[1, 2, 3]])).logits[0], atol=1e-4)
    with pytest.raises(CompilerRefusedError, match="planted"):
        make_llm(**options, strict=True)


def test_a_compiled_model_passes_strict() -> None:
    family = FAMILIES["llama"]
    model = family.build("sdpa")
    with torch.inference_mode():
        torch.compile(model, backend="infercomp", options={"codegen": "cpp", "strict": True})(**family.example_inputs())
