"""A linear becomes the sum of linears over parts of its input channels, each to be rounded by itself.

    y = linear(x, w, b)    ->    y = linear(x * inliers, w * inliers, b) + linear(x[outliers], w[outliers])

        LLM.int8() (Dettmers et al. 2022), for layers whose recipe has an ``outlier_threshold``: channels that reach it
        in the calibration samples are outliers, and stay floats.

    y = linear(x, w, b)    ->    p = x[order];  y = linear(p[0:g], w[order][0:g], b) + linear(p[g:2g], w[order][g:2g]) …

        Per-embedding-group quantisation (PEG, Bondarenko et al. 2021), for those with ``embedding_groups``: channels
        are sorted by their range, max - min, so that those of a part are alike; a part has a scale for each token.
        Parts are even, as in the paper, or end where ranges rise (``embedding_group_sizes``): a few channels with
        outliers then have a part of their own, where in an even one they would crush those beside them.

Parts are found once, so that a token's numbers do not depend on its neighbours. The pass is an identity; what parts
are rounded to is decided here and done by ``quantize_linears``. It needs weights that the graph owns (``frozen``).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import fx

from ..codegen.model_graph import Emitter, ModelGraph, aten, value_of
from ..codegen.ops import linear
from ..runtime.errors import ConfigError
from .calibration import Calibration, Tensors, largest_of_channels, observe, range_of_channels
from .graph_pass import Decision, Pass, PassContext
from .linear_recipes import W8A8, LinearRecipe
from .quantizable_linears import QuantizableLinears, parameters_of

# Where fitted groups may end: channels beyond which a few outliers are, and far fewer places among the others.
_LAST_ENDS, _SPACED_ENDS = 64, 512


def run(model_graph: ModelGraph, context: PassContext) -> None:
    recipe = context.config.recipe
    if recipe is None or not any(_splits(each) for _, each in recipe.rules):
        return
    if not model_graph.frozen:
        what = "splitting channels makes new weights, and those of torch.compile are the user's"
        raise ConfigError(what, remedy="use LLM, or another recipe", field="quantization")
    if context.calibration is None:
        what = "finding outliers and groups of channels needs samples of text"
        raise ConfigError(what, remedy="LLM(..., calibration=texts)", field="calibration")
    splitter = _Splitter(model_graph, context, QuantizableLinears(model_graph, context, recipe))
    splitter.split(context.calibration)
    model_graph.eliminate_dead_code()


def _splits(recipe: LinearRecipe | None) -> bool:
    return isinstance(recipe, W8A8) and (recipe.outlier_threshold is not None or recipe.embedding_groups is not None)


@dataclasses.dataclass(frozen=True)
class _Split:
    """How the channels of one input are split, and the parts of it as nodes, once the first linear has asked."""

    channels: tuple[torch.Tensor, ...]
    parts: list[fx.Node]


class _Splitter:
    """Splits the linears of one graph; those that read the same input in the same way share its parts."""

    def __init__(self, model_graph: ModelGraph, context: PassContext, linears: QuantizableLinears) -> None:
        self._model_graph = model_graph
        self._context = context
        self._linears = linears
        self._splits: dict[tuple[fx.Node, W8A8], _Split] = {}

    def split(self, calibration: Calibration) -> None:
        chosen = self._linears.chosen.items()
        wanted = {node: recipe for node, recipe in chosen if isinstance(recipe, W8A8) and _splits(recipe)}
        layers: dict[fx.Node, str] = {}
        for node in wanted:
            layers.setdefault(node.args[0], self._linears.names[node][0][0])  # type: ignore[arg-type]
        self._check_groups(wanted)
        recipes = {(node.args[0], recipe) for node, recipe in wanted.items()}

        def visit(source: fx.Node, measured: Tensors) -> None:
            for other, recipe in recipes:
                if other is source:
                    self._splits[source, recipe] = _Split(tuple(_channels(measured, recipe)), [])  # type: ignore[arg-type, index]

        observe(self._model_graph, calibration, layers, "split_channels", _sizes_of_channels, visit)
        for node, recipe in wanted.items():
            self._split(node, recipe)  # type: ignore[arg-type]

    def _check_groups(self, wanted: dict[fx.Node, W8A8]) -> None:
        for node, recipe in wanted.items():
            if recipe.embedding_groups is None:
                continue
            groups, is_fitted = recipe.embedding_groups, recipe.embedding_group_sizes == "fitted"
            num_channels = int(value_of(node.args[0]).shape[-1])
            if groups > min(num_channels, _SPACED_ENDS) if is_fitted else num_channels % groups:
                name = self._linears.names[node][0][0]
                what = f"embedding_groups {groups} does not divide the {num_channels} input channels of {name}"
                raise ConfigError(what, remedy="choose another number of groups", field="embedding_groups")

    def _split(self, node: fx.Node, recipe: W8A8) -> None:
        split = self._splits[node.args[0], recipe]  # type: ignore[index]
        if not all(len(part) for part in split.channels):
            self._leave_whole(node, has_outliers=len(split.channels[0]) == 0)
            return
        site = self._context.claim(node)
        if site is None:
            return
        weight, bias, is_transposed = parameters_of(node)
        with self._model_graph.inserting_before(node) as emit:
            if not split.parts:
                split.parts.extend(self._input_parts(emit, node.args[0], split, recipe))  # type: ignore[arg-type]
            total: fx.Node | None = None
            for position, part in enumerate(split.parts):
                own = self._weight_part(weight, is_transposed, split, position, recipe)
                options = {"transposed": True} if is_transposed else {}
                output = emit(linear, part, own, bias if position == 0 else None, **options)
                total = output if total is None else emit(aten.add.Tensor, total, output)
                self._decide(own, node, position, recipe)
        assert total is not None
        self._context.replace(site, node, total)

    def _leave_whole(self, node: fx.Node, *, has_outliers: bool) -> None:
        reason = "no input channel reaches the outlier_threshold in the calibration samples"
        if has_outliers:
            reason = "all its input channels are outliers, which stay floats"
            names = tuple(self._linears.names[node][0])
            self._context.decisions[parameters_of(node)[0].name] = Decision(None, reason, names)
        self._context.near_miss(node, reason)

    def _input_parts(self, emit: Emitter, source: fx.Node, split: _Split, recipe: W8A8) -> list[fx.Node]:
        dim = value_of(source).dim() - 1
        if recipe.outlier_threshold is not None:
            inliers, outliers = split.channels
            mask = torch.zeros(len(inliers) + len(outliers), dtype=value_of(source).dtype)
            mask[inliers] = 1
            masked = emit(aten.mul.Tensor, source, self._constant(f"{source.name}_inliers", mask))
            return [
                masked,
                emit(aten.index_select.default, source, dim, self._constant(f"{source.name}_outliers", outliers)),
            ]
        order = self._constant(f"{source.name}_order", torch.cat(split.channels))
        permuted = emit(aten.index_select.default, source, dim, order)
        ends = list(itertools.accumulate(map(len, split.channels), initial=0))
        return [emit(aten.slice.Tensor, permuted, dim, *bounds) for bounds in itertools.pairwise(ends)]

    def _weight_part(self, weight: fx.Node, is_transposed: bool, split: _Split, position: int, recipe: W8A8) -> fx.Node:
        tensor = self._model_graph.weights[weight.name].detach()
        dim = 0 if is_transposed else 1
        if recipe.outlier_threshold is not None and position == 0:
            # As wide as it was, with zeros in place of the outliers: kernels want channels in whole vectors.
            return self._constant(f"{weight.name}_inliers", tensor.index_fill(dim, split.channels[1], 0))
        what = "outliers" if recipe.outlier_threshold is not None else f"group_{position}"
        return self._constant(f"{weight.name}_{what}", tensor.index_select(dim, split.channels[position]))

    def _decide(self, weight: fx.Node, node: fx.Node, position: int, recipe: W8A8) -> None:
        plain = dataclasses.replace(recipe, smooth_alpha=None, outlier_threshold=None, embedding_groups=None)
        plain = dataclasses.replace(plain, embedding_group_sizes="even")
        stays = recipe.outlier_threshold is not None and position == 1
        reason = "its input channels are outliers, which stay floats" if stays else "a part of a layer's channels"
        names = tuple(self._linears.names[node][0])
        self._context.decisions[weight.name] = Decision(None if stays else plain, reason, names)

    def _constant(self, name: str, tensor: torch.Tensor) -> fx.Node:
        with self._model_graph.fake_mode:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        return self._model_graph.add_placeholder(name, fake, weight=tensor)


def _sizes_of_channels(source: fx.Node, values: Sequence[torch.Tensor]) -> Tensors:
    return {"largest": largest_of_channels(values), "range": range_of_channels(values)}


def _channels(measured: Tensors, recipe: W8A8) -> list[torch.Tensor]:
    """The channels of each part: those that are no outliers and those that are, or the groups."""
    if recipe.outlier_threshold is not None:
        is_outlier = measured["largest"] >= recipe.outlier_threshold
        return [(~is_outlier).nonzero()[:, 0], is_outlier.nonzero()[:, 0]]
    assert recipe.embedding_groups is not None
    ranges, order = measured["range"].sort(stable=True)
    if recipe.embedding_group_sizes == "even":
        return list(order.chunk(recipe.embedding_groups))
    return list(order.split(fitted_sizes(ranges, recipe.embedding_groups)))


def fitted_sizes(ranges: torch.Tensor, num_groups: int) -> list[int]:
    """How many of these channels, their ranges ascending [K], each of so many groups has.

    The sum of size times the square of the largest range is the least over groups that end behind one of the last
    channels or at one of evenly spaced ones: a shortest path over ends, one group after the other.
    """
    num_channels = len(ranges)
    spaced = range(0, num_channels, -(-num_channels // _SPACED_ENDS))
    places = torch.tensor(sorted({*spaced, *range(max(0, num_channels - _LAST_ENDS), num_channels + 1)}))
    largest = ranges.double().square()[(places - 1).clamp(min=0)]
    # [start, end]: what a group costs that lies between these places.
    cost = (places[None, :] - places[:, None]) * largest[None, :]
    cost = torch.where(places[:, None] < places[None, :], cost, torch.inf)
    total, starts = cost[0], []
    for _ in range(num_groups - 1):
        total, start = (total[:, None] + cost).min(0)
        starts.append(start)
    ends = [len(places) - 1]
    for start in reversed(starts):
        ends.append(int(start[ends[-1]]))
    return places[[0, *reversed(ends)]].diff().tolist()


SPLIT_CHANNELS = Pass("split_channels", run, after=("smooth_activations",))
