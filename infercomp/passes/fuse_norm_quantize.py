"""A norm and the quantisation of its result become one kernel over rows.

n = rms_norm(h, w); q = quantize_per_token(n)     ->  one kernel; n is stored only if something else reads it
"""

from __future__ import annotations

from ..codegen.matmul_regions import LINEARS
from ..codegen.model_graph import ModelGraph, aten
from ..codegen.ops import gated_activation, layer_norm, quantize_per_tensor, quantize_per_token, rms_norm
from .fusion import fuse, kernel_of
from .graph_pass import BIT_IDENTICAL, Pass, PassContext

_ROWWISE = frozenset(op.overload for op in (rms_norm, layer_norm, gated_activation))


def run(model_graph: ModelGraph, context: PassContext) -> None:
    products = {kernel_of(node) for node in model_graph.graph.nodes if node.target in LINEARS}
    for quantize in model_graph.calls(quantize_per_token.overload, quantize_per_tensor.overload):
        rows = quantize.args[0]
        # A norm may write its channels in another order.
        is_gathered = rows.target == aten.index_select.default and kernel_of(rows) != rows.name  # type: ignore[arg-type, union-attr]
        if rows.target not in _ROWWISE and not is_gathered:  # type: ignore[union-attr]
            continue
        if kernel_of(rows) in products:  # type: ignore[arg-type]
            context.near_miss(quantize, "a row of a matrix product is finished by several tasks")
        else:
            fuse(model_graph, context, rows, quantize)  # type: ignore[arg-type]


FUSE_NORM_QUANTIZE = Pass(
    "fuse_norm_quantize", run, BIT_IDENTICAL, after=("fuse_residual_norm", "fuse_linear_epilogue", "fuse_norm_gather")
)
