"""Orders of channels that cost nothing: what makes a linear's input makes it in the order that the linear wants.

    y = down(act(gate(x)) * up(x))    the rows of gate and up are put in order, and their biases
    y = fc2(act(fc1(x)))              the rows of fc1
    y = o(attention(q, k, v))         the rows of v, head by head: an order within a head, which the query heads that
                                      share it have in common

Which rows q and k have does not matter here: they are no input channels of any linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ..codegen.model_graph import ModelGraph, aten, shape_of
from ..codegen.ops import gated_activation
from .fusion import is_pointwise
from .permutation_search import PermutationSearch, permutation_search
from .producing_linears import NoProducerError, Producers, ProducingLinear


@dataclass(frozen=True)
class OrderFold:
    """The linears whose rows take the order. Channels of the reader lie [heads, repeats, D] and change places within D,
    alike in all repeats; one head and no repeats where they may go anywhere."""

    producers: tuple[ProducingLinear, ...]
    num_heads: int = 1
    num_repeats: int = 1

    def search(self, scores: torch.Tensor, pattern: tuple[int, int], search: PermutationSearch) -> torch.Tensor:
        """The order of channels int64 [K] that keeps most of scores [N, K] among those that can be folded."""
        by_head = scores.unflatten(1, (self.num_heads, self.num_repeats, -1)).movedim(1, 0).flatten(1, 2)
        return self.of_reader([permutation_search(each, pattern, search) for each in by_head])

    def of_reader(self, orders: Sequence[torch.Tensor]) -> torch.Tensor:
        """One order [D] a head, as an order of the reader's channels [K]."""
        places = torch.arange(len(orders) * self.num_repeats).view(-1, self.num_repeats, 1) * len(orders[0])
        return (places + torch.stack(list(orders))[:, None]).flatten()

    def of_rows(self, order: torch.Tensor) -> torch.Tensor:
        """The order of the producers' rows [heads * D] for one of the reader's channels."""
        first = order.view(self.num_heads, self.num_repeats, -1)[:, 0]
        channels = first.shape[1]
        heads = torch.arange(self.num_heads)[:, None]
        return (first - heads * (self.num_repeats - 1) * channels).flatten()

    def apply(self, model_graph: ModelGraph, order: torch.Tensor) -> None:
        """Put the producers' rows in the order of the reader's channels."""
        rows, weights = self.of_rows(order), model_graph.weights
        for each in self.producers:
            weights[each.weight.name] = weights[each.weight.name].detach().index_select(each.output_dim, rows)
            if each.bias is not None:
                weights[each.bias.name] = weights[each.bias.name].detach().index_select(0, rows)


def order_fold(
    model_graph: ModelGraph, producers: Producers, source: fx.Node, readers: Sequence[fx.Node], group_size: int
) -> OrderFold:
    """Where the order of ``source`` can be folded, ``group_size`` being M; else NoProducerError says why not."""
    producers.require_readers(source, readers)
    if source.target == gated_activation.overload:
        gate, up = source.args[:2]
        pair = ((gate, "gate"), (up, "up"))
        return OrderFold(tuple(producers.linear(node, {source}, role) for node, role in pair))  # type: ignore[arg-type]
    if source.target == aten.reshape.default:
        found = producers.values(source)
        head_dim = int(shape_of(source)[-1]) // (found.num_heads * found.num_repeats)
        if head_dim % group_size:
            raise NoProducerError(f"groups of {group_size} channels do not fit into heads of {head_dim}")
        return OrderFold((found.linear,), found.num_heads, found.num_repeats)
    return OrderFold((producers.linear(*_behind_activation(model_graph, source), "one"),))


def _behind_activation(model_graph: ModelGraph, source: fx.Node) -> tuple[fx.Node, set[fx.Node]]:
    """What ``source`` is made of by calls that treat every channel alike, and those of them that read it."""
    calls: dict[fx.Node, None] = {}
    origins: dict[fx.Node, None] = {}
    pending = [source]
    while pending:
        node = pending.pop()
        if not is_pointwise(node):
            origins[node] = None
        elif node not in calls:
            calls[node] = None
            pending += [each for each in node.all_input_nodes if not _is_number(model_graph, each)]
    if len(origins) != 1 or not calls:
        raise NoProducerError(f"its input is made by {source.target}, which does not come from one linear's rows alone")
    for node in calls:
        if node is not source and not set(node.users) <= calls.keys():
            raise NoProducerError(f"{node.name} is also read elsewhere")
    (origin,) = origins
    return origin, {node for node in calls if origin in node.all_input_nodes}


def _is_number(model_graph: ModelGraph, node: fx.Node) -> bool:
    return model_graph.is_weight(node) and model_graph.weights[node.name].numel() == 1
