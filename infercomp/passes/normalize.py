"""One spelling for each thing, so that recognisers see few forms.

    y = x.clone(); z = _unsafe_view(y, s); t = z.transpose(1, 2)      z = reshape(x, s)
    u = dropout(t, 0.1, False) * 1.0; a, b = chunk(u, 2)         ->   t = permute(z, (0, 2, 1, 3))
                                                                      a = slice(t, …); b = slice(t, …)

Aliases, detaches, same-dtype casts and no-op views go; views, reshapes and clones become
``reshape``; transposes become ``permute``; splits become slices; equal calls are merged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..codegen.model_graph import Emitter, ModelGraph, aten, same_shape, same_size, shape_of, value_of
from .graph_pass import Pass, PassContext

Rewrite = Callable[[Emitter, fx.Node], "fx.Node | None"]
_END = 2**62


def _operand(_emit: Emitter, node: fx.Node) -> fx.Node:
    return node.args[0]  # type: ignore[return-value]


def _cast(emit: Emitter, node: fx.Node) -> fx.Node | None:
    source = node.args[0]
    old, new = value_of(source), value_of(node)
    if (old.dtype, old.device) == (new.dtype, new.device):
        return source  # type: ignore[return-value]
    if node.target == aten._to_copy.default and node.kwargs == {"dtype": new.dtype}:
        return None
    if old.device != new.device:
        return None
    return emit(aten._to_copy.default, source, dtype=new.dtype)


def _reshape(emit: Emitter, node: fx.Node) -> fx.Node | None:
    source, shape = node.args[0], list(node.args[1])
    if same_shape(shape_of(source), shape_of(node)):
        return source
    while source.target == aten.reshape.default:
        source = source.args[0]
    # A chain that ends where it began is nothing; -1 stays, since it names no symbol.
    if same_shape(shape_of(source), shape_of(node)):
        return source
    if node.target == aten.reshape.default and source is node.args[0]:
        return None
    return emit(aten.reshape.default, source, shape)


def _flatten(emit: Emitter, node: fx.Node) -> fx.Node:
    source = node.args[0]
    rank = value_of(source).dim()
    if rank == 0:
        return emit(aten.reshape.default, source, [1])
    start = node.args[1] if len(node.args) > 1 else 0
    end = node.args[2] if len(node.args) > 2 else -1
    start, end = start % rank, end % rank
    sizes = emit.sizes(source)
    extent = shape_of(node)[start]
    # With a zero among the sizes, -1 would be ambiguous.
    flattened = extent if isinstance(extent, int) else -1
    return emit(aten.reshape.default, source, [*sizes[:start], flattened, *sizes[end + 1 :]])


def _permutation(node: fx.Node) -> list[int]:
    rank = value_of(node.args[0]).dim()
    if node.target == aten.permute.default:
        return [dim % rank for dim in node.args[1]]
    order = list(range(rank))
    if node.target == aten.t.default:
        return order[::-1]
    dims = (-2, -1) if node.target == aten.mT.default else node.args[1:]
    first, second = (dim % rank for dim in dims)
    order[first], order[second] = order[second], order[first]
    return order


def _permute(emit: Emitter, node: fx.Node) -> fx.Node | None:
    source, order = node.args[0], _permutation(node)
    while source.target == aten.permute.default:
        inner = _permutation(source)
        source, order = source.args[0], [inner[dim] for dim in order]
    if order == list(range(len(order))):
        return source
    if node.target == aten.permute.default and source is node.args[0] and list(node.args[1]) == order:
        return None
    return emit(aten.permute.default, source, order)


def _slice(emit: Emitter, node: fx.Node) -> fx.Node | None:
    source, dim, start, end, step = _slice_operands(node)
    if same_shape(shape_of(source), shape_of(node)) and step == 1:
        return source
    dim = dim % value_of(source).dim()
    extent = shape_of(source)[dim]
    if isinstance(extent, int):
        start = _clamp(start, extent) if isinstance(start, int) else start
        end = _clamp(end, extent) if isinstance(end, int) else end
    arguments = (source, dim, start, end) if step == 1 else (source, dim, start, end, step)
    return None if node.args == arguments else emit(aten.slice.Tensor, *arguments)


def _slice_operands(node: fx.Node) -> tuple[Any, Any, Any, Any, Any]:
    defaults = (None, 0, None, None, 1)
    values = (*node.args, *defaults[len(node.args) :])
    start = 0 if values[2] is None else values[2]
    end = _END if values[3] is None else values[3]
    return values[0], values[1], start, end, values[4]


def _clamp(bound: int, extent: int) -> int:
    return min(max(bound + extent if bound < 0 else bound, 0), extent)


def _split(emit: Emitter, getitem: fx.Node) -> fx.Node | None:
    split, index = getitem.args
    if isinstance(split, fx.Node) and split.target == aten.unbind.int:
        dim = split.args[1] if len(split.args) > 1 else split.kwargs.get("dim", 0)
        return emit(aten.select.int, split.args[0], dim, index)
    targets = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.split.sizes)
    if not isinstance(split, fx.Node) or split.target not in targets:
        return None
    dim = (split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)) % value_of(split.args[0]).dim()
    extents = [part.shape[dim] for part in value_of(split)]
    if not all(isinstance(extent, int) for extent in extents):
        return None
    if len(extents) == 1:
        return split.args[0]  # type: ignore[return-value]
    start = sum(extents[:index])
    return emit(aten.slice.Tensor, split.args[0], dim, start, start + extents[index])


def _concatenate(emit: Emitter, node: fx.Node) -> fx.Node | None:
    parts = node.args[0]
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    kept = [part for part in parts if not same_size(value_of(part).numel(), 0)]
    if any(value_of(part).dtype != value_of(node).dtype for part in parts):
        return None
    if len(kept) == 1:
        return kept[0]
    dim = dim % value_of(node).dim()
    if len(kept) == len(parts) and node.args == (parts, dim):
        return None
    return emit(aten.cat.default, kept, dim) if kept else None


def _expand(_emit: Emitter, node: fx.Node) -> fx.Node | None:
    return node.args[0] if same_shape(shape_of(node.args[0]), shape_of(node)) else None


def _neutral_scalar(neutral: float) -> Rewrite:
    def rewrite(_emit: Emitter, node: fx.Node) -> fx.Node | None:
        source, scalar = node.args[0], node.args[1]
        if isinstance(scalar, fx.Node) or not isinstance(source, fx.Node) or "alpha" in node.kwargs:
            return None
        same = scalar == neutral and value_of(source).dtype == value_of(node).dtype
        return source if same else None

    return rewrite


def _multiply(emit: Emitter, node: fx.Node) -> fx.Node | None:
    left, right = node.args
    if left is right and value_of(left).is_floating_point():
        return emit(aten.pow.Tensor_Scalar, left, 2)
    return _neutral_scalar(1)(emit, node)


def _square(emit: Emitter, node: fx.Node) -> fx.Node | None:
    source = node.args[0]
    return emit(aten.pow.Tensor_Scalar, source, 2) if value_of(source).is_floating_point() else None


def _size(emit: Emitter, node: fx.Node) -> fx.Node | None:
    source, dim = node.args
    if source.op == "placeholder" or isinstance(value_of(node), int):
        return None
    size = emit.size(source, dim)
    return size if isinstance(size, fx.Node) and size.args[:1] != (source,) else None


def _dropout(_emit: Emitter, node: fx.Node) -> fx.Node | None:
    probability, train = node.args[1], node.args[2]
    return node.args[0] if not train or probability == 0 else None


def _repeat_of_one(_emit: Emitter, node: fx.Node) -> fx.Node | None:
    return node.args[0] if same_shape(shape_of(node.args[0]), shape_of(node)) else None


_REWRITES: dict[Any, Rewrite] = {
    **dict.fromkeys(
        (
            aten.alias.default,
            aten.detach.default,
            aten.lift_fresh_copy.default,
            aten.lift_fresh.default,
            aten.clone.default,
            aten.contiguous.default,
            aten.positive.default,
        ),
        _operand,
    ),
    **dict.fromkeys(
        (aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.type_as.default), _cast
    ),
    aten.to.other: _cast,
    **dict.fromkeys(
        (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten._reshape_alias.default), _reshape
    ),
    aten.flatten.using_ints: _flatten,
    **dict.fromkeys(
        (aten.transpose.int, aten.permute.default, aten.t.default, aten.mT.default, aten.swapaxes.default), _permute
    ),
    aten.slice.Tensor: _slice,
    aten.cat.default: _concatenate,
    aten.expand.default: _expand,
    aten.repeat.default: _repeat_of_one,
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar), _neutral_scalar(0)),
    aten.mul.Tensor: _multiply,
    aten.mul.Scalar: _neutral_scalar(1),
    aten.square.default: _square,
    aten.div.Tensor: _neutral_scalar(1),
    aten.dropout.default: _dropout,
    aten.sym_size.int: _size,
}


def _rewrite_of(node: fx.Node) -> Rewrite | None:
    if getattr(node.target, "__name__", "") == "getitem":
        return _split
    return _REWRITES.get(node.target)


def _merge_equal_calls(model_graph: ModelGraph, context: PassContext) -> None:
    seen: dict[Any, fx.Node] = {}
    for node in list(model_graph.graph.nodes):
        if node.op != "call_function" or not node.users or node.is_impure() or _is_random(node):
            continue
        key = _hashable((node.target, node.args, node.kwargs))
        first = seen.setdefault(key, node)
        if first is node:
            continue
        site = context.claim(node)
        if site is not None:
            context.replace(site, node, first)


def _is_random(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _hashable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *(_hashable(element) for element in value))
    if isinstance(value, dict):
        return tuple(sorted((key, _hashable(element)) for key, element in value.items()))
    if isinstance(value, (bool, int, float)):
        return (type(value).__name__, repr(value))
    return value


def _storages_of_outputs(model_graph: ModelGraph, *, copies: bool) -> list[fx.Node | None]:
    """For each output the node whose storage it has: itself, or what it is a view of.

    Calls that copy only where they must are taken to copy if ``copies``, else to return a view.
    """
    return [_viewed(argument, copies) for argument in model_graph.output_node().args[0]]


def _viewed(node: Any, copies: bool) -> fx.Node | None:
    while isinstance(node, fx.Node) and node.op == "call_function" and _is_view(node, copies):
        node = node.args[0]
    return node if isinstance(node, fx.Node) else None


def _is_view(node: fx.Node, copies: bool) -> bool:
    if getattr(node.target, "__name__", "") == "getitem":
        return True
    if node.target in (aten.reshape.default, aten.flatten.using_ints, aten.contiguous.default):
        return not copies
    arguments = node.target._schema.arguments if isinstance(node.target, torch._ops.OpOverload) else []
    if not arguments or arguments[0].alias_info is None:
        return False
    # Casts are declared as views too, since they are where the dtype stays.
    source, value = value_of(node.args[0]), value_of(node)
    return not isinstance(value, torch.Tensor) or (source.dtype, source.device) == (value.dtype, value.device)


def _keep_outputs_apart(model_graph: ModelGraph, before: list[fx.Node | None]) -> None:
    """Copy outputs that had storage of their own and now share that of an input or of another output."""
    output = model_graph.output_node()
    results = list(output.args[0])
    after = _storages_of_outputs(model_graph, copies=False)
    first_with: dict[fx.Node, fx.Node | None] = {}
    for position, (old, new) in enumerate(zip(before, after, strict=True)):
        if new is None or not isinstance(value_of(new), torch.Tensor):
            continue
        shares_input = new.op == "placeholder" and old is not new
        if shares_input or first_with.setdefault(new, old) is not old:
            with model_graph.inserting_before(output) as emit:
                results[position] = emit(aten.clone.default, results[position])
    output.args = (tuple(results),)


def run(model_graph: ModelGraph, context: PassContext) -> None:
    storages = _storages_of_outputs(model_graph, copies=True)
    _merge_equal_calls(model_graph, context)
    for node in list(model_graph.graph.nodes):
        if node.op != "call_function":
            continue
        if not node.users:
            continue
        rewrite = _rewrite_of(node)
        if rewrite is None:
            continue
        with model_graph.inserting_before(node) as emit:
            new = rewrite(emit, node)
        if new is None:
            continue
        site = context.claim(node)
        if site is not None:
            context.replace(site, node, new)
    _merge_equal_calls(model_graph, context)
    _keep_outputs_apart(model_graph, storages)
    model_graph.eliminate_dead_code()


NORMALIZE = Pass("normalize", run)
