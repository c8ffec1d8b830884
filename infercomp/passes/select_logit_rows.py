"""Only the rows that are sampled reach the LM head.

    logits = linear(norm(h), w)            ->  rows = index_select(norm(h), 1, logits_indices)
                                               logits = linear(rows, w)

The selection is put before the output and moved up through calls that treat rows one by one, to
above the last linear. Without the pass it stays at the output: the step's contract needs it there.
"""

from __future__ import annotations

import torch
from torch import fx

from ..codegen.model_graph import ModelGraph, aten, refresh_value, value_of
from ..codegen.ops import linear
from .graph_pass import Pass, PassContext
from .page_attention import _index_input

_MOVABLE = frozenset((linear.overload, aten._to_copy.default))


def _single_source(node: fx.Node) -> fx.Node | None:
    """The one operand with rows that a movable call reads, if nothing else reads that call."""
    pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    if node.op != "call_function" or not (node.target in _MOVABLE or pointwise) or len(node.users) != 1:
        return None
    if node.target == linear.overload:
        return node.args[0]  # type: ignore[return-value]
    tensors = [source for source in node.all_input_nodes if isinstance(value_of(source), torch.Tensor)]
    return tensors[0] if len(tensors) == 1 else None


def run(model_graph: ModelGraph, context: PassContext) -> None:
    indices = _index_input(model_graph, "logits_indices", 2)
    output = model_graph.output_node()
    logits = output.args[0][0]
    source, chain, head = logits, [], 0
    while (above := _single_source(source)) is not None:
        chain.append(source)
        head = len(chain) if source.target == linear.overload else head
        source = above
    chain = chain[:head]
    source = chain[-1].args[0] if chain else logits
    site = context.claim(logits)
    anchor = chain[-1] if chain and site is not None else output
    source = source if site is not None else logits
    with model_graph.inserting_before(anchor) as emit:
        rows = emit(aten.index_select.default, source, 1, indices)
    anchor.replace_input_with(source, rows)
    if site is not None:
        for node in reversed(chain):
            refresh_value(model_graph, node)
    previous = context.input_adapter
    assert previous is None
    context.input_adapter = lambda inputs: {
        **inputs, "logits_indices": torch.arange(inputs["input_ids"].shape[-1], device=inputs["input_ids"].device)
    }  # fmt: skip


SELECT_LOGIT_ROWS = Pass("select_logit_rows", run, after=("page_attention",), serving=True)
