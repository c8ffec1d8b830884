"""Linears on 8-bit or 4-bit integers, their weights rounded to nearest.

    y = linear(x, w, b)            ->    q, scale, sums = quantize_per_token(x, 32)
                                         y = int4_linear(q, scale, sums, w_int4, w_scale, w_zero, b, 32, dtype)
    logits = linear(h, table)      ->    q, scale, sums = quantize_per_token(h, K)
                                         logits = int8_linear(q, scale, sums, table_int8, table_scale, None, dtype)
    h = embedding(table, ids)      ->    h = int8_embedding(table_int8, table_scale, ids, dtype)

Does nothing unless the option ``quantization`` names a scheme: ``w4a8-g32`` is 4-bit weights in groups of 32 channels
and 8-bit activations; with ``a16`` activations stay floats; ``w8`` has one scale a row; ``-sym`` has no zeros.
The LM head, and an embedding that shares its weight, have 8 bits in every scheme.
Linears of one input share its quantisation.

Where the graph owns the weights (``frozen``), their integers replace them and the floats leave the graph. Each part of
a merged weight has integers of its own, and these are merged in its place; in ``weight_sources`` they have the names
that the compressed-tensors format gives them. Elsewhere the user may change a parameter, or use the graph for another
module: there the integers are computed from the parameter by ``quantize_weight_int8`` or ``quantize_weight_int4`` in
the graph, and embeddings stay as they are.
It comes after all passes that ask what a linear is, so that they need not know the quantised ones.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable
from typing import Any

import torch
from torch import fx

from ..codegen.model_graph import Emitter, ModelGraph, aten, value_of
from ..codegen.ops import (
    int4_linear,
    int4_weight_linear,
    int8_embedding,
    int8_linear,
    int8_weight_linear,
    linear,
    merge_weights,
    quantize_per_token,
    quantize_weight_int4,
    quantize_weight_int8,
)
from .config import QUANTIZATION_SCHEMES, QuantizationScheme
from .graph_pass import LOSSY, Pass, PassContext, is_float_tensor

_LINEARS = {(8, 8): int8_linear, (8, 16): int8_weight_linear, (4, 8): int4_linear, (4, 16): int4_weight_linear}
# Rounding makes several float32 copies of what it is given: so many elements at a time.
_CHUNK_ELEMENTS = 1 << 22


def run(model_graph: ModelGraph, context: PassContext) -> None:
    if context.config.quantization is None:
        return
    scheme = QUANTIZATION_SCHEMES[context.config.quantization]
    head_scheme = QUANTIZATION_SCHEMES[f"w8a{scheme.activation_bits}"]
    quantizer = _Quantizer(model_graph, context)
    linears = model_graph.calls(linear.overload)
    schemes = [head_scheme if quantizer.is_head(node) else scheme for node in linears]
    reasons = [quantizer.why_not(node, its_scheme) for node, its_scheme in zip(linears, schemes, strict=True)]
    for node, its_scheme, reason in zip(linears, schemes, reasons, strict=True):
        if reason is None:
            quantizer.quantize_linear(node, its_scheme)
        else:
            context.near_miss(node, reason)
    if model_graph.frozen:
        quantizer.quantize_embeddings(head_scheme)
    model_graph.eliminate_dead_code()
    if model_graph.frozen and context.sites:
        _drop_unused_weights(model_graph)


class _Quantizer:
    """Replaces linears and embeddings of one graph; remembers what is quantised already."""

    def __init__(self, model_graph: ModelGraph, context: PassContext) -> None:
        self._model_graph = model_graph
        self._context = context
        self._heads = _lm_heads(model_graph)
        self._weights: dict[Hashable, list[fx.Node | None]] = {}
        self._inputs: dict[tuple[fx.Node, int], list[fx.Node]] = {}
        self._placeholders_at: dict[int, list[fx.Node]] = {}
        for node in model_graph.graph.nodes:
            if model_graph.is_weight(node):
                self._placeholders_at.setdefault(model_graph.weights[node.name].data_ptr(), []).append(node)

    def is_head(self, node: fx.Node) -> bool:
        """Whether a linear makes an output, or has the table of an embedding as its weight."""
        aliases = self._aliases(_parameters(node)[0])
        has_table = any(user.target == aten.embedding.default for alias in aliases for user in alias.users)
        return has_table or node in self._heads

    def why_not(self, node: fx.Node, scheme: QuantizationScheme) -> str | None:
        if not self._context.config.quantize_lm_head and self.is_head(node):
            return "it is the LM head, and quantize_lm_head is off"
        sources = _sources(_parameters(node)[0])
        if not all(self._model_graph.is_weight(source) for source in sources):
            return "its weight is computed, not a parameter"
        num_channels = value_of(node.args[0]).shape[-1]
        if scheme.group_size is not None and num_channels % scheme.group_size:
            return f"its {num_channels} channels are no multiple of the group of {scheme.group_size}"
        users = [(user, alias) for source in sources for alias in self._aliases(source) for user in alias.users]
        if not all(_is_weight_of(user, alias) for user, alias in users):
            return "its weight is also used elsewhere"
        return None

    def _aliases(self, weight: fx.Node) -> list[fx.Node]:
        """All names of a parameter's memory."""
        tensor = self._model_graph.weights.get(weight.name)
        return [] if tensor is None else self._placeholders_at[tensor.data_ptr()] if tensor.numel() else [weight]

    def quantize_linear(self, node: fx.Node, scheme: QuantizationScheme) -> None:
        site = self._context.claim(node)
        if site is None:
            return
        _, bias, _ = _parameters(node)
        is_int4, has_integer_input = scheme.weight_bits == 4, scheme.activation_bits == 8
        with self._model_graph.inserting_before(node) as emit:
            inputs = self._quantized_input(emit, node.args[0], scheme) if has_integer_input else [node.args[0]]
            weights = [*self._quantized_weight(emit, node, scheme), bias]
            options = [scheme.group_size] * is_int4 + [value_of(node).dtype] * has_integer_input
            new = emit(_LINEARS[scheme.weight_bits, scheme.activation_bits], *inputs, *weights, *options)
        self._context.replace(site, node, new)

    def quantize_embeddings(self, scheme: QuantizationScheme) -> None:
        """Embeddings whose table is an LM head in integers by now read it there, so that the floats can go."""
        for node in self._model_graph.calls(aten.embedding.default):
            table, indices = node.args[:2]
            weights = self._weights.get((self._identity(table), False, scheme))
            site = self._context.claim(node) if weights is not None else None
            if weights is None or site is None:
                continue
            with self._model_graph.inserting_before(node) as emit:
                new = emit(int8_embedding, *weights, indices, value_of(node).dtype)
            self._context.replace(site, node, new)

    def _quantized_input(self, emit: Emitter, source: fx.Node, scheme: QuantizationScheme) -> list[fx.Node]:
        group_size = scheme.group_size or value_of(source).shape[-1]
        if (source, group_size) not in self._inputs:
            self._inputs[source, group_size] = _results(emit, emit(quantize_per_token, source, group_size))
        return self._inputs[source, group_size]

    def _quantized_weight(self, emit: Emitter, node: fx.Node, scheme: QuantizationScheme) -> list[fx.Node | None]:
        """The integers, the scales and, for 4 bits, the zeros or None."""
        weight, _, transposed = _parameters(node)
        key = (self._identity(weight), transposed, scheme)
        if key not in self._weights:
            make = self._held if self._model_graph.frozen else self._computed
            nodes = make(emit, weight, transposed, scheme)
            has_no_zero = scheme.weight_bits == 4 and scheme.is_symmetric
            self._weights[key] = [*nodes[:2], None] if has_no_zero else [*nodes]
        return self._weights[key]

    def _identity(self, weight: fx.Node) -> Hashable:
        """Equal for two names of one memory, where that cannot change."""
        if not self._model_graph.frozen or not self._model_graph.is_weight(weight):
            return weight
        tensor = self._model_graph.weights[weight.name]
        return tensor.data_ptr(), tensor.shape, tensor.stride()

    def _computed(self, emit: Emitter, weight: fx.Node, transposed: bool, scheme: QuantizationScheme) -> list[fx.Node]:
        """Calls that quantise the parameter as it is when they run."""
        weight = emit(aten.permute.default, weight, [1, 0]) if transposed else weight
        op, arguments = _weight_quantization(scheme)
        return _results(emit, emit(op, weight, *arguments))

    def _held(self, emit: Emitter, weight: fx.Node, transposed: bool, scheme: QuantizationScheme) -> list[fx.Node]:
        """The integers of each source as weights of the graph, and merges that lay them end to end."""
        of_sources = [self._held_source(source, transposed, scheme) for source in _sources(weight)]
        if len(of_sources) == 1:
            return of_sources[0]
        return [emit(merge_weights, list(parts)) for parts in zip(*of_sources, strict=True)]

    def _held_source(self, source: fx.Node, transposed: bool, scheme: QuantizationScheme) -> list[fx.Node]:
        tensor = self._model_graph.weights[source.name].detach()
        op, arguments = _weight_quantization(scheme)
        with torch.no_grad():
            pieces = [op.definition(part, *arguments) for part in _row_chunks(tensor.t() if transposed else tensor)]
            results = [torch.cat(each) for each in zip(*pieces, strict=True)]
        suffixes = _suffixes(scheme)
        return [self._add_weight(source, *each, result) for each, result in zip(suffixes, results, strict=False)]

    def _add_weight(self, source: fx.Node, suffix: str, source_suffix: str, tensor: torch.Tensor) -> fx.Node:
        with self._model_graph.fake_mode:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        node = self._model_graph.add_placeholder(f"{source.name}{suffix}", fake, weight=tensor)
        if source.name in self._model_graph.weight_sources:
            self._model_graph.weight_sources[node.name] = self._model_graph.weight_sources[source.name] + source_suffix
        return node


def _parameters(node: fx.Node) -> tuple[fx.Node, fx.Node | None, bool]:
    weight, bias = (*node.args[1:], None)[:2]
    return weight, bias, bool(node.kwargs.get("transposed", False))  # type: ignore[return-value]


def _sources(weight: fx.Node) -> list[fx.Node]:
    """The parameters that a weight or bias consists of, laid end to end along its first dimension."""
    is_merge = weight.target == merge_weights.overload and len(weight.args) == 1 and not weight.kwargs
    return list(weight.args[0]) if is_merge else [weight]  # type: ignore[arg-type]


def _is_weight_of(user: fx.Node, parameter: fx.Node) -> bool:
    """Whether a linear, an embedding or a merge takes the parameter as its weight, and as nothing else."""
    if user.target == merge_weights.overload:
        return True
    places = [place for place, argument in enumerate((*user.args, *user.kwargs.values())) if argument is parameter]
    return (user.target, places) in ((linear.overload, [1]), (aten.embedding.default, [0]))


def _weight_quantization(scheme: QuantizationScheme) -> tuple[Any, list[Any]]:
    if scheme.weight_bits == 8:
        return quantize_weight_int8, []
    return quantize_weight_int4, [scheme.group_size, scheme.is_symmetric]


def _suffixes(scheme: QuantizationScheme) -> list[tuple[str, str]]:
    """What is put behind a parameter's names, in the graph and among the sources, for each tensor made from it."""
    integers = ("_int8", "") if scheme.weight_bits == 8 else ("_int4", "_packed")
    return [integers, ("_scale", "_scale")] + ([] if scheme.is_symmetric else [("_zero", "_zero_point")])


def _row_chunks(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return weight.split(max(1, _CHUNK_ELEMENTS // weight.shape[1]))


def _results(emit: Emitter, call: fx.Node) -> list[fx.Node]:
    return [emit(operator.getitem, call, position) for position in range(len(value_of(call)))]


def _lm_heads(model_graph: ModelGraph) -> set[fx.Node]:
    """Linears that make an output, with nothing behind them but casts, selected rows and pointwise calls."""
    return {node for node in map(_lm_head_of, model_graph.output_node().args[0]) if node is not None}


def _lm_head_of(output: Any) -> fx.Node | None:
    node = output
    while isinstance(node, fx.Node) and node.target != linear.overload:
        sources = [source for source in node.all_input_nodes if is_float_tensor(value_of(source))]
        node = sources[0] if _keeps_rows(node) and len(sources) == 1 else None
    return node if isinstance(node, fx.Node) else None


def _keeps_rows(node: fx.Node) -> bool:
    is_pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    return is_pointwise or node.target in (aten._to_copy.default, aten.index_select.default)


def _drop_unused_weights(model_graph: ModelGraph) -> None:
    """Floats that nothing reads any more leave the graph, so that their memory can go."""
    for node in list(model_graph.graph.nodes):
        if model_graph.is_weight(node) and not node.users:
            model_graph.graph.erase_node(node)
            del model_graph.weights[node.name]
            model_graph.weight_sources.pop(node.name, None)


QUANTIZE_LINEARS = Pass("quantize_linears", run, LOSSY, after=("merge_linears", "select_logit_rows"))
