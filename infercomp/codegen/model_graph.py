"""The central type: a captured model as a pure FX graph, which every stage is a function on.

All placeholders are explicit: weights (and constants) first by name and value, then the inputs in
call order. The graph is functional pre-dispatch ATen plus our vocabulary; inputs that the model
mutates come back as extra leading outputs (``mutated_inputs``). Each node keeps its fake value in
``meta["val"]`` and the model's source line in ``meta["stack_trace"]``.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

aten = torch.ops.aten


@dataclass
class ModelGraph:
    """A captured model. ``weights`` maps placeholder names to tensors; the others are inputs.

    ``input_names`` lists the inputs in call order; ``mutated_inputs`` the inputs whose new values
    lead the outputs; ``weight_sources`` the model's own parameter names; ``frozen`` says that no one
    but infercomp holds the weights, so that values computed from them may be folded; ``stored_integers`` reads
    the codes, scales and zeros of weights that come quantised, whose tensors are zeros until these take their place;
    ``stored_steps`` has the step of the grid that the inputs of some of them are on.
    ``output_orders`` holds, for each output that is dense in memory, its dimensions from the outermost
    to the innermost: callers may rely on the model's own strides.
    """

    graph_module: fx.GraphModule
    weights: MutableMapping[str, torch.Tensor]
    input_names: tuple[str, ...]
    fake_mode: FakeTensorMode
    mutated_inputs: tuple[str, ...] = ()
    weight_sources: dict[str, str] = field(default_factory=dict)
    frozen: bool = False
    stored_integers: dict[str, Callable[[], tuple[torch.Tensor, ...]]] = field(default_factory=dict)
    stored_steps: dict[str, float] = field(default_factory=dict)
    output_orders: tuple[tuple[int, ...] | None, ...] = ()
    known_values: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """Fake results by call and descriptions of its arguments: layers repeat, and so do their calls."""

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    def placeholder(self, name: str) -> fx.Node:
        return next(node for node in self.graph.nodes if node.op == "placeholder" and node.name == name)

    def is_weight(self, argument: object) -> bool:
        return isinstance(argument, fx.Node) and argument.op == "placeholder" and argument.name in self.weights

    def input_of_extent(self, extent: torch.SymInt) -> tuple[fx.Node, int | None] | None:
        """An input that is this symbolic extent (dim None), or a tensor input and the dimension that has it.

        Sizes taken from inputs keep no intermediate value alive.
        """
        for name in self.input_names:
            node = self.placeholder(name)
            value = value_of(node)
            if isinstance(value, torch.SymInt) and value.node.expr == extent.node.expr:
                return node, None
            for dim, other in enumerate(getattr(value, "shape", ())):
                if isinstance(other, torch.SymInt) and other.node.expr == extent.node.expr:
                    return node, dim
        return None

    def output_node(self) -> fx.Node:
        return next(reversed(self.graph.nodes))

    def calls(self, *targets: object) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "call_function" and node.target in targets]

    def add_placeholder(self, name: str, value: Any, *, weight: torch.Tensor | None = None) -> fx.Node:
        """A new placeholder, after the existing weights if ``weight`` is given, else as the last input."""
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        weights = [node for node in placeholders if node.name in self.weights]
        after = (weights[-1] if weights else None) if weight is not None else (placeholders or [None])[-1]
        with self.graph.inserting_after(after) if after else self.graph.inserting_before():
            node = self.graph.placeholder(name)
        node.meta["val"] = value
        if weight is not None:
            self.weights[node.name] = weight
        else:
            self.input_names = (*self.input_names, node.name)
        return node

    def remove_input(self, name: str) -> None:
        self.graph.erase_node(self.placeholder(name))
        self.input_names = tuple(other for other in self.input_names if other != name)

    @contextlib.contextmanager
    def inserting_before(self, anchor: fx.Node) -> Iterator[Emitter]:
        """Nodes emitted inside stand before ``anchor`` and inherit its source line."""
        with self.graph.inserting_before(anchor):
            yield Emitter(self, anchor)

    def eliminate_dead_code(self) -> None:
        """Drop calls that nothing uses; the graph is functional, so only our cache writes have effects."""
        for node in reversed(list(self.graph.nodes)):
            if node.op == "call_function" and not node.users and not mutates(node):
                self.graph.erase_node(node)

    def drop_unused_weights(self) -> None:
        """Weights that nothing reads any more leave the graph, so that their memory can go."""
        for node in list(self.graph.nodes):
            if self.is_weight(node) and not node.users:
                self.graph.erase_node(node)
                del self.weights[node.name]
                self.weight_sources.pop(node.name, None)


def mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


class Emitter:
    """Appends calls whose fake value is computed at once, so metadata never goes stale."""

    def __init__(self, model_graph: ModelGraph, anchor: fx.Node) -> None:
        self._model_graph = model_graph
        self._anchor = anchor

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        overload = getattr(target, "overload", target)
        node = self._model_graph.graph.call_function(overload, args, kwargs)
        for key in ("stack_trace", "nn_module_stack"):
            if key in self._anchor.meta:
                node.meta[key] = self._anchor.meta[key]
        refresh_value(self._model_graph, node)
        return node

    def size(self, node: fx.Node, dim: int) -> fx.Node | int:
        """The extent of a dimension, as an int where it is static."""
        extent = value_of(node).shape[dim]
        if isinstance(extent, int):
            return extent
        source = self._model_graph.input_of_extent(extent)
        if source is None:
            return self(aten.sym_size.int, node, dim)
        return source[0] if source[1] is None else self(aten.sym_size.int, *source)

    def sizes(self, node: fx.Node) -> list[fx.Node | int]:
        return [self.size(node, dim) for dim in range(value_of(node).dim())]


def dense_order(value: Any) -> tuple[int, ...] | None:
    """The dimensions of a tensor from outermost to innermost if it fills its memory, else None."""
    if not isinstance(value, torch.Tensor):
        return None
    sizes, strides = (tuple(_hint(extent) for extent in extents) for extents in (value.shape, value.stride()))
    order = sorted((dim for dim in range(len(sizes))), key=lambda dim: (-strides[dim], dim))
    expected = 1
    for dim in reversed(order):
        if sizes[dim] != 1 and strides[dim] != expected:
            return None
        expected *= sizes[dim]
    return tuple(order)


def _hint(extent: Any) -> int:
    return extent.node.hint if isinstance(extent, torch.SymInt) else extent


def refresh_value(model_graph: ModelGraph, node: fx.Node) -> None:
    """Recompute ``meta["val"]`` of one call from the fake values of its arguments."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
    key = (node.target, _described(args), _described(kwargs))
    value = model_graph.known_values.get(key)
    if value is None:
        with model_graph.fake_mode, torch.no_grad():
            value = node.target(*args, **kwargs)  # type: ignore[operator]
        if isinstance(value, torch.Tensor) and not _is_of_unknown_shape(node.target):
            model_graph.known_values[key] = value
    node.meta["val"] = value


def _is_of_unknown_shape(target: Any) -> bool:
    """Whether each call makes a size of its own, which no other call may share."""
    return not isinstance(target, torch._ops.OpOverload) or torch.Tag.dynamic_output_shape in target.tags


def _described(value: Any) -> Any:
    """All that the shape, strides and dtype of a result can depend on."""
    if isinstance(value, torch.Tensor):
        extents = (*value.shape, *value.stride(), value.storage_offset())
        return value.dtype, value.device, value.dim(), tuple(map(_described, extents))
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.expr
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(_described, value))
    if isinstance(value, dict):
        return tuple((name, _described(one)) for name, one in value.items())
    return type(value), value


def value_of(node: Any) -> Any:
    """The fake value of a node; anything else is returned as it is."""
    return node.meta["val"] if isinstance(node, fx.Node) else node


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def same_size(left: Any, right: Any) -> bool:
    """Whether two extents are equal for every length, decided without adding a guard."""
    left, right = value_of(left), value_of(right)
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    try:
        return bool(torch.fx.experimental.symbolic_shapes.statically_known_true(left == right))
    except GuardOnDataDependentSymNode:
        return False


def same_shape(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    return len(left) == len(right) and all(same_size(a, b) for a, b in zip(left, right, strict=True))


_FRAME = re.compile(r'File "([^"]+)", line (\d+), in ([^\n]+)\n\s*([^\n]*)')


_TORCH = str(Path(torch.__file__).parent)


def source_line(node: fx.Node) -> str | None:
    """The innermost line of the model's source that made this node: ``file:line in function: code``."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return None
    # Layers of torch.nn are nobody's mistake: the line that calls them says more.
    own = [frame for frame in frames if not frame[0].startswith(_TORCH)] or frames
    path, line, function, code = own[-1]
    return f"{'/'.join(path.split('/')[-2:])}:{line} in {function}: {code.strip()}"
