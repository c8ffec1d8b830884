"""Calibration: one run of a graph over the user's samples, which shows passes the values that they ask for.

All samples advance together, from one value that is asked for to the next, so that memory holds the live values of one
place in the graph and what is made of them, however many layers there are.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import fx

from ..codegen.model_graph import ModelGraph, mutates, source_line
from ..runtime.errors import ConfigError, NumericalError
from ..runtime.freed_memory import return_freed_memory

Visit = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor] | None]
Progress = Callable[[int], AbstractContextManager[Callable[[str], None]]]


@contextlib.contextmanager
def silent(num_items: int) -> Iterator[Callable[[str], None]]:
    yield lambda name: None


Tensors = Mapping[str, torch.Tensor]


class MeasuredLayers(Protocol):
    """Keeps what was measured, by names, for a later run that would measure the same."""

    def read(self, name: str) -> Tensors | None: ...

    def write(self, name: str, tensors: Tensors) -> None: ...


@dataclass(frozen=True)
class Calibration:
    """Inputs of the graph by name, a mapping for each sample; how progress over layers is shown; what is kept."""

    samples: tuple[Mapping[str, Any], ...]
    progress: Progress = silent
    measured: MeasuredLayers | None = None

    def __post_init__(self) -> None:
        if not self.samples:
            raise ConfigError("calibration has no samples", field="calibration")


def stream(model_graph: ModelGraph, samples: Sequence[Mapping[str, Any]], visits: Mapping[fx.Node, Visit]) -> None:
    """Compute what ``visits`` asks for, and no more: each is called once, with its node's value for every sample.

    Calls are made in the graph's order and in its own dtypes; a value goes with its last reader, and what lies between
    two visits is in memory for one sample at a time. A weight that a visit replaces counts for all calls after it, and
    so do values that it returns in place of those that it was given.
    """
    needed = _needed([*visits, *filter(mutates, model_graph.graph.nodes)])
    nodes = [node for node in model_graph.graph.nodes if node in needed and not model_graph.is_weight(node)]
    expiring: dict[fx.Node, list[fx.Node]] = {}
    last_reader = {
        source: node for node in nodes for source in node.all_input_nodes if not model_graph.is_weight(source)
    }
    for source, reader in last_reader.items():
        expiring.setdefault(reader, []).append(source)
    environments: list[dict[fx.Node, Any]] = [{} for _ in samples]
    with torch.no_grad():
        for part in _parts_between(nodes, visits):
            for environment, sample in zip(environments, samples, strict=True):
                for node in part:
                    environment[node] = _value(model_graph, node, environment, sample)
                    for source in expiring.get(node, ()):
                        del environment[source]
            if part[-1] in visits:
                found = visits[part[-1]]([environment[part[-1]] for environment in environments])
                for environment, value in zip(environments, found or (), strict=found is not None):
                    environment[part[-1]] = value
                return_freed_memory()


def _parts_between(nodes: Sequence[fx.Node], visits: Mapping[fx.Node, Visit]) -> Iterator[Sequence[fx.Node]]:
    """The nodes in order, in parts that end with a visit each, but for the last, which may end without one."""
    part = []
    for node in nodes:
        part.append(node)
        if node in visits:
            yield part
            part = []
    if part:
        yield part


def _needed(wanted: Sequence[fx.Node]) -> set[fx.Node]:
    needed: set[fx.Node] = set()
    pending = list(wanted)
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
        return sample[node.name]

    def value_at(source: fx.Node) -> Any:
        return model_graph.weights[source.name] if model_graph.is_weight(source) else environment[source]

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_at)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def observe(
    model_graph: ModelGraph,
    calibration: Calibration,
    layers: Mapping[fx.Node, str],
    method: str,
    measure: Callable[[fx.Node, Sequence[torch.Tensor]], Tensors],
    visit: Callable[[fx.Node, Tensors], None],
) -> None:
    """Call ``visit`` with each of these nodes and what ``measure`` makes of its values [..., K].

    Nodes come in the graph's order, but those that ``calibration`` has kept come first, and are not measured again.
    ``method`` says what is measured, and with which settings: one name, then anything. ``layers`` names a layer that
    reads each node, for the progress shown and for NumericalError, which is raised for values that are not finite.
    """
    names = _names_to_keep(model_graph, calibration, layers, method)
    with calibration.progress(len(layers)) as begin:

        def checked(node: fx.Node, values: Sequence[torch.Tensor]) -> None:
            begin(layers[node])
            for number, value in enumerate(values):
                _require_finite(value, number, layers[node], node)
            tensors = measure(node, values)
            if calibration.measured is not None:
                calibration.measured.write(names[node], tensors)
            visit(node, tensors)

        left = []
        for node, layer in layers.items():
            kept = None if calibration.measured is None else calibration.measured.read(names[node])
            if kept is None:
                left.append(node)
            else:
                begin(layer)
                visit(node, kept)
        stream(model_graph, calibration.samples, {node: partial(checked, node) for node in left})


def _names_to_keep(
    model_graph: ModelGraph, calibration: Calibration, layers: Mapping[fx.Node, str], method: str
) -> dict[fx.Node, str]:
    """A name for what is measured at each node, of all that it depends on; none where nothing is kept."""
    if calibration.measured is None:
        return {}
    digest = hashlib.blake2b(f"{torch.__version__} {method} {model_graph.graph}".encode(), digest_size=8)
    for tensors in (model_graph.weights, *calibration.samples):
        for name, tensor in tensors.items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    place = f"{method.split()[0]}-{digest.hexdigest()}"
    return {node: f"{place}-{number:04d}-{layer}" for number, (node, layer) in enumerate(layers.items())}


def _require_finite(value: torch.Tensor, number: int, layer: str, node: fx.Node) -> None:
    if not value.isfinite().all():
        raise NumericalError(
            f"the input of {layer} is not finite in calibration sample {number}",
            where=source_line(node),
            remedy="leave the sample out, or use a dtype that holds the model's activations",
            field="calibration",
        )


def largest_of_channels(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """max |x| over all tokens for each channel of values [..., K], float32 [K]."""
    return torch.stack([value.abs().flatten(0, -2).amax(0).float() for value in values]).amax(0)


def largest_magnitude(values: Sequence[torch.Tensor], percentile: float | None) -> torch.Tensor:
    """float32 []: what no magnitude of values [..., K] is above, or what this percentile of them is at most."""
    if percentile is None:
        return torch.stack([value.abs().amax().float() for value in values]).amax()
    magnitudes = torch.cat([value.abs().flatten().float() for value in values])
    return magnitudes.kthvalue(max(1, math.ceil(len(magnitudes) * percentile / 100))).values


def power_mean_of_channels(values: Sequence[torch.Tensor], power: float) -> torch.Tensor:
    """(mean |x|^power)^(1 / power) over all tokens for each channel of values [..., K], float32 [K]."""
    largest = largest_of_channels(values)
    # Parts of the largest, so that no power overflows.
    divisor = torch.where(largest == 0, 1.0, largest)
    total, num_tokens = torch.zeros_like(largest), 0
    for value in values:
        rows = value.flatten(0, -2).abs().float() / divisor
        total += rows.pow(power).sum(0)
        num_tokens += len(rows)
    return (total / num_tokens).pow(1 / power) * largest


def range_of_channels(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """max x - min x over all tokens for each channel of values [..., K], float32 [K]."""
    rows = [value.flatten(0, -2) for value in values]
    highest = torch.stack([each.amax(0) for each in rows]).amax(0)
    return (highest.float() - torch.stack([each.amin(0) for each in rows]).amin(0).float()).abs()


def second_moment(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """2 X Xᵀ / tokens of values [..., K], float32 [K, K]: the Hessian of a linear's squared error, which GPTQ takes."""
    total, num_tokens = torch.zeros(values[0].shape[-1], values[0].shape[-1]), 0
    for value in values:
        rows = value.flatten(0, -2).float()
        total.addmm_(rows.t(), rows)
        num_tokens += len(rows)
    return total * (2 / num_tokens)


def some_tokens(values: Sequence[torch.Tensor], num_tokens: int) -> torch.Tensor:
    """At most so many rows of values [..., K], evenly spread: [tokens, K]."""
    rows = torch.cat([value.flatten(0, -2) for value in values])
    return rows[:: max(1, -(-len(rows) // num_tokens))]
