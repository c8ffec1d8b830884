"""What fusion passes share: they decide which calls become one kernel, and change nothing else.

A fusion only marks nodes (``meta["kernel"]``): lowering builds one kernel from nodes of one mark. The
graph, its values and every rounding stay as they are, so switching a fusion off never changes a result
by more than the order in which a kernel adds. ``meta["fused_by"]`` names the passes, for the kernel's header.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import fx

from ..codegen.model_graph import ModelGraph, value_of
from ..codegen.regions import is_inlined
from .graph_pass import PassContext


def kernel_of(node: fx.Node) -> str:
    """The mark of the kernel that computes a node."""
    return str(node.meta.get("kernel", node.name))


def fuse(model_graph: ModelGraph, context: PassContext, producer: fx.Node, consumer: fx.Node) -> bool:
    """Put both calls' kernels into one, unless the user switched the match off or a cycle would arise."""
    mark, other = kernel_of(producer), kernel_of(consumer)
    if mark == other:
        return False
    # A kernel is named after its first call, and a consumer that is in no kernel yet is the last one concerned.
    is_part = other != consumer.name
    first = next(node for node in _backwards(producer) if node.name == mark)
    window = model_graph.graph.nodes if is_part else _between(first, consumer)
    if _has_path_outside(window, mark, other):
        context.near_miss(
            consumer, f"a call between {producer.name} and {consumer.name} needs the one and feeds the other"
        )
        return False
    if context.claim(consumer) is None:
        return False
    for node in (producer, consumer):
        node.meta["kernel"] = mark
        node.meta["fused_by"] = tuple(dict.fromkeys((*node.meta.get("fused_by", ()), context.name)))
    for node in model_graph.graph.nodes if is_part else ():
        if kernel_of(node) == other:
            node.meta["kernel"] = mark
    return True


def _has_path_outside(nodes: Iterable[fx.Node], mark: str, other: str) -> bool:
    """Whether some call outside of both kernels reads the first and is read by the second, at any distance."""
    reached: set[fx.Node] = set()
    for node in nodes:
        kernel = kernel_of(node)
        if kernel == other and any(source in reached for source in _through_views(node)):
            return True
        if kernel in (mark, other):
            continue
        if any(source in reached or kernel_of(source) == mark for source in node.all_input_nodes):
            reached.add(node)
            if is_inlined(node) and not any(source in reached for source in _through_views(node)):
                reached.discard(node)
    return False


def _backwards(node: fx.Node) -> Iterator[fx.Node]:
    while True:
        yield node
        node = node.prev


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    while first is not last:
        yield first
        first = first.next
    yield last


def _through_views(node: fx.Node) -> Iterator[fx.Node]:
    """What a call reads, seen through views."""
    for source in node.all_input_nodes:
        if is_inlined(source):
            yield from _through_views(source)
        else:
            yield source


def sources_of(node: fx.Node) -> list[fx.Node]:
    """The computed values that a call reads, seen through views."""
    return [source for source in _through_views(node) if source.op == "call_function"]


def readers_of(node: fx.Node) -> list[fx.Node]:
    """The calls that read a node, seen through views; the output counts as one."""
    readers: dict[fx.Node, None] = {}
    for user in node.users:
        if is_inlined(user):
            readers.update(dict.fromkeys(readers_of(user)))
        else:
            readers[user] = None
    return list(readers)


def is_pointwise(node: fx.Node) -> bool:
    """Whether every element of a call's result depends on the same element of its operands only."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def has_shape_of(node: fx.Node, other: fx.Node) -> bool:
    left, right = value_of(node), value_of(other)
    return (
        isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor) and tuple(left.shape) == tuple(right.shape)
    )
