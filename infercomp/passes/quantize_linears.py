"""Linears on integers of 8, 4 or 3 bits, their weights rounded to nearest.

    y = linear(x, w, b)            ->    q, scale, sums = quantize_per_token(x, 32)
                                         y = group_linear(q, scale, sums, w_int4, w_scale, w_zero, b, 4, 32, dtype)
    y = linear(x, w, b)            ->    y = clustered_weight_linear(x, w_codes, w_table, w_outliers …, b, 16)    (gobo)
    logits = linear(h, table)      ->    q, scale, sums = quantize_per_token(h, K)
                                         logits = int8_linear(q, scale, sums, table_int8, table_scale, None, dtype)
    h = embedding(table, ids)      ->    h = int8_embedding(table_int8, table_scale, ids, dtype)    (or group_embedding)

Does nothing unless the option ``quantization`` gives a recipe: ``w4a8-g32`` is 4-bit weights in groups of 32 channels
and 8-bit activations; with ``a16`` activations stay floats; ``w8`` has one scale a row; ``-sym`` has no zeros;
``LayerRecipes`` has recipes for named layers. Where one step is decided for all tokens of an input, it is
quantised by ``quantize_per_tensor``. What does not fit the model is refused before anything is quantised.
The LM head, and an embedding that shares its weight, have 8 bits in every recipe.
Linears of one input share its quantisation.

Where the graph owns the weights (``frozen``), their integers replace them and the floats leave the graph. Each part of
a merged weight has integers of its own, and these are merged in its place; in ``weight_sources`` they have the names
that the compressed-tensors format gives them. Weights that come in integers (``stored_integers``) keep those. Elsewhere
the user may change a parameter, or use the graph for another module: there the integers are computed from the
parameter by ``quantize_weight_int8`` or ``quantize_weight_groups`` in the graph, and embeddings stay as they are.
It comes after all passes that ask what a linear is, so that they need not know the quantised ones.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import fx

from ..codegen.model_graph import Emitter, ModelGraph, aten, value_of
from ..codegen.ops import (
    clustered_weight_linear,
    group_embedding,
    group_linear,
    group_weight_linear,
    int8_embedding,
    int8_linear,
    int8_weight_linear,
    merge_weights,
    quantize_per_tensor,
    quantize_per_token,
    quantize_weight_groups,
    quantize_weight_int8,
)
from ..runtime.errors import ConfigError
from .cluster_weights import clusters_of, outlier_room, why_not_clustered
from .graph_pass import LOSSY, Pass, PassContext
from .linear_recipes import GOBO, LinearRecipe
from .quantizable_linears import QuantizableLinears, parameters_of, sources_of

# By the bits of activations: for a scale a row, and for a scale a group.
_ROW_LINEARS = {8: int8_linear, 16: int8_weight_linear}
_GROUP_LINEARS = {8: group_linear, 16: group_weight_linear}
ZERO_VALUE = "_zero_value"
"""What is put behind a parameter's name for zeros that are values; compressed-tensors has none."""
INPUT_SCALE = ".input_scale"
"""What compressed-tensors puts behind a layer's name for the step of the grid that its input is on."""
_CLUSTERED_SUFFIXES = ("_codes", "_table", "_outlier_counts", "_outlier_columns", "_outlier_excess")
# Rounding makes several float32 copies of what it is given: so many elements at a time.
_CHUNK_ELEMENTS = 1 << 22


def run(model_graph: ModelGraph, context: PassContext) -> None:
    recipe = context.config.recipe
    if recipe is None:
        return
    linears = QuantizableLinears(model_graph, context, recipe)
    if not model_graph.frozen and any(isinstance(each, GOBO) for _, each in recipe.rules):
        what = "GOBO makes tables of weights, and those of torch.compile are the user's"
        raise ConfigError(what, remedy="use LLM, or another recipe", field="quantization")
    quantizer = _Quantizer(model_graph, context)
    for node in linears.names:
        if node in linears.chosen:
            quantizer.quantize_linear(node, linears.chosen[node], linears.input_step(node))
        else:
            context.near_miss(node, linears.reasons[node])
    if model_graph.frozen:
        quantizer.quantize_embeddings()
    model_graph.eliminate_dead_code()
    if model_graph.frozen and context.sites:
        model_graph.drop_unused_weights()


class _Quantizer:
    """Replaces linears and embeddings of one graph; remembers what is quantised already."""

    def __init__(self, model_graph: ModelGraph, context: PassContext) -> None:
        self._model_graph = model_graph
        self._context = context
        self._weights: dict[tuple[Hashable, bool, LinearRecipe], list[fx.Node | None]] = {}
        self._inputs: dict[tuple[fx.Node, int, float | None], list[fx.Node]] = {}

    def quantize_linear(self, node: fx.Node, recipe: LinearRecipe, step: float | None) -> None:
        if isinstance(recipe, GOBO):
            self._cluster(node, recipe)
            return
        site = self._context.claim(node)
        if site is None:
            return
        _, bias, _ = parameters_of(node)
        is_grouped, has_integer_input = recipe.group_size is not None, recipe.activation_bits == 8
        with self._model_graph.inserting_before(node) as emit:
            inputs = self._quantized_input(emit, node, recipe, step) if has_integer_input else [node.args[0]]
            weights = [*self._quantized_weight(emit, node, recipe), bias]
            options = [recipe.weight_bits, recipe.group_size] * is_grouped + [value_of(node).dtype] * has_integer_input
            op = (_GROUP_LINEARS if is_grouped else _ROW_LINEARS)[recipe.activation_bits]
            new = emit(op, *inputs, *weights, *options)
        self._context.replace(site, node, new)

    def _cluster(self, node: fx.Node, recipe: GOBO) -> None:
        weight, bias, transposed = parameters_of(node)
        tensors = [self._model_graph.weights[source.name] for source in sources_of(weight)]
        reason = why_not_clustered([tensor.t() if transposed else tensor for tensor in tensors], recipe)
        if reason is not None:
            self._context.near_miss(node, reason)
            return
        site = self._context.claim(node)
        if site is None:
            return
        with self._model_graph.inserting_before(node) as emit:
            parts = self._quantized_weight(emit, node, recipe)
            counts = [self._model_graph.weights[source.name] for source in sources_of(parts[2])]  # type: ignore[arg-type]
            new = emit(clustered_weight_linear, node.args[0], *parts, bias, outlier_room(counts))
        self._context.replace(site, node, new)

    def quantize_embeddings(self) -> None:
        """Embeddings whose table is an LM head in integers by now read it there, so that the floats can go."""
        for node in self._model_graph.calls(aten.embedding.default):
            table, indices = node.args[:2]
            keys = [key for key in self._weights if key[:2] == (self._identity(table), False)]
            site = self._context.claim(node) if keys else None
            if site is None:
                continue
            weights, recipe = self._weights[keys[0]], keys[0][2]
            with self._model_graph.inserting_before(node) as emit:
                if recipe.group_size is None:
                    new = emit(int8_embedding, *weights, indices, value_of(node).dtype)
                else:
                    codes, *constants = (None if each is None else self._in_float32(each) for each in weights)
                    new = emit(group_embedding, codes, *constants, indices, recipe.weight_bits, value_of(node).dtype)
            self._context.replace(site, node, new)

    def _in_float32(self, weight: fx.Node) -> fx.Node:
        """A weight of float16 in float32, as kernels of rows read no float16; others as they are."""
        tensor = self._model_graph.weights[weight.name]
        is_code = not tensor.is_floating_point()
        return weight if is_code else self._add_weight(weight, "_float32", "_float32", tensor.float())

    def _quantized_input(self, emit: Emitter, node: fx.Node, recipe: LinearRecipe, step: float | None) -> list[fx.Node]:
        source = node.args[0]
        group_size = recipe.group_size or value_of(source).shape[-1]
        key = (source, group_size, step)
        if key not in self._inputs:
            if step is None:
                call = emit(quantize_per_token, source, group_size)
            else:
                (weight, *_) = sources_of(parameters_of(node)[0])
                grid = self._add_weight(weight, "_input_step", "", torch.tensor([step]))
                if weight.name in self._model_graph.weight_sources:
                    layer = self._model_graph.weight_sources[weight.name].removesuffix(".weight")
                    self._model_graph.weight_sources[grid.name] = f"{layer}{INPUT_SCALE}"
                call = emit(quantize_per_tensor, source, grid, group_size)
            self._inputs[key] = _results(emit, call)  # type: ignore[index]
        return self._inputs[key]  # type: ignore[index]

    def _quantized_weight(self, emit: Emitter, node: fx.Node, recipe: LinearRecipe) -> list[fx.Node | None]:
        """The integers, the scales and, for groups, the zeros or None; for GOBO codes, table and outliers."""
        weight, _, transposed = parameters_of(node)
        key = (self._identity(weight), transposed, recipe)
        if key not in self._weights:
            make = self._held if self._model_graph.frozen else self._computed
            nodes = make(emit, weight, transposed, recipe)
            has_no_zero = recipe.group_size is not None and recipe.symmetric
            self._weights[key] = [*nodes[:2], None] if has_no_zero else [*nodes]
        return self._weights[key]

    def _identity(self, weight: fx.Node) -> Hashable:
        """Equal for two names of one memory, where that cannot change."""
        if not self._model_graph.frozen or not self._model_graph.is_weight(weight):
            return weight
        tensor = self._model_graph.weights[weight.name]
        return tensor.data_ptr(), tensor.shape, tensor.stride()

    def _computed(self, emit: Emitter, weight: fx.Node, transposed: bool, recipe: LinearRecipe) -> list[fx.Node]:
        """Calls that quantise the parameter as it is when they run."""
        weight = emit(aten.permute.default, weight, [1, 0]) if transposed else weight
        op, arguments = _weight_quantization(recipe)
        return _results(emit, emit(op, weight, *arguments))

    def _held(self, emit: Emitter, weight: fx.Node, transposed: bool, recipe: LinearRecipe) -> list[fx.Node]:
        """The integers of each source as weights of the graph, and merges that lay them end to end."""
        of_sources = [self._held_source(source, transposed, recipe) for source in sources_of(weight)]
        if len(of_sources) == 1:
            return of_sources[0]
        return [emit(merge_weights, list(parts)) for parts in zip(*of_sources, strict=True)]

    def _held_source(self, source: fx.Node, transposed: bool, recipe: LinearRecipe) -> list[fx.Node]:
        stored = self._model_graph.stored_integers.get(source.name)
        results = self._rounded(source, transposed, recipe) if stored is None else stored()
        suffixes = _suffixes(recipe, has_values=results[-1].dtype == torch.float16 and len(results) == 3)
        return [self._add_weight(source, *each, result) for each, result in zip(suffixes, results, strict=False)]

    def _rounded(self, source: fx.Node, transposed: bool, recipe: LinearRecipe) -> Sequence[torch.Tensor]:
        tensor = self._model_graph.weights[source.name].detach()
        if isinstance(recipe, GOBO):
            return clusters_of(tensor.t() if transposed else tensor, recipe)
        op, arguments = _weight_quantization(recipe)
        with torch.no_grad():
            pieces = [op.definition(part, *arguments) for part in _row_chunks(tensor.t() if transposed else tensor)]
            return [torch.cat(each) for each in zip(*pieces, strict=True)]

    def _add_weight(self, source: fx.Node, suffix: str, source_suffix: str, tensor: torch.Tensor) -> fx.Node:
        with self._model_graph.fake_mode:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        node = self._model_graph.add_placeholder(f"{source.name}{suffix}", fake, weight=tensor)
        if source.name in self._model_graph.weight_sources:
            self._model_graph.weight_sources[node.name] = self._model_graph.weight_sources[source.name] + source_suffix
        return node


def _weight_quantization(recipe: LinearRecipe) -> tuple[Any, list[Any]]:
    if recipe.group_size is None:
        return quantize_weight_int8, []
    return quantize_weight_groups, [recipe.weight_bits, recipe.group_size, recipe.symmetric]


def _suffixes(recipe: LinearRecipe, has_values: bool) -> list[tuple[str, str]]:
    """What is put behind a parameter's names, in the graph and among the sources, for each tensor made from it."""
    if isinstance(recipe, GOBO):
        return [(suffix, suffix) for suffix in _CLUSTERED_SUFFIXES]
    integers = (f"_int{recipe.weight_bits}", "" if recipe.group_size is None else "_packed")
    zero = ("_zero", ZERO_VALUE if has_values else "_zero_point")
    return [integers, ("_scale", "_scale"), *([] if recipe.symmetric else [zero])]


def _row_chunks(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return weight.split(max(1, _CHUNK_ELEMENTS // weight.shape[1]))


def _results(emit: Emitter, call: fx.Node) -> list[fx.Node]:
    return [emit(operator.getitem, call, position) for position in range(len(value_of(call)))]


QUANTIZE_LINEARS = Pass("quantize_linears", run, LOSSY, after=("round_weights", "merge_linears", "select_logit_rows"))
