"""The gather of token embeddings and the first norm become one kernel over rows.

x = embedding(table, ids); n = rms_norm(x, w)     ->  one kernel that stores x and n
"""

from __future__ import annotations

from ..codegen.model_graph import ModelGraph, aten
from ..codegen.ops import group_embedding, int8_embedding, layer_norm, rms_norm
from .fusion import fuse
from .graph_pass import BIT_IDENTICAL, Pass, PassContext

_EMBEDDINGS = frozenset((aten.embedding.default, int8_embedding.overload, group_embedding.overload))


def run(model_graph: ModelGraph, context: PassContext) -> None:
    for norm in model_graph.calls(rms_norm.overload, layer_norm.overload):
        rows = norm.args[0]
        if rows.target in _EMBEDDINGS:  # type: ignore[union-attr]
            fuse(model_graph, context, rows, norm)  # type: ignore[arg-type]


FUSE_EMBEDDING_NORM = Pass("fuse_embedding_norm", run, BIT_IDENTICAL, after=("recognize_norm",))
