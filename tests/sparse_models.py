"""What tests of sparse weights share: a small model through the passes up to its sparse form."""

from __future__ import annotations

import functools
from typing import Any

import torch
from graph_testing import copied
from small_llm import byte_model

from infercomp.codegen.model_graph import ModelGraph
from infercomp.passes.calibration import Calibration, stream
from infercomp.passes.config import PassConfig
from infercomp.passes.pipeline import PIPELINE, run_pipeline
from infercomp.passes.record import PassRecord
from infercomp.serving import capture_for_serving, position_limit

THROUGH = PIPELINE[: [each.name for each in PIPELINE].index("sparsify_linears") + 1]
TOKENS = torch.randint(0, 256, (600,), generator=torch.Generator().manual_seed(1))
CALIBRATION = Calibration(
    tuple({"input_ids": each[None], "position_ids": torch.arange(60)[None]} for each in TOKENS.split(60))
)


def counts(weight: torch.Tensor, m: int) -> torch.Tensor:
    """How many weights of each whole group are not zero."""
    return weight[:, : weight.shape[1] // m * m].unflatten(1, (-1, m)).ne(0).sum(-1)


def sparse(
    sparsity: Any, calibration: Calibration | None = CALIBRATION, in_float64: bool = False, **options: Any
) -> tuple[ModelGraph, PassRecord]:
    model_graph = copied(captured(in_float64))
    config = PassConfig(sparsity=sparsity, **options)
    records = run_pipeline(model_graph, config, pipeline=THROUGH, calibration=calibration)
    return model_graph, records[-1]


def of_layers(model_graph: ModelGraph) -> dict[str, torch.Tensor]:
    return {name: each for name, each in model_graph.weights.items() if each.dim() == 2 and "layers" in name}


def outputs(model_graph: ModelGraph) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    (logits,) = model_graph.output_node().args[0]
    stream(model_graph, CALIBRATION.samples[:1], {logits: lambda values: seen.extend(values)})
    return seen[0]


@functools.cache
def captured(in_float64: bool) -> ModelGraph:
    model = byte_model().double() if in_float64 else byte_model()
    return capture_for_serving(model, position_limit(model))[0]
