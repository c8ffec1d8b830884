"""``spec -> launches``: the specs of ``codegen.specs`` as Triton."""

from __future__ import annotations

from ..specs import AttentionSpec, KernelSpec, LoopSpec, MatmulSpec
from .emit_attention import emit_attention, emit_paged_attention
from .emit_loops import emit_loop
from .emit_matmul import emit_matmul
from .kernel_text import Emitted


def emit_spec(spec: KernelSpec, name: str) -> Emitted:
    """The kernels of one spec; raises Refused for one that has no Triton form."""
    if isinstance(spec, LoopSpec):
        return emit_loop(spec, name)
    if isinstance(spec, MatmulSpec):
        return emit_matmul(spec, name)
    return emit_attention(spec, name) if isinstance(spec, AttentionSpec) else emit_paged_attention(spec, name)
