"""Linears whose weight has at most two nonzeros in every four consecutive inputs read it compressed.

    y = linear(x, w, b)                             ->    y = sparse_weight_linear(x, w_values, w_indices, None, b)
    y = int8_weight_linear(x, w, w_scale, b)        ->    y = sparse_weight_linear(x, w_values, w_indices, w_scale, b)
    y = int8_linear(q, scale, sums, w, w_scale, …)  ->    y = sparse_int8_linear(q, scale, sums, w_values, w_indices, …)

2:4 sparsity (Mishra et al. 2021). It needs no option: what a weight is made of says whether it is so, in floats as it
comes or in the codes of ``quantize_linears``, which keep zeros. Each part of a merged weight is compressed by itself.
It needs weights that the graph owns (``frozen``), on a CPU or a GPU of CUDA, that nothing else reads; a tied LM head
stays dense.
A weight most of whose groups have more than two nonzeros is an ordinary one, and no near miss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from ..codegen.model_graph import ModelGraph
from ..codegen.ops import (
    int8_linear,
    int8_weight_linear,
    linear,
    merge_weights,
    sparse_int8_linear,
    sparse_weight_linear,
)
from ..codegen.sparse_weights import CHANNELS_OF_BYTE, GROUP, compress_2_of_4, is_dense_group
from .graph_pass import Pass, PassContext
from .quantizable_linears import sources_of

_WEIGHT_PLACES = {linear.overload: 1, int8_weight_linear.overload: 1, int8_linear.overload: 3}
_DTYPES = (torch.float32, torch.bfloat16, torch.int8)
_DEVICES = ("cpu", "cuda")
SPARSE_VALUES, SPARSE_INDICES = ".sparse_values", ".sparse_indices"
"""What the two parts of a compressed weight have in the place of ``.weight`` in their names."""
_ROWS_LOOKED_AT = 8
# Compressing makes several copies of what it is given: so many elements at a time.
_CHUNK_ELEMENTS = 1 << 22


def run(model_graph: ModelGraph, context: PassContext) -> None:
    if not model_graph.frozen:
        return
    compressor = _Compressor(model_graph)
    for node in model_graph.calls(*_WEIGHT_PLACES):
        if not compressor.is_candidate(node):
            continue
        reason = compressor.why_not(node)
        if reason is not None:
            context.near_miss(node, reason)
            continue
        site = context.claim(node)
        if site is not None:
            context.replace(site, node, compressor.compressed(node))
    if context.sites:
        model_graph.eliminate_dead_code()
        model_graph.drop_unused_weights()


class _Compressor:
    """Compresses the weights of one graph's linears, each once."""

    def __init__(self, model_graph: ModelGraph) -> None:
        self._model_graph = model_graph
        self._parts: dict[fx.Node, list[fx.Node]] = {}
        self._placeholders_at: dict[int, list[fx.Node]] = {}
        for node in model_graph.graph.nodes:
            if model_graph.is_weight(node):
                self._placeholders_at.setdefault(model_graph.weights[node.name].data_ptr(), []).append(node)

    def is_candidate(self, node: fx.Node) -> bool:
        """Whether the weight is held, and what is looked at of it is mostly 2:4."""
        sources = sources_of(_weight_of(node))
        held = all(self._model_graph.is_weight(s) and s.name not in self._model_graph.stored_integers for s in sources)
        return held and all(_is_mostly_sparse(self._rows(node, source)[:_ROWS_LOOKED_AT]) for source in sources)

    def why_not(self, node: fx.Node) -> str | None:
        sources = sources_of(_weight_of(node))
        tensors = [self._rows(node, source) for source in sources]
        if tensors[0].device.type not in _DEVICES or tensors[0].dtype not in _DTYPES:
            return f"no kernel reads 2:4 weights of {tensors[0].dtype} on {tensors[0].device.type}"
        if tensors[0].shape[1] % CHANNELS_OF_BYTE:
            return f"its {tensors[0].shape[1]} inputs are not in eights"
        if any(
            not _is_weight_of(user, each) for source in sources for each in self._aliases(source) for user in each.users
        ):
            return "its weight is also used elsewhere"
        num_dense = sum(map(_num_dense_groups, tensors))
        if num_dense:
            num_groups = sum(tensor.numel() for tensor in tensors) // GROUP
            return f"{num_dense} of the {num_groups} groups of four of its weight have more than two nonzeros"
        return None

    def compressed(self, node: fx.Node) -> fx.Node:
        weight, place = _weight_of(node), _WEIGHT_PLACES[node.target]
        with self._model_graph.inserting_before(node) as emit:
            parts = [self._held(node, source) for source in sources_of(weight)]
            values = list(
                parts[0] if len(parts) == 1 else (emit(merge_weights, list(each)) for each in zip(*parts, strict=True))
            )
            before, after = node.args[:place], node.args[place + 1 :]
            if node.target == int8_linear.overload:
                return emit(sparse_int8_linear, *before, *values, *after)
            scale_and_bias = (None, *(after or (None,))) if node.target == linear.overload else after
            return emit(sparse_weight_linear, *before, *values, *scale_and_bias)

    def _rows(self, node: fx.Node, source: fx.Node) -> Tensor:
        """The weight as [N, K]."""
        tensor = self._model_graph.weights[source.name].detach()
        return tensor.t() if node.kwargs.get("transposed", False) else tensor

    def _aliases(self, source: fx.Node) -> list[fx.Node]:
        tensor = self._model_graph.weights[source.name]
        return self._placeholders_at[tensor.data_ptr()] if tensor.numel() else [source]

    def _held(self, node: fx.Node, source: fx.Node) -> list[fx.Node]:
        """Values and indices as weights of the graph."""
        if source not in self._parts:
            pieces = [compress_2_of_4(rows) for rows in _row_chunks(self._rows(node, source))]
            tensors = [torch.cat(each) for each in zip(*pieces, strict=True)]
            self._parts[source] = [
                self._add(source, *each) for each in zip((SPARSE_VALUES, SPARSE_INDICES), tensors, strict=True)
            ]
        return self._parts[source]

    def _add(self, source: fx.Node, suffix: str, tensor: Tensor) -> fx.Node:
        sources = self._model_graph.weight_sources
        with self._model_graph.fake_mode:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        node = self._model_graph.add_placeholder(f"{source.name}{suffix.replace('.', '_')}", fake, weight=tensor)
        if source.name in sources:
            sources[node.name] = f"{sources[source.name].removesuffix('.weight')}{suffix}"
        return node


def _weight_of(node: fx.Node) -> fx.Node:
    return node.args[_WEIGHT_PLACES[node.target]]  # type: ignore[return-value,index]


def _is_weight_of(user: fx.Node, parameter: fx.Node) -> bool:
    """Whether a linear, or a merge for linears, takes the parameter as its weight and as nothing else."""
    if user.target == merge_weights.overload:
        return all(_is_weight_of(each, user) for each in user.users)
    places = [place for place, argument in enumerate(user.args) if argument is parameter]
    return user.target in _WEIGHT_PLACES and places == [_WEIGHT_PLACES[user.target]]


def _is_mostly_sparse(rows: Tensor) -> bool:
    if rows.numel() == 0 or rows.shape[1] % GROUP:
        return False
    return 2 * int(is_dense_group(rows).sum()) <= rows.numel() // GROUP


def _num_dense_groups(rows: Tensor) -> int:
    return sum(int(is_dense_group(part).sum()) for part in _row_chunks(rows))


def _row_chunks(rows: Tensor) -> Sequence[Tensor]:
    return rows.split(max(1, _CHUNK_ELEMENTS // rows.shape[1]))


COMPRESS_WEIGHTS = Pass("compress_weights", run, after=("quantize_linears",))
