"""The linears whose output channels are the channels of what another linear reads, so that both may change as one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..codegen.model_graph import ModelGraph, aten, same_shape, same_size, shape_of
from ..codegen.ops import attention, linear
from .quantizable_linears import parameters_of

_HEADS_BEHIND_TOKENS = [0, 2, 1, 3]


class NoProducerError(Exception):
    """Why a change of channels cannot be folded into what makes them, as a near miss says it."""


@dataclass(frozen=True)
class ProducingLinear:
    """A linear that nothing but one reader reads, with a weight and a bias of its own."""

    weight: fx.Node
    bias: fx.Node | None
    output_dim: int
    """The dimension of the weight that its output channels lie along."""


@dataclass(frozen=True)
class ValueLinear:
    """The linear of the values behind attention, whose channels lie [heads, D] and the reader's [heads, repeats, D]."""

    linear: ProducingLinear
    num_heads: int
    num_repeats: int


class Producers:
    """Finds what makes the inputs of one graph's linears. All methods raise NoProducerError with the reason."""

    def __init__(self, model_graph: ModelGraph) -> None:
        self._model_graph = model_graph
        addresses = [tensor.data_ptr() for tensor in model_graph.weights.values() if tensor.numel()]
        self._shared_addresses = {address for address in addresses if addresses.count(address) > 1}

    def linear(self, node: fx.Node, readers: Iterable[fx.Node], role: str) -> ProducingLinear:
        """``node`` as a linear that only ``readers`` read."""
        if node.target != linear.overload:
            raise NoProducerError(f"the {role} linear before it has no weight of its own")
        self.require_readers(node, readers)
        weight, bias, is_transposed = parameters_of(node)
        self.require_own(weight, f"the weight of the {role} linear before it")
        if bias is not None:
            self.require_own(bias, f"the bias of the {role} linear before it")
        return ProducingLinear(weight, bias, 1 if is_transposed else 0)

    def values(self, source: fx.Node) -> ValueLinear:
        """The linear of the values of that attention whose heads lie side by side in ``source``."""
        permute, call = source.args[0], None
        if _is_permute(permute):
            call = permute.args[0]  # type: ignore[union-attr]
        if call is None or call.target != attention.overload:
            raise NoProducerError("its input is a view of no attention, which channels cannot be followed through")
        value = call.args[2]
        split = value.args[0] if _is_permute(value) else None
        if split is None or split.target != aten.reshape.default:
            raise NoProducerError("the values of the attention before it are not the heads of one linear")
        _require_heads(source, permute)  # type: ignore[arg-type]
        _require_heads(split.args[0], split)
        for node, reader in ((permute, source), (call, permute), (value, call), (split, value)):
            self.require_readers(node, [reader])  # type: ignore[arg-type]
        num_heads, num_value_heads = (int(shape_of(node)[1]) for node in (call, value))
        producer = self.linear(split.args[0], [split], "value")
        return ValueLinear(producer, num_value_heads, num_heads // num_value_heads)

    def require_own(self, weight: fx.Node, what: str) -> None:
        if not self._model_graph.is_weight(weight):
            raise NoProducerError(f"{what} is computed, not a parameter")
        address = self._model_graph.weights[weight.name].data_ptr()
        if len(weight.users) > 1 or address in self._shared_addresses:
            raise NoProducerError(f"{what} is also used elsewhere")

    def require_readers(self, node: fx.Node, readers: Iterable[fx.Node]) -> None:
        if set(node.users) != set(readers):
            raise NoProducerError(f"{node.name} is also read elsewhere")


def _is_permute(node: Any) -> bool:
    return node.target == aten.permute.default and list(node.args[1]) == _HEADS_BEHIND_TOKENS


def _require_heads(flat: fx.Node, heads: fx.Node) -> None:
    """Refuse all but [B, S, H * D] beside [B, S, H, D]."""
    whole, split = shape_of(flat), shape_of(heads)
    is_split = len(whole) == 3 and len(split) == 4 and same_shape(whole[:2], split[:2])
    if not is_split or not same_size(whole[2], split[2] * split[3]):
        raise NoProducerError("heads do not lie side by side in its input")
