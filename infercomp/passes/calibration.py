"""Calibration: one run of a graph over the user's samples, which shows passes the values that they ask for.

All samples advance together, call by call, so that memory holds the live values of one place in the graph and what is
made of them, however many layers there are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..codegen.model_graph import ModelGraph, source_line
from ..runtime.errors import ConfigError, NumericalError

Visit = Callable[[Sequence[torch.Tensor]], None]
Progress = Callable[[int], AbstractContextManager[Callable[[str], None]]]


@contextlib.contextmanager
def _silent(num_items: int) -> Iterator[Callable[[str], None]]:
    yield lambda name: None


@dataclass(frozen=True)
class Calibration:
    """Inputs of the graph by name, a mapping for each sample, and how progress over layers is shown."""

    samples: tuple[Mapping[str, Any], ...]
    progress: Progress = _silent

    def __post_init__(self) -> None:
        if not self.samples:
            raise ConfigError("calibration has no samples", field="calibration")


def stream(model_graph: ModelGraph, samples: Sequence[Mapping[str, Any]], visits: Mapping[fx.Node, Visit]) -> None:
    """Compute what ``visits`` asks for, and no more: each is called once, with its node's value for every sample.

    Calls are made in the graph's order and in its own dtypes; a value goes with its last reader.
    """
    needed = _needed(visits)
    nodes = [node for node in model_graph.graph.nodes if node in needed]
    expiring: dict[fx.Node, list[fx.Node]] = {}
    last_reader = {source: node for node in nodes for source in node.all_input_nodes}
    for source, reader in last_reader.items():
        expiring.setdefault(reader, []).append(source)
    environments: list[dict[fx.Node, Any]] = [{} for _ in samples]
    with torch.no_grad():
        for node in nodes:
            for environment, sample in zip(environments, samples, strict=True):
                environment[node] = _value(model_graph, node, environment, sample)
            if node in visits:
                visits[node]([environment[node] for environment in environments])
            for environment in environments:
                for source in expiring.get(node, ()):
                    del environment[source]


def _needed(visits: Mapping[fx.Node, Visit]) -> set[fx.Node]:
    needed: set[fx.Node] = set()
    pending = list(visits)
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    return needed


def _value(
    model_graph: ModelGraph, node: fx.Node, environment: Mapping[fx.Node, Any], sample: Mapping[str, Any]
) -> Any:
    if node.op == "placeholder":
        return model_graph.weights[node.name] if model_graph.is_weight(node) else sample[node.name]
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), environment.__getitem__)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def largest_of_channels(
    model_graph: ModelGraph, calibration: Calibration, wanted: Mapping[fx.Node, str]
) -> dict[fx.Node, torch.Tensor]:
    """max |x| over all tokens of all samples for each channel, float32 [K], of nodes [..., K] that layers read.

    ``wanted`` names a layer for each node. Raises NumericalError, naming it, for a value that is not finite.
    """
    found: dict[fx.Node, torch.Tensor] = {}
    with calibration.progress(len(wanted)) as begin:

        def visit(node: fx.Node, values: Sequence[torch.Tensor]) -> None:
            begin(wanted[node])
            maxima = [value.abs().flatten(0, -2).amax(0).float() for value in values]
            for number, maximum in enumerate(maxima):
                if not maximum.isfinite().all():
                    raise NumericalError(
                        f"the input of {wanted[node]} is not finite in calibration sample {number}",
                        where=source_line(node),
                        remedy="leave the sample out, or use a dtype that holds the model's activations",
                        field="calibration",
                    )
            found[node] = torch.stack(maxima).amax(0)

        stream(model_graph, calibration.samples, {node: _bound(visit, node) for node in wanted})
    return found


def _bound(visit: Callable[[fx.Node, Sequence[torch.Tensor]], None], node: fx.Node) -> Visit:
    return lambda values: visit(node, values)
