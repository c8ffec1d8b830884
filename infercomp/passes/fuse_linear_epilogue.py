"""What follows a linear element by element becomes its epilogue: residual, scale, softcap, activation.

y = linear(x, w); z = residual + y     ->  one kernel that stores z only
"""

from __future__ import annotations

from torch import fx

from ..codegen.matmul_regions import LINEARS
from ..codegen.model_graph import ModelGraph
from .fusion import fuse, has_shape_of, is_pointwise, kernel_of, readers_of
from .graph_pass import BIT_IDENTICAL, Pass, PassContext


def run(model_graph: ModelGraph, context: PassContext) -> None:
    for product in [node for node in model_graph.graph.nodes if node.target in LINEARS]:
        last = _end_of_kernel(model_graph, product)
        while (following := _epilogue_of(last)) is not None and fuse(model_graph, context, product, following):
            last = following


def _end_of_kernel(model_graph: ModelGraph, product: fx.Node) -> fx.Node:
    """The last call of the kernel that the linear is in: a gated activation may have joined it."""
    mark = kernel_of(product)
    return [node for node in model_graph.graph.nodes if kernel_of(node) == mark][-1]


def _epilogue_of(node: fx.Node) -> fx.Node | None:
    """The one call that reads ``node``, if it is pointwise and keeps the shape."""
    readers = readers_of(node)
    if len(readers) != 1 or not is_pointwise(readers[0]) or not has_shape_of(readers[0], node):
        return None
    return readers[0]


FUSE_LINEAR_EPILOGUE = Pass("fuse_linear_epilogue", run, BIT_IDENTICAL, after=("fuse_gated_epilogue",))
