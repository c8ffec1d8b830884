"""Families through ``torch.compile`` on generated kernels: eager's numbers, and few ops left to ATen."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, Family
from references import Float64Model, assert_errs_like_eager, tensors_of

from infercomp.backend import compile_dynamo
from infercomp.report import Report

# What has no kernel, by family: indices that may be negative, positions counted by cumsum, the patches of an image.
LEFT_TO_ATEN = {"falcon": {"aten.index"}, "roberta": {"aten.cumsum"}, "vit": {"aten.conv2d"}}
IN_EVERY_RUN = ("llama", "gemma2", "gpt2", "bloom")


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, id=name, marks=() if name in IN_EVERY_RUN else pytest.mark.slow)
        for name, family in FAMILIES.items()
    ],
)
def test_family_runs_on_kernels(family: Family) -> None:
    model, reports = family.build(family.attn_implementations[0]), []

    def backend(graph_module: torch.fx.GraphModule, inputs: list[torch.Tensor]):  # type: ignore[no-untyped-def]
        return compile_dynamo(graph_module, inputs, {"codegen": "cpp"}, reports.append)

    torch._dynamo.reset()
    inputs = family.example_inputs()
    with torch.inference_mode():
        eager = tensors_of(model(**inputs))
        found = tensors_of(torch.compile(model, backend=backend)(**inputs))
    for reference, one, other in zip(tensors_of(Float64Model(model)(**inputs)), eager, found, strict=True):
        assert_errs_like_eager(reference, one, other)
    assert _left(reports) == LEFT_TO_ATEN.get(family.name, set())


def _left(reports: list[Report]) -> set[str]:
    free = ("aten.sym_size", "infercomp.merge_weights")
    return {op for report in reports for op, how in report.ops.items() if how != "cpp" and op not in free}
