"""The gated activation becomes the epilogue of the merged gate/up product.

y = linear(x, w)                               ->  one kernel: the product is never stored, only
z = gated_activation(y[:, :n], y[:, n:], "silu")      z, and gate and up meet in registers
"""

from __future__ import annotations

from ..codegen.matmul_regions import LINEARS
from ..codegen.model_graph import ModelGraph
from ..codegen.ops import gated_activation
from .fusion import fuse, readers_of, sources_of
from .graph_pass import BIT_IDENTICAL, Pass, PassContext


def run(model_graph: ModelGraph, context: PassContext) -> None:
    for gate in model_graph.calls(gated_activation.overload):
        sources = set(sources_of(gate))
        product = next(iter(sources), None)
        if product is None or len(sources) != 1 or product.target not in LINEARS:
            context.near_miss(gate, "gate and up are not two halves of one linear")
        elif readers_of(product) != [gate]:
            context.near_miss(gate, f"{product.name} is also read elsewhere")
        else:
            fuse(model_graph, context, product, gate)


FUSE_GATED_EPILOGUE = Pass("fuse_gated_epilogue", run, BIT_IDENTICAL, after=("merge_linears", "recognize_gated_mlp"))
