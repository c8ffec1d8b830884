"""Linear layers in the vocabulary, whatever their layout.

y = aten.linear(x, w, b)                                      ->  y = linear(x, w, b)
y = matmul(x, w.T)                                            ->  y = linear(x, w)
y = reshape(addmm(b, reshape(x, (-1, K)), w), (B, S, N))      ->  y = linear(x, w, b, transposed=True)
"""

from __future__ import annotations

from torch import fx

from ..codegen.model_graph import ModelGraph, aten, same_shape, shape_of, value_of
from ..codegen.ops import linear
from .graph_pass import Pass, PassContext


def _run_linear(model_graph: ModelGraph, context: PassContext, node: fx.Node) -> None:
    if value_of(node.args[1]).dim() != 2:
        context.near_miss(node, f"the weight has {value_of(node.args[1]).dim()} dimensions, expected 2")
        return
    site = context.claim(node)
    if site is not None:
        with model_graph.inserting_before(node) as emit:
            context.replace(site, node, emit(linear, *node.args))


def _run_addmm(model_graph: ModelGraph, context: PassContext, node: fx.Node) -> None:
    """``addmm(bias, x, weight)`` of a weight stored [K, N] (GPT-2's Conv1D), reshapes around it included."""
    bias, source, weight = node.args
    if not model_graph.is_weight(weight) or value_of(bias).dim() != 1 or node.kwargs:
        context.near_miss(node, "addmm is a linear layer only with a parameter [K, N], a bias [N] and no alpha or beta")
        return
    inner, root = source, node
    users = list(node.users)
    if source.target == aten.reshape.default and len(users) == 1 and users[0].target == aten.reshape.default:
        outer = (*shape_of(source.args[0])[:-1], value_of(weight).shape[1])
        if same_shape(shape_of(users[0]), outer):
            inner, root = source.args[0], users[0]
    site = context.claim(node)
    if site is not None:
        with model_graph.inserting_before(root) as emit:
            context.replace(site, root, emit(linear, inner, weight, bias, transposed=True))


def _run_matmul(model_graph: ModelGraph, context: PassContext, node: fx.Node) -> None:
    """A product with a parameter, as it is stored or transposed (Falcon); other products are no linear layers."""
    source, right = node.args
    is_turned = right.target == aten.permute.default and list(right.args[1]) == [1, 0]
    weight = right.args[0] if is_turned else right
    if not model_graph.is_weight(weight) or value_of(weight).dim() != 2 or value_of(source).dim() < 2:
        return
    site = context.claim(node)
    if site is not None:
        with model_graph.inserting_before(node) as emit:
            options = {} if is_turned else {"transposed": True}
            context.replace(site, node, emit(linear, source, weight, **options))


_SPELLINGS = {
    aten.linear.default: _run_linear,
    aten.addmm.default: _run_addmm,
    aten.matmul.default: _run_matmul,
    aten.mm.default: _run_matmul,
}


def run(model_graph: ModelGraph, context: PassContext) -> None:
    for node in model_graph.calls(*_SPELLINGS):
        _SPELLINGS[node.target](model_graph, context, node)
    model_graph.eliminate_dead_code()


RECOGNIZE_LINEAR = Pass("recognize_linear", run, after=("normalize",))
