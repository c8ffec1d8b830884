"""How the loss of a graph bends in its weights: what HAWQ and Q-BERT choose bits by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ..codegen.model_graph import ModelGraph
from ..codegen.ops import definition_of
from .calibration import Calibration

Weights = Mapping[str, torch.Tensor]


def hessian_traces(
    model_graph: ModelGraph, calibration: Calibration, names: Sequence[str], num_probes: int, num_tokens: int
) -> dict[str, float]:
    """The trace of the loss's Hessian in each of these weights, by name (Hutchinson; HAWQ-V2, Dong et al. 2020).

    v'Hv for random signs v over all of them at once: what couples two layers has the mean zero. The mean over
    ``num_probes`` such v for the first ``num_tokens`` tokens of each sample.
    """
    generator = torch.Generator().manual_seed(0)
    totals = dict.fromkeys(names, 0.0)
    with calibration.progress(len(calibration.samples) * num_probes) as begin:
        for number, sample in enumerate(calibration.samples):
            weights, gradients = _gradients(model_graph, sample, names, num_tokens)
            for probe in range(num_probes):
                begin(f"trace: sample {number + 1}, probe {probe + 1}")
                signs = {n: torch.randint(0, 2, w.shape, generator=generator).to(w) * 2 - 1 for n, w in weights.items()}
                for name, product in _products(weights, gradients, signs).items():
                    totals[name] += float((product * signs[name]).sum())
    return {name: total / (len(calibration.samples) * num_probes) for name, total in totals.items()}


def largest_eigenvalues(
    model_graph: ModelGraph,
    calibration: Calibration,
    blocks: Mapping[str, Sequence[str]],
    num_iterations: int,
    num_tokens: int,
) -> dict[str, list[float]]:
    """The Hessian's eigenvalue of the largest magnitude in the weights of each block alone, for each sample.

    By power iteration from a random direction (HAWQ, Dong et al. 2019; Q-BERT, Shen et al. 2020).
    """
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[float]] = {block: [] for block in blocks}
    names = [name for block in blocks.values() for name in block]
    with calibration.progress(len(calibration.samples) * len(blocks)) as begin:
        for sample in calibration.samples:
            weights, gradients = _gradients(model_graph, sample, names, num_tokens)
            for block, own in blocks.items():
                begin(block)
                of_block = {name: weights[name] for name in own}
                found[block].append(_eigenvalue(of_block, gradients, num_iterations, generator))
    return found


def _eigenvalue(weights: Weights, gradients: Weights, num_iterations: int, generator: torch.Generator) -> float:
    direction = {name: torch.randn(each.shape, generator=generator).to(each) for name, each in weights.items()}
    value = 0.0
    for _ in range(num_iterations):
        length = math.sqrt(sum(float(each.square().sum()) for each in direction.values()))
        direction = {name: each / max(length, 1e-30) for name, each in direction.items()}
        product = _products(weights, gradients, direction)
        value = sum(float((product[name] * each).sum()) for name, each in direction.items())
        direction = product
    return value


def _products(weights: Weights, gradients: Weights, directions: Weights) -> dict[str, torch.Tensor]:
    """H v for each weight."""
    inner = sum(((gradients[name] * directions[name]).sum() for name in weights), torch.zeros(()))
    products = torch.autograd.grad(inner, list(weights.values()), retain_graph=True)
    return dict(zip(weights, products, strict=True))


def _gradients(
    model_graph: ModelGraph, sample: Mapping[str, Any], names: Sequence[str], num_tokens: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights in float32, and the loss's gradients in them, which have derivatives themselves."""
    shortened = {name: value[:, :num_tokens] for name, value in sample.items()}
    with torch.enable_grad():
        weights = {name: model_graph.weights[name].detach().float().requires_grad_() for name in names}
        loss = next_token_loss(model_graph, shortened, weights)
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    return weights, dict(zip(names, gradients, strict=True))


def next_token_loss(model_graph: ModelGraph, sample: Mapping[str, Any], weights: Weights) -> torch.Tensor:
    """The mean cross entropy in nats of the tokens of ``sample`` [1, T], with ``weights`` in place of the graph's."""
    values: dict[fx.Node, Any] = {}
    for node in model_graph.graph.nodes:
        if node.op == "placeholder":
            is_held = model_graph.is_weight(node) and node.name not in weights
            values[node] = (model_graph.weights if is_held else {**sample, **weights})[node.name]
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            op = definition_of(node.target)
            # The definitions are torch functions, which have derivatives; the ops that stand for them have none.
            values[node] = (node.target if op is None else op.definition)(*args, **kwargs)
    logits = values[model_graph.output_node().args[0][0]]  # type: ignore[index]
    return F.cross_entropy(logits[0, :-1].float(), sample["input_ids"][0, 1:])
