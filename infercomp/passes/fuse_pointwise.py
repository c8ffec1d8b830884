"""Chains of pointwise calls become one kernel.

a = x * y; b = cos(a)     ->  one kernel that stores b, and a only if something else reads it
"""

from __future__ import annotations

from torch import fx

from ..codegen.model_graph import ModelGraph
from ..codegen.view_ops import MOVES
from .fusion import fuse, is_pointwise, kernel_of, readers_of, sources_of
from .graph_pass import BIT_IDENTICAL, Pass, PassContext


def run(model_graph: ModelGraph, context: PassContext) -> None:
    chains: set[str] = set()
    for node in model_graph.graph.nodes:
        if not _is_loop(node) or kernel_of(node) != node.name:
            continue
        for source in dict.fromkeys(sources_of(node)):
            is_free = kernel_of(source) == source.name or kernel_of(source) in chains
            if (
                _is_loop(source)
                and is_free
                and readers_of(source) == [node]
                and fuse(model_graph, context, source, node)
            ):
                chains.add(kernel_of(node))


def _is_loop(node: fx.Node) -> bool:
    return is_pointwise(node) or node.target in MOVES


FUSE_POINTWISE = Pass(
    "fuse_pointwise", run, BIT_IDENTICAL, after=("fuse_linear_epilogue", "fuse_residual_norm", "fuse_embedding_norm")
)
