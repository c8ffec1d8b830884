"""Linears whose weight has at most two nonzeros in every four consecutive inputs read it compressed.

    y = linear(x, w, b)                             ->    y = sparse_weight_linear(x, w_values, w_indices, None, b)
    y = int8_weight_linear(x, w, w_scale, b)        ->    y = sparse_weight_linear(x, w_values, w_indices, w_scale, b)
    y = int8_linear(q, scale, sums, w, w_scale, …)  ->    y = sparse_int8_linear(q, scale, sums, w_values, w_indices, …)
    y = group_weight_linear(x, w, w_scale, …)       ->    y = sparse_group_weight_linear(x, w_values, w_indices, …)

2:4 sparsity (Mishra et al. 2021). It needs no option: what a weight is made of says whether it is so, in floats as it
comes or in the codes of ``quantize_linears``, which keep zeros. Each part of a merged weight is compressed by itself.
It needs weights that the graph owns (``frozen``), on a CPU or a GPU of CUDA, that nothing else reads; a tied LM head
stays dense.
A weight most of whose groups have more than two nonzeros is an ordinary one, and no near miss.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from ..codegen.model_graph import ModelGraph
from ..codegen.ops import (
    group_weight_linear,
    int8_linear,
    int8_weight_linear,
    linear,
    merge_weights,
    sparse_group_weight_linear,
    sparse_int8_linear,
    sparse_weight_linear,
)
from ..codegen.ops.group_codes import middle_code, packed_codes, unpacked_codes
from ..codegen.sparse_weights import CHANNELS_OF_BYTE, GROUP, KEPT, compress_2_of_4, is_dense_group
from .graph_pass import Pass, PassContext
from .quantizable_linears import sources_of

_WEIGHT_PLACES = {
    linear.overload: 1,
    int8_weight_linear.overload: 1,
    int8_linear.overload: 3,
    group_weight_linear.overload: 1,
}
_DTYPES = (torch.float32, torch.bfloat16, torch.int8)
_CODE_BITS, _GROUP_CHANNELS = (4, 8), 32
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
        return held and all(
            _is_mostly_sparse(self._steps(node, i, slice(_ROWS_LOOKED_AT))) for i in range(len(sources))
        )

    def why_not(self, node: fx.Node) -> str | None:
        sources = sources_of(_weight_of(node))
        first = self._model_graph.weights[sources[0].name]
        is_grouped = node.target == group_weight_linear.overload
        if first.device.type not in _DEVICES or not (is_grouped or first.dtype in _DTYPES):
            return f"no kernel reads 2:4 weights of {first.dtype} on {first.device.type}"
        reason = self._why_no_groups(node) if is_grouped else None
        if reason is not None:
            return reason
        num_inputs = self._steps(node, 0, slice(1)).shape[1]
        if num_inputs % CHANNELS_OF_BYTE:
            return f"its {num_inputs} inputs are not in eights"
        if any(
            not _is_weight_of(user, each) for source in sources for each in self._aliases(source) for user in each.users
        ):
            return "its weight is also used elsewhere"
        num_dense = num_groups = 0
        for position in range(len(sources)):
            for rows in self._row_chunks(node, position):
                steps = self._steps(node, position, rows)
                num_dense += int(is_dense_group(steps).sum())
                num_groups += steps.numel() // GROUP
        if num_dense:
            return f"{num_dense} of the {num_groups} groups of four of its weight have more than two nonzeros"
        return None

    def _why_no_groups(self, node: fx.Node) -> str | None:
        zero, bits, group_size = node.args[3], node.args[5], node.args[6]
        if bits not in _CODE_BITS or group_size % _GROUP_CHANNELS:  # type: ignore[operator]
            return f"no kernel reads 2:4 codes of {bits} bits in groups of {group_size}"
        sources = () if zero is None else sources_of(zero)  # type: ignore[arg-type]
        if any(self._model_graph.weights[each.name].is_floating_point() for each in sources):
            return "the zeros of its groups are values, for which there may be no code"
        return None

    def compressed(self, node: fx.Node) -> fx.Node:
        weight, place = _weight_of(node), _WEIGHT_PLACES[node.target]
        with self._model_graph.inserting_before(node) as emit:
            parts = [self._held(node, position) for position in range(len(sources_of(weight)))]
            values = list(
                parts[0] if len(parts) == 1 else (emit(merge_weights, list(each)) for each in zip(*parts, strict=True))
            )
            before, after = node.args[:place], node.args[place + 1 :]
            if node.target == int8_linear.overload:
                return emit(sparse_int8_linear, *before, *values, *after)
            if node.target == group_weight_linear.overload:
                return emit(sparse_group_weight_linear, *before, *values, *after)
            scale_and_bias = (None, *(after or (None,))) if node.target == linear.overload else after
            return emit(sparse_weight_linear, *before, *values, *scale_and_bias)

    def _steps(self, node: fx.Node, position: int, rows: slice) -> Tensor:
        """Rows of a part of the weight as [N, K], numbers that are zero where the weight is: of codes int16."""
        tensor = self._model_graph.weights[sources_of(_weight_of(node))[position].name].detach()
        if node.target != group_weight_linear.overload:
            return (tensor.t() if node.kwargs.get("transposed", False) else tensor)[rows]
        codes = unpacked_codes(tensor[rows], node.args[5]).to(torch.int16)  # type: ignore[arg-type]
        return codes - self._zero_codes(node, position, rows).repeat_interleave(node.args[6], 1)  # type: ignore[arg-type]

    def _zero_codes(self, node: fx.Node, position: int, rows: slice) -> Tensor:
        """The code that stands for zero in each group, int16 [N, G]."""
        scale, zero, bits = node.args[2], node.args[3], node.args[5]
        if zero is not None:
            source = sources_of(zero)[position]  # type: ignore[arg-type]
            return self._model_graph.weights[source.name][rows].to(torch.int16)
        scales = self._model_graph.weights[sources_of(scale)[position].name][rows]  # type: ignore[arg-type]
        return torch.full_like(scales, middle_code(bits), dtype=torch.int16)  # type: ignore[arg-type]

    def _row_chunks(self, node: fx.Node, position: int) -> Iterator[slice]:
        tensor = self._model_graph.weights[sources_of(_weight_of(node))[position].name]
        num_rows = tensor.shape[1 if node.kwargs.get("transposed", False) else 0]
        at_once = max(1, _CHUNK_ELEMENTS // self._steps(node, position, slice(1)).shape[1])
        return (slice(first, first + at_once) for first in range(0, num_rows, at_once))

    def _aliases(self, source: fx.Node) -> list[fx.Node]:
        tensor = self._model_graph.weights[source.name]
        return self._placeholders_at[tensor.data_ptr()] if tensor.numel() else [source]

    def _held(self, node: fx.Node, position: int) -> list[fx.Node]:
        """Values and indices as weights of the graph."""
        source = sources_of(_weight_of(node))[position]
        if source not in self._parts:
            pieces = [self._compressed_rows(node, position, rows) for rows in self._row_chunks(node, position)]
            tensors = [torch.cat(each) for each in zip(*pieces, strict=True)]
            self._parts[source] = [
                self._add(source, *each) for each in zip((SPARSE_VALUES, SPARSE_INDICES), tensors, strict=True)
            ]
        return self._parts[source]

    def _compressed_rows(self, node: fx.Node, position: int, rows: slice) -> tuple[Tensor, Tensor]:
        values, indices = compress_2_of_4(self._steps(node, position, rows))
        if node.target == group_weight_linear.overload:
            kept_of_group = node.args[6] // GROUP * KEPT  # type: ignore[operator]
            values = values + self._zero_codes(node, position, rows).repeat_interleave(kept_of_group, 1)
            values = packed_codes(values, node.args[5])  # type: ignore[arg-type]
        return values, indices

    def _add(self, source: fx.Node, suffix: str, tensor: Tensor) -> fx.Node:
        sources = self._model_graph.weight_sources
        with self._model_graph.fake_mode:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        node = self._model_graph.add_placeholder(f"{source.name}{suffix.replace('.', '_')}", fake, weight=tensor)
        if source.name in sources:
            layer = sources[source.name].removesuffix("_packed").removesuffix(".weight")
            sources[node.name] = f"{layer}{suffix}"
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


COMPRESS_WEIGHTS = Pass("compress_weights", run, after=("quantize_linears",))
