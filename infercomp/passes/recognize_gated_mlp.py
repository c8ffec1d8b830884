"""Gated MLP activations in the vocabulary.

y = silu(gate) * up          ->  y = gated_activation(gate, up, "silu")
y = gelu(gate, "tanh") * up  ->  y = gated_activation(gate, up, "gelu_tanh")
"""

from __future__ import annotations

from torch import fx

from ..codegen.model_graph import Emitter, ModelGraph, aten, same_shape, shape_of
from ..codegen.ops import gated_activation
from .graph_pass import Pass, PassContext
from .rewriting import Bindings, Pattern, Rule, apply_rules, call


def _gate(bindings: Bindings, root: fx.Node) -> str | None:
    gate, up = bindings["gate"], bindings["up"]
    if not isinstance(up, fx.Node):
        return "the activation is multiplied by a number"
    if not same_shape(shape_of(gate), shape_of(up)):
        return f"gate is {shape_of(gate)} and up {shape_of(up)}"
    return None


def _rule(activation: str, activate: object) -> Rule:
    def pattern(gate: Pattern, up: Pattern) -> Pattern:
        return activate(gate) * up  # type: ignore[operator]

    def replacement(emit: Emitter, gate: fx.Node, up: fx.Node) -> fx.Node:
        return emit(gated_activation, gate, up, activation)

    return Rule(activation, pattern, replacement, _gate)


RULES = (
    _rule("silu", lambda gate: call(aten.silu.default, gate)),
    _rule("gelu_tanh", lambda gate: Pattern("gelu", (aten.gelu.default,), (gate,), options={"approximate": "tanh"})),
    _rule("gelu", lambda gate: call(aten.gelu.default, gate)),
    _rule("relu", lambda gate: call(aten.relu.default, gate)),
    _rule("sigmoid", lambda gate: call(aten.sigmoid.default, gate)),
)


def run(model_graph: ModelGraph, context: PassContext) -> None:
    apply_rules(RULES, model_graph, context)


RECOGNIZE_GATED_MLP = Pass("recognize_gated_mlp", run, after=("normalize",))
