"""A residual addition and the norm after it become one kernel over rows.

h = x + y; n = rms_norm(h, w)     ->  one kernel that stores h and n
"""

from __future__ import annotations

from ..codegen.model_graph import ModelGraph, aten
from ..codegen.ops import layer_norm, rms_norm
from .fusion import fuse, kernel_of
from .graph_pass import BIT_IDENTICAL, Pass, PassContext


def run(model_graph: ModelGraph, context: PassContext) -> None:
    for norm in model_graph.calls(rms_norm.overload, layer_norm.overload):
        residual = norm.args[0]
        if residual.target != aten.add.Tensor:  # type: ignore[union-attr]
            continue
        if kernel_of(residual) != residual.name:  # type: ignore[arg-type, union-attr]
            context.near_miss(norm, f"{residual} is in the kernel of {kernel_of(residual)} already")  # type: ignore[arg-type]
        else:
            fuse(model_graph, context, residual, norm)  # type: ignore[arg-type]


FUSE_RESIDUAL_NORM = Pass("fuse_residual_norm", run, BIT_IDENTICAL, after=("recognize_norm", "fuse_linear_epilogue"))
