"""A norm writes its channels in the order in which they are read.

n = rms_norm(h, w); x = n[..., order]     ->  one kernel; n is stored only if something else reads it

Such orders are those of sparse weights and of channels sorted by range (``sparsify_linears``, ``split_channels``).
"""

from __future__ import annotations

from ..codegen.model_graph import ModelGraph, aten, value_of
from ..codegen.ops import layer_norm, rms_norm
from .fusion import fuse
from .graph_pass import BIT_IDENTICAL, Pass, PassContext

_NORMS = frozenset(op.overload for op in (rms_norm, layer_norm))


def run(model_graph: ModelGraph, context: PassContext) -> None:
    for gather in model_graph.calls(aten.index_select.default):
        norm, dim = gather.args[:2]
        if norm.target not in _NORMS:  # type: ignore[union-attr]
            continue
        if dim % value_of(norm).dim() != value_of(norm).dim() - 1:  # type: ignore[operator]
            context.near_miss(gather, "it gathers rows, not channels")
        elif len(norm.users) > 1:  # type: ignore[union-attr]
            context.near_miss(gather, "the norm is read in its own order too")
        else:
            fuse(model_graph, context, norm, gather)  # type: ignore[arg-type]


FUSE_NORM_GATHER = Pass("fuse_norm_gather", run, BIT_IDENTICAL, after=("fuse_residual_norm", "fuse_linear_epilogue"))
