"""Keys are rotated as they are written into the cache.

k = rotary_embedding(k, cos, sin); write_kv(k, v, …)     ->  one kernel; the rotated keys are stored once, in the cache
"""

from __future__ import annotations

from ..codegen.model_graph import ModelGraph
from ..codegen.ops import rotary_embedding, write_kv
from .fusion import fuse, readers_of, sources_of
from .graph_pass import BIT_IDENTICAL, Pass, PassContext


def run(model_graph: ModelGraph, context: PassContext) -> None:
    for write in model_graph.calls(write_kv.overload):
        for source in dict.fromkeys(sources_of(write)):
            if source.target != rotary_embedding.overload:
                continue
            if readers_of(source) == [write]:
                fuse(model_graph, context, source, write)
            else:
                context.near_miss(write, f"{source.name} is also read elsewhere")


FUSE_ROTARY_WRITE = Pass(
    "fuse_rotary_write", run, BIT_IDENTICAL, after=("quantize_kv_cache", "fuse_rope"), serving=True
)
