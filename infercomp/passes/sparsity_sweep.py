"""Which layers become sparse under a target density: those that cost the model least, each made sparse alone.

Layers that read one input are one unit. A unit's cost is the divergence of the next-token distributions from those of
the dense model, in nats, over the first tokens of the calibration data, with zeros by the score and no order of
channels. Units are taken by their cost for each weight that goes, until no more weights are left than wanted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import fx

from ..codegen.model_graph import ModelGraph
from .calibration import Calibration, Tensors, observe, second_moment, stream
from .n_m_sparsity import NM
from .quantizable_linears import parameters_of
from .sparse_masks import n_m_mask, scores_of

SWEEP_TOKENS = 512
Readers = Mapping[fx.Node, Sequence[fx.Node]]
"""Values, and the linears that read them."""


@dataclass(frozen=True)
class Unit:
    """So many weights, what it costs in nats to make them sparse, and whether they become so."""

    num_weights: int
    cost: float
    is_chosen: bool = False


def sweep(
    model_graph: ModelGraph, calibration: Calibration, readers: Readers, layers: Mapping[fx.Node, str], sparsity: NM
) -> dict[fx.Node, Unit]:
    """What each of ``readers`` costs; chosen are enough that ``sparsity.density`` of the weights of all is left."""
    masks = _masks(model_graph, calibration, readers, layers, sparsity)
    samples = _first_samples(calibration)
    dense = _log_probabilities(model_graph, samples)
    units: dict[fx.Node, Unit] = {}
    with calibration.progress(len(readers)) as begin:
        for source, kept in masks.items():
            begin(f"{layers[source]} alone")
            whole = {name: model_graph.weights[name] for name in kept}
            model_graph.weights.update({name: torch.where(kept[name], whole[name], 0) for name in kept})
            found = _log_probabilities(model_graph, samples)
            model_graph.weights.update(whole)
            cost = float(F.kl_div(found, dense, reduction="sum", log_target=True)) / len(dense)
            units[source] = Unit(sum(tensor.numel() for tensor in whole.values()), cost)
    assert sparsity.density is not None
    chosen = until_density(list(units.values()), sparsity.n / sparsity.m, sparsity.density)
    return {source: replace(unit, is_chosen=place in chosen) for place, (source, unit) in enumerate(units.items())}


def until_density(units: Sequence[Unit], kept: float, density: float) -> set[int]:
    """Positions of the units that become sparse, of each of which the part ``kept`` is left."""
    total = left = float(sum(unit.num_weights for unit in units))
    chosen: set[int] = set()
    for position in sorted(range(len(units)), key=lambda each: units[each].cost / units[each].num_weights):
        if left <= density * total * (1 + 1e-9):
            break
        chosen.add(position)
        left -= (1 - kept) * units[position].num_weights
    return chosen


def _masks(
    model_graph: ModelGraph, calibration: Calibration, readers: Readers, layers: Mapping[fx.Node, str], sparsity: NM
) -> dict[fx.Node, Tensors]:
    """For each value the weights of its linears, by name, that the score keeps: bool, as they lie."""

    def kept(source: fx.Node, values: Sequence[torch.Tensor]) -> Tensors:
        moment = second_moment(values) if sparsity.has_measured_score else None
        found: dict[str, torch.Tensor] = {}
        for node in readers[source]:
            weight, _, is_transposed = parameters_of(node)
            tensor = model_graph.weights[weight.name].detach()
            scores = scores_of(tensor.t() if is_transposed else tensor, moment, sparsity)
            mask = n_m_mask(scores, sparsity.n, sparsity.m)
            found[weight.name] = (mask.t() if is_transposed else mask).contiguous()
        return found

    masks: dict[fx.Node, Tensors] = {}
    observe(model_graph, calibration, layers, f"sparsity_sweep {sparsity.to_json()}", kept, masks.__setitem__)
    return masks


def _first_samples(calibration: Calibration) -> list[Mapping[str, torch.Tensor]]:
    """Whole samples, as many as make SWEEP_TOKENS tokens."""
    samples: list[Mapping[str, torch.Tensor]] = []
    num_tokens = 0
    for sample in calibration.samples:
        if num_tokens >= SWEEP_TOKENS:
            break
        samples.append(sample)
        num_tokens += next(iter(sample.values())).numel()
    return samples


def _log_probabilities(model_graph: ModelGraph, samples: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
    """Of the model's first output, over all tokens: float32 [tokens, vocabulary]."""
    rows: list[torch.Tensor] = []
    logits = model_graph.output_node().args[0][0]  # type: ignore[index]
    stream(model_graph, samples, {logits: lambda values: rows.extend(values)})
    return torch.cat([each.flatten(0, -2).float().log_softmax(-1) for each in rows])
