"""Add an op to the vocabulary, and the rule that finds it in models.

    y = relu(x) ** 2        ->        y = squared_relu(x)

An op is its definition in plain torch: its meaning, its fallback, and what a kernel for it would be tested
against. Run it: ``python examples/add_an_op.py``
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx, nn

from infercomp.capture import capture_export
from infercomp.codegen.lower import lower
from infercomp.codegen.model_graph import Emitter, ModelGraph, aten
from infercomp.codegen.ops import op
from infercomp.codegen.ops.op import like_first
from infercomp.passes.config import PassConfig
from infercomp.passes.graph_pass import Pass, PassContext
from infercomp.passes.pipeline import PIPELINE, run_pipeline
from infercomp.passes.rewriting import Pattern, Rule, apply_rules, call, square


@op("squared_relu(Tensor input) -> Tensor", fake=like_first)
def squared_relu(input: torch.Tensor) -> torch.Tensor:
    """max(input, 0)² (So et al. 2021), any shape."""
    return F.relu(input).square()


def _pattern(x: Pattern) -> Pattern:
    return square(call(aten.relu.default, x))


def _replacement(emit: Emitter, x: fx.Node) -> fx.Node:
    return emit(squared_relu, x)


RULES = (Rule("squared_relu", _pattern, _replacement),)


def run(model_graph: ModelGraph, context: PassContext) -> None:
    apply_rules(RULES, model_graph, context)


RECOGNIZE_SQUARED_RELU = Pass("recognize_squared_relu", run, after=("normalize",))


class MLP(nn.Module):
    """The MLP of a model that uses squared ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.relu(self.up(x)) ** 2)


def main() -> None:
    torch.manual_seed(0)
    model = MLP().eval().requires_grad_(False)
    inputs = {"x": torch.randn(1, 6, 8)}
    model_graph = capture_export(model, inputs)
    pipeline = (*PIPELINE, RECOGNIZE_SQUARED_RELU)
    *_, record = run_pipeline(model_graph, PassConfig(verify=True), example_inputs=inputs, pipeline=pipeline)
    program = lower(model_graph)
    print(f"{record.name}: {record.matches} match, float64 error {record.max_error:.1e}")
    for execution in program.ops:
        print(f"{execution.op} runs as {execution.how}")
    (output,) = program.bind(model_graph.weights)(inputs["x"])
    assert record.matches == 1
    assert torch.allclose(output, model(inputs["x"]))


if __name__ == "__main__":
    main()
