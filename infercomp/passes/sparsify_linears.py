"""Weights of linears become sparse in place: N of every M consecutive input channels are kept, the others are zeros.

    y = linear(x, w)    ->    y = linear(x, w')        w' = mask * w, or what SparseGPT makes of the kept ones

    y = linear(x, w)    ->    y = linear(x[order], mask * w[:, order])                with ``permute``

    y = down(act(gate(x)) * up(x))    ->    the same with the rows of gate and up in the order that down wants

Does nothing unless the option ``sparsity`` says which are kept: ``NM(2, 4, score="wanda")``. The LM head stays dense.
With ``permute`` the order of input channels is searched that keeps most, one for all linears of one input. It is folded
into what makes the input where that is free (``order_folds``); elsewhere the input is gathered in it. ``layers`` names
those that may become sparse; with a ``density`` only those of them do that cost least when each is made sparse alone.
The pass comes before weights are smoothed and rounded: a grid with a code for zero keeps zeros as they are. It needs
weights that the graph owns (``frozen``). Layers are taken in the graph's order, and each sees what those before it have
become.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import fx

from ..codegen.model_graph import ModelGraph, aten, value_of
from ..runtime.errors import ConfigError
from .calibration import Tensors, observe, second_moment
from .config import nearest_name
from .graph_pass import NumericClass, Pass, PassContext
from .linear_recipes import GOBO, W8A16, Recipe, fits
from .n_m_sparsity import NM
from .order_folds import OrderFold, order_fold
from .producing_linears import NoProducerError, Producers
from .quantizable_linears import QuantizableLinears, parameters_of
from .rounding import GPTQ
from .sparse_masks import masked, scores_of, sparsegpt
from .sparsity_sweep import sweep

# What the model computes is another function: its distance is for the report.
SPARSIFICATION = NumericClass("lossy", math.inf)
CHANNEL_ORDER = "_channel_order"
"""What is put behind the name of a linear's input for the order in which its channels are read."""
_ORDER = "order"


def run(model_graph: ModelGraph, context: PassContext) -> None:
    sparsity = context.config.nm
    if sparsity is None:
        return
    _check(model_graph, context, sparsity)
    # Weights that could be rounded are those that may change: parameters that nothing else reads.
    linears = QuantizableLinears(model_graph, context, W8A16())
    candidates = _candidates(model_graph, context, linears, sparsity)
    layers = {source: linears.names[nodes[0]][0][0] for source, nodes in candidates.items()}
    if sparsity.density is not None and context.calibration is not None:
        candidates = _swept(model_graph, context, candidates, layers, sparsity)
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in linears.names:
        site = context.claim(node) if node in candidates.get(node.args[0], ()) else None  # type: ignore[arg-type]
        if site is not None:
            site.replaced[node.name] = node.name
            readers.setdefault(node.args[0], []).append(node)  # type: ignore[arg-type]

    sparsifier = _Sparsifier(model_graph, context, sparsity, readers)
    if context.calibration is None or not sparsity.has_measured_score:
        with context.progress(len(readers)) as begin:
            for source, nodes in readers.items():
                begin(layers[source])
                sparsifier.take(source, sparsifier.pruned(nodes, None))
    else:
        observe(
            model_graph,
            context.calibration,
            {source: layers[source] for source in readers},
            f"sparsify_linears {sparsity.to_json()} {sparsifier.described_folds()}",
            lambda source, values: sparsifier.pruned(readers[source], second_moment(values)),
            sparsifier.take,
        )
    sparsifier.permute()


def _candidates(
    model_graph: ModelGraph, context: PassContext, linears: QuantizableLinears, sparsity: NM
) -> dict[fx.Node, list[fx.Node]]:
    """By what they read, the linears that may become sparse."""
    unused = [
        pattern for pattern in sparsity.layers if not any(fits(pattern, own[0]) for own in linears.names.values())
    ]
    if unused:
        nearest = nearest_name(unused[0], (name for own in linears.names.values() for name in own[0]))
        what = f"layers names no linear: {unused[0]!r}"
        raise ConfigError(what, remedy=f"the nearest is {nearest}", field="layers")
    found: dict[fx.Node, list[fx.Node]] = {}
    for node, names in linears.names.items():
        if node not in linears.chosen or linears.is_head(node):
            context.near_miss(node, linears.reasons.get(node, "it is the LM head, which stays dense"))
        elif not any(fits(pattern, names[0]) for pattern in sparsity.layers):
            context.near_miss(node, "none of the patterns in layers fits it")
        else:
            _check_channels(model_graph, node, names[0][0], sparsity)
            found.setdefault(node.args[0], []).append(node)  # type: ignore[arg-type]
    return found


def _swept(
    model_graph: ModelGraph,
    context: PassContext,
    candidates: Mapping[fx.Node, list[fx.Node]],
    layers: Mapping[fx.Node, str],
    sparsity: NM,
) -> dict[fx.Node, list[fx.Node]]:
    """Those that a sweep finds to cost least; why the others stay dense is said."""
    assert context.calibration is not None
    units = sweep(model_graph, context.calibration, candidates, layers, sparsity)
    for source, unit in units.items():
        if not unit.is_chosen:
            reason = f"alone it costs {unit.cost:.2g} nats, and others less for the density {sparsity.density}"
            context.near_miss(candidates[source][0], reason)
    return {source: candidates[source] for source, unit in units.items() if unit.is_chosen}


class _Sparsifier:
    """Makes the weights of one graph's linears sparse, and then puts channels into the order in which they are N:M."""

    def __init__(
        self, model_graph: ModelGraph, context: PassContext, sparsity: NM, readers: Mapping[fx.Node, list[fx.Node]]
    ) -> None:
        self._model_graph = model_graph
        self._sparsity = sparsity
        self._readers = readers
        self._orders: dict[fx.Node, torch.Tensor] = {}
        self._folds: dict[fx.Node, OrderFold] = {}
        producers = Producers(model_graph)
        for source, nodes in readers.items() if sparsity.search is not None else ():
            try:
                self._folds[source] = order_fold(model_graph, producers, source, nodes, sparsity.m)
            except NoProducerError as error:
                context.near_miss(nodes[0], f"its input is gathered in order: {error}")

    def described_folds(self) -> list[str]:
        """What of the folds the orders depend on."""
        return [f"{source.name} {each.num_heads} {each.num_repeats}" for source, each in self._folds.items()]

    def pruned(self, readers: Sequence[fx.Node], moment: torch.Tensor | None) -> Tensors:
        """The sparse weights of linears that read one input, channels where they were, and the order, if any."""
        rows = {node: self._rows(node) for node in readers}
        order = torch.arange(rows[readers[0]].shape[1])
        if self._sparsity.search is not None:
            scores = torch.cat([scores_of(each, moment, self._sparsity) for each in rows.values()])
            fold = self._folds.get(readers[0].args[0], OrderFold(()))  # type: ignore[arg-type]
            order = fold.search(scores, (self._sparsity.n, self._sparsity.m), self._sparsity.search)
        found: dict[str, torch.Tensor] = {_ORDER: order}
        for node, weight in rows.items():
            of_order = None if moment is None else moment[order][:, order]
            prune = sparsegpt if self._sparsity.score == "sparsegpt" else masked
            sparse = prune(weight[:, order], of_order, self._sparsity)[:, order.argsort()]  # type: ignore[operator]
            name, is_transposed = _weight_of(node)
            found[name] = (sparse.t() if is_transposed else sparse).contiguous()
        return found

    def take(self, source: fx.Node, found: Tensors) -> None:
        self._orders[source] = found[_ORDER]
        self._model_graph.weights.update({name: each for name, each in found.items() if name != _ORDER})

    def permute(self) -> None:
        """Where an order was searched, linears read their input in it, and their weights' channels are in it."""
        if self._sparsity.search is None:
            return
        for source, nodes in self._readers.items():
            order = self._orders[source]
            for node in nodes:
                name, is_transposed = _weight_of(node)
                weight = self._model_graph.weights[name]
                self._model_graph.weights[name] = weight.index_select(0 if is_transposed else 1, order)
            if source in self._folds:
                self._folds[source].apply(self._model_graph, order)
            else:
                self._gather(source, nodes, order)

    def _gather(self, source: fx.Node, nodes: Sequence[fx.Node], order: torch.Tensor) -> None:
        with self._model_graph.inserting_before(min(nodes)) as emit:
            dim, constant = value_of(source).dim() - 1, self._constant(f"{source.name}{CHANNEL_ORDER}", order)
            permuted = emit(aten.index_select.default, source, dim, constant)
        for node in nodes:
            node.replace_input_with(source, permuted)

    def _rows(self, node: fx.Node) -> torch.Tensor:
        name, is_transposed = _weight_of(node)
        tensor = self._model_graph.weights[name].detach()
        return tensor.t() if is_transposed else tensor

    def _constant(self, name: str, tensor: torch.Tensor) -> fx.Node:
        with self._model_graph.fake_mode:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        return self._model_graph.add_placeholder(name, fake, weight=tensor)


def _weight_of(node: fx.Node) -> tuple[str, bool]:
    """The name of a linear's weight, and whether it lies [K, N]."""
    weight, _, is_transposed = parameters_of(node)
    return weight.name, is_transposed


def _check(model_graph: ModelGraph, context: PassContext, sparsity: NM) -> None:
    if not model_graph.frozen:
        what = "sparsity changes weights, and those of torch.compile are the user's"
        raise ConfigError(what, remedy="use LLM", field="sparsity")
    if sparsity.needs_calibration and context.calibration is None:
        what = f"sparsity with the score {sparsity.score} needs samples of text to see what the layers' inputs are"
        raise ConfigError(what, remedy="LLM(..., calibration=texts)", field="calibration")
    if context.config.recipe is not None and not _keeps_zeros(context.config.recipe):
        what = (
            "GPTQ changes the weights that it has not rounded yet, and GOBO has no code for zero: zeros would be lost"
        )
        raise ConfigError(what, remedy="round to nearest, such as w8a8 or w4a16-g64", field="quantization")


def _keeps_zeros(recipe: Recipe) -> bool:
    recipes = [*(each for _, each in recipe.rules if each is not None), *getattr(recipe, "choices", ())]
    return not any(isinstance(each, GOBO) or isinstance(each.rounding, GPTQ) for each in recipes)


def _check_channels(model_graph: ModelGraph, node: fx.Node, layer: str, sparsity: NM) -> None:
    weight, _, is_transposed = parameters_of(node)
    num_channels = model_graph.weights[weight.name].shape[0 if is_transposed else 1]
    if num_channels % sparsity.m and sparsity.tail == "refuse":
        what = f"m {sparsity.m} does not divide the {num_channels} input channels of {layer}"
        raise ConfigError(what, remedy='choose another pattern, or NM(..., tail="pad")', field="m")


SPARSIFY_LINEARS = Pass("sparsify_linears", run, SPARSIFICATION, after=("recognize_linear", "convert_attention"))
