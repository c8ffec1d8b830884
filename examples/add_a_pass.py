"""Write a pass of your own: two multiplications by numbers become one.

    y = x * 0.5 * 3.0        ->        y = x * 1.5

A pass is a rule (a pattern, a replacement, a guard) and a name; the frame counts, times and verifies it.
Run it: ``python examples/add_a_pass.py``
"""

from __future__ import annotations

import torch
from torch import fx, nn

from infercomp.capture import capture_export
from infercomp.codegen.model_graph import Emitter, ModelGraph, aten
from infercomp.passes.config import PassConfig
from infercomp.passes.graph_pass import Pass, PassContext
from infercomp.passes.pipeline import PIPELINE, run_pipeline
from infercomp.passes.rewriting import Bindings, Pattern, Rule, apply_rules


def _pattern(x: Pattern, first: Pattern, second: Pattern) -> Pattern:
    return x * first * second


def _replacement(emit: Emitter, x: fx.Node, first: float, second: float) -> fx.Node:
    return emit(aten.mul.Tensor, x, first * second)


def _both_are_numbers(bindings: Bindings, root: fx.Node) -> str | None:
    """None accepts the match; a text refuses it, and is shown in the report as a near miss."""
    factors = (bindings["first"], bindings["second"])
    return "a factor is a tensor" if any(isinstance(factor, fx.Node) for factor in factors) else None


RULES = (Rule("two_numbers", _pattern, _replacement, _both_are_numbers),)


def run(model_graph: ModelGraph, context: PassContext) -> None:
    apply_rules(RULES, model_graph, context)


MERGE_FACTORS = Pass("merge_factors", run, after=("normalize",))


class Scaled(nn.Module):
    """One place where the pass applies, and one that only looks like it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 0.5 * 3.0 + x * self.weight * 2.0


def main() -> None:
    inputs = {"x": torch.randn(1, 6, 8)}
    model_graph = capture_export(Scaled().eval(), inputs)
    pipeline = (*PIPELINE, MERGE_FACTORS)
    *_, record = run_pipeline(model_graph, PassConfig(verify=True), example_inputs=inputs, pipeline=pipeline)
    print(model_graph.graph)
    print(f"{record.name}: {record.matches} match, float64 error {record.max_error:.1e}")
    for miss in record.near_misses:
        print(f"not at {miss.where}: {miss.reason}")
    assert record.matches == 1
    assert record.near_misses


if __name__ == "__main__":
    main()
