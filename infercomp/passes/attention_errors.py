"""What fewer heads cost each attention: the relative error of what it gives, on the unchanged model's activations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from ..codegen.model_graph import ModelGraph
from .calibration import stream
from .record import LayerError


class AttentionErrors:
    """The values of ``nodes`` before a rewrite, for every sample, next to those that take their places after it.

    ``samples`` are inputs of the graph; without any nothing is computed, and there are no errors.
    """

    def __init__(self, model_graph: ModelGraph, samples: Sequence[Mapping[str, Any]], nodes: Sequence[fx.Node]) -> None:
        self._model_graph = model_graph
        self._samples = samples
        self._exact: list[list[torch.Tensor]] = [[] for _ in nodes]
        if samples:
            visits = {node: partial(self._keep, place) for place, node in enumerate(nodes)}
            stream(model_graph, samples, visits)

    def _keep(self, place: int, values: Sequence[torch.Tensor]) -> None:
        self._exact[place] = list(values)

    def of(self, nodes: Sequence[fx.Node], layers: Sequence[str]) -> list[LayerError]:
        """The errors of ``nodes``, in the order of those that they stand for; each layer gets what it got before."""
        if not self._samples:
            return []
        errors: dict[int, float] = {}

        def visit(place: int, values: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
            exact = self._exact[place]
            of_errors = sum(_square(ours - own) for ours, own in zip(values, exact, strict=True))
            of_outputs = sum(map(_square, exact))
            errors[place] = math.sqrt(of_errors / of_outputs) if of_outputs else math.inf if of_errors else 0.0
            self._exact[place] = []
            return exact

        stream(self._model_graph, self._samples, {node: partial(visit, place) for place, node in enumerate(nodes)})
        return [LayerError(layer, errors[place]) for place, layer in enumerate(layers)]


def _square(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
