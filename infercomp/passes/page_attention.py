"""KV-cache insertion: an uncached forward of one sequence becomes a step over packed sequences.

    y = attention(q, k, v, is_causal=True)      ->  write_kv(k, v, key_cache_0, value_cache_0, slot_mapping)
                                                    y = paged_attention(q, key_cache_0, value_cache_0, block_tables,
                                                                        seq_lens, query_start_loc)

Three things are proved first, and a ProofError names the model's line where one fails:
*masks* — every attention is causal, causal within a window, or causal with ALiBi;
*positions* — sequence order enters only as ``position_ids`` or as an index that counts tokens;
*token-wise* — no other op lets one token see another (``token_axis``).
The caches and the fields of ``StepInputs`` become inputs of the graph under their own names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from ..codegen.model_graph import Emitter, ModelGraph, aten, same_size, shape_of, source_line, value_of
from ..codegen.ops import attention, paged_attention, write_kv
from ..codegen.ops.paged_attention import tile_of
from ..runtime.errors import ProofError
from ..runtime.kv_pools import Pool
from .graph_pass import Pass, PassContext
from .index_algebra import QUERY, IndexEvaluator
from .mask_proof import Unproved
from .recognize_masks import POSITION_INPUTS, bias_of, prove
from .token_axis import MixesTokens, token_axes

PASS_NAME = "page_attention"
VERIFY_BLOCK_SIZE = 4


def run(model_graph: ModelGraph, context: PassContext) -> None:
    attentions = model_graph.calls(attention.overload)
    if not attentions:
        raise ProofError(
            "no attention was recognised in this model, so there is nothing to put a cache under",
            pass_name=PASS_NAME,
            remedy="run infercomp.explain on the model: the near misses of recognize_attention say why",
        )
    _prove_masks(model_graph, attentions)
    counters = _token_counters(model_graph)
    _prove_token_wise(model_graph, counters)
    step = _add_step_inputs(model_graph, _outermost(counters))
    pools = _Pools(_pool_sizes(model_graph))
    for layer, node in enumerate(attentions):
        _page(model_graph, context, layer, node, step, pools)
    model_graph.eliminate_dead_code()
    for name in ("input_ids", *POSITION_INPUTS):
        if name in model_graph.input_names:
            model_graph.remove_input(name)
    _rename_step_inputs(model_graph, step)
    context.input_adapter = _verification_inputs(model_graph, pools)


def _prove_masks(model_graph: ModelGraph, attentions: list[fx.Node]) -> None:
    for node in attentions:
        if bias_of(node) is None and node.kwargs.get("is_causal"):
            continue
        proof = prove(model_graph, node) if bias_of(node) is not None else None
        if isinstance(proof, Unproved):
            what, picture = f"the mask of {node.name} is not causal: {proof.reason}", proof.picture()
            picture = "\n  mask, rows are queries, columns keys, # seen, . hidden, ? unknown:\n    " + picture.replace(
                "\n", "\n    "
            )
        else:
            what, picture = f"{node.name} attends to later tokens (no causal mask)", ""
        raise ProofError(
            what + picture,
            pass_name=PASS_NAME,
            site=node.name,
            where=source_line(node),
            remedy='a cache holds for causal masks only; use torch.compile(model, backend="infercomp") for this model',
        )


def _token_counters(model_graph: ModelGraph) -> dict[fx.Node, int]:
    """Index tensors built from the length alone whose entry i is i + offset: node -> offset."""
    length = _length_of(model_graph)
    from_tokens: set[fx.Node] = {node for node in model_graph.graph.nodes if node.op == "placeholder"}
    counters: dict[fx.Node, int] = {}
    for node in model_graph.graph.nodes:
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, torch.Tensor) or _reads(node, from_tokens, counters):
            from_tokens.add(node)
            continue
        offset = _counting_offset(model_graph, node, length)
        if offset is not None:
            counters[node] = offset
    return counters


def _reads(node: fx.Node, from_tokens: set[fx.Node], counters: dict[fx.Node, int]) -> bool:
    tensors = [source for source in node.all_input_nodes if isinstance(value_of(source), torch.Tensor)]
    return any(source in from_tokens for source in tensors)


def _counting_offset(model_graph: ModelGraph, node: fx.Node, length: Any) -> int | None:
    shape = shape_of(node)
    axes = [dim for dim, extent in enumerate(shape) if same_size(extent, length)]
    if len(axes) != 1 or any(not same_size(extent, 1) for dim, extent in enumerate(shape) if dim != axes[0]):
        return None
    index = tuple(QUERY if dim == axes[0] else sympy.Integer(0) for dim in range(len(shape)))
    value = IndexEvaluator(model_graph).evaluate(node, index)
    offset = sympy.expand(value - QUERY) if isinstance(value, sympy.Expr) else None
    return int(offset) if offset is not None and offset.is_Integer else None


def _outermost(counters: dict[fx.Node, int]) -> dict[fx.Node, int]:
    return {node: offset for node, offset in counters.items() if any(user not in counters for user in node.users)}


def _length_of(model_graph: ModelGraph) -> Any:
    return value_of(model_graph.placeholder("input_ids")).shape[1]


def _prove_token_wise(model_graph: ModelGraph, counters: dict[fx.Node, int]) -> None:
    inputs = dict.fromkeys(model_graph.input_names, 1)
    unknown = sorted(set(inputs) - {"input_ids", *POSITION_INPUTS})
    if unknown:
        raise ProofError(
            f"the model takes {', '.join(unknown)}, which no step provides",
            pass_name=PASS_NAME,
            remedy="capture it without",
        )
    try:
        axes = token_axes(model_graph, inputs, _length_of(model_graph), frozenset(counters))
    except MixesTokens as error:
        raise ProofError(
            f"{error.node.name} may let one token see another: {error}",
            pass_name=PASS_NAME,
            site=error.node.name,
            where=source_line(error.node),
            remedy='packing needs a token-wise model; use torch.compile(model, backend="infercomp") for this one',
        ) from error
    logits = model_graph.output_node().args[0][0]
    if axes[logits] != 1 or value_of(logits).dim() != 3:
        raise ProofError(
            f"the output is {shape_of(logits)}, expected logits [1, tokens, vocabulary]", pass_name=PASS_NAME
        )


def _symbolic_input(model_graph: ModelGraph, name: str, example: torch.Tensor, dynamic: tuple[int, ...]) -> fx.Node:
    """A new input whose dimensions ``dynamic`` get symbols of their own."""
    sizes = [DimDynamic.DYNAMIC if dim in dynamic else DimDynamic.STATIC for dim in range(example.dim())]
    fake = model_graph.fake_mode.from_tensor(
        example,
        source=ConstantSource(name),
        symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes, constraint_sizes=[None] * example.dim()),
    )
    return model_graph.add_placeholder(name, fake)


def _index_input(model_graph: ModelGraph, name: str, *extents: int) -> fx.Node:
    device = value_of(model_graph.placeholder("input_ids")).device
    return _symbolic_input(
        model_graph, name, torch.zeros(extents, dtype=torch.int64, device=device), tuple(range(len(extents)))
    )


def _add_step_inputs(model_graph: ModelGraph, counters: dict[fx.Node, int]) -> dict[str, fx.Node]:
    """The fields of StepInputs as placeholders, put in the place of ids, positions and token counters."""
    length = _length_of(model_graph)
    step = {}
    for name in ("packed_input_ids", "positions", "slot_mapping"):
        with model_graph.fake_mode:
            fake = torch.empty(length, dtype=torch.int64, device=value_of(model_graph.placeholder("input_ids")).device)
        step[name] = model_graph.add_placeholder(name, fake)
    step["block_tables"] = _index_input(model_graph, "block_tables", 3, 5)
    step["seq_lens"] = _index_input(model_graph, "seq_lens", 3)
    step["query_start_loc"] = _index_input(model_graph, "query_start_loc", 4)
    first_call = next(node for node in model_graph.graph.nodes if node.op != "placeholder")
    with model_graph.inserting_before(first_call) as emit:
        ids = emit(aten.unsqueeze.default, step["packed_input_ids"], 0)
        model_graph.placeholder("input_ids").replace_all_uses_with(ids, propagate_meta=False)
        if "position_ids" in model_graph.input_names:
            positions = emit(aten.unsqueeze.default, step["positions"], 0)
            model_graph.placeholder("position_ids").replace_all_uses_with(positions, propagate_meta=False)
    for node, offset in counters.items():
        with model_graph.inserting_before(node) as emit:
            node.replace_all_uses_with(_counted(emit, step["positions"], node, offset), propagate_meta=False)
    return step


def _counted(emit: Emitter, positions: fx.Node, node: fx.Node, offset: int) -> fx.Node:
    counted = emit(aten.add.Tensor, positions, offset) if offset else positions
    if value_of(node).dim() != 1:
        counted = emit(aten.reshape.default, counted, [-1 if not same_size(e, 1) else 1 for e in shape_of(node)])
    if value_of(node).dtype != torch.int64:
        counted = emit(aten._to_copy.default, counted, dtype=value_of(node).dtype)
    return counted


@dataclass
class _Pools:
    """The sizes that all pools share, and the layout of each."""

    sizes: tuple[Any, Any]
    layouts: dict[str, Pool] = field(default_factory=dict)


def _page(
    model_graph: ModelGraph,
    context: PassContext,
    layer: int,
    node: fx.Node,
    step: Mapping[str, fx.Node],
    pools: _Pools,
) -> None:
    site = context.claim(node)
    if site is None:
        raise ProofError(
            f"{PASS_NAME}#{layer} is switched off, but serving needs a cache under every attention",
            pass_name=PASS_NAME,
            remedy=f"remove {PASS_NAME} from disable (and raise limit), or use torch.compile",
        )
    query, key, value = node.args[:3]
    extras = list(node.args[4:6])
    options = {name: option for name, option in node.kwargs.items() if name not in ("is_causal", "bias")}
    tile = tile_of(value_of(key).dtype) if context.config.kv_cache_layout == "tiled" else 0
    names = (f"layer_{layer}_key", f"layer_{layer}_value")
    for name, operand in zip(names, (key, value), strict=True):
        pools.layouts[name] = Pool(shape_of(operand)[1], shape_of(operand)[3], tile, operand is key)
    key_cache, value_cache = (
        _cache_input(model_graph, name, pools.layouts[name], operand, pools.sizes)
        for name, operand in zip(names, (key, value), strict=True)
    )
    with model_graph.inserting_before(node) as emit:
        query, key, value = (_packed(emit, operand) for operand in (query, key, value))
        emit(write_kv, key, value, key_cache, value_cache, step["slot_mapping"], tile)
        tables = (step["block_tables"], step["seq_lens"], step["query_start_loc"])
        output = emit(paged_attention, query, key_cache, value_cache, *tables, *extras, **options, tile=tile)
        output = emit(aten.unsqueeze.default, emit(aten.permute.default, output, [1, 0, 2]), 0)
    context.replace(site, node, output)


def _packed(emit: Emitter, node: fx.Node) -> fx.Node:
    """[1, H, T, D] as [T, H, D]."""
    return emit(aten.permute.default, emit(aten.select.int, node, 0, 0), [1, 0, 2])


def _cache_input(model_graph: ModelGraph, name: str, pool: Pool, like: fx.Node, sizes: tuple[Any, Any]) -> fx.Node:
    """A pool as paged_attention reads it."""
    with model_graph.fake_mode:
        fake = torch.empty(pool.shape(*sizes), dtype=value_of(like).dtype, device=value_of(like).device)
    return model_graph.add_placeholder(name, fake)


def _pool_sizes(model_graph: ModelGraph) -> tuple[Any, Any]:
    """Symbols for the number of blocks and the positions of a block, which all pools share."""
    fake = model_graph.fake_mode.from_tensor(
        torch.empty(3, 8),
        source=ConstantSource("kv_cache"),
        symbolic_context=StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 2, constraint_sizes=[None] * 2),
    )
    return tuple(fake.shape)  # type: ignore[return-value]


def _rename_step_inputs(model_graph: ModelGraph, step: Mapping[str, fx.Node]) -> None:
    node = step["packed_input_ids"]
    names = tuple("input_ids" if name == node.name else name for name in model_graph.input_names)
    node.name = "input_ids"
    node.target = "input_ids"
    model_graph.input_names = names


def _verification_inputs(model_graph: ModelGraph, pools: _Pools):  # type: ignore[no-untyped-def]
    """How inputs of the uncached graph become a step that computes the same: one sequence, fresh caches."""
    caches = {
        name: value_of(model_graph.placeholder(name)) for name in model_graph.input_names if name.startswith("layer_")
    }

    def adapt(inputs: Mapping[str, Any]) -> dict[str, Any]:
        ids = inputs["input_ids"].reshape(-1)
        length, device = ids.numel(), ids.device
        num_blocks = -(-length // VERIFY_BLOCK_SIZE) + 1
        order = torch.arange(length, device=device)
        blocks = torch.arange(num_blocks - 1, -1, -1, device=device)
        step = {
            "input_ids": ids,
            "positions": order,
            "slot_mapping": blocks[order // VERIFY_BLOCK_SIZE] * VERIFY_BLOCK_SIZE + order % VERIFY_BLOCK_SIZE,
            "block_tables": blocks[None],
            "seq_lens": torch.tensor([length], device=device),
            "query_start_loc": torch.tensor([0, length], device=device),
        }
        for name, fake in caches.items():
            shape = pools.layouts[name].shape(num_blocks, VERIFY_BLOCK_SIZE)
            step[name] = torch.zeros(shape, dtype=fake.dtype, device=fake.device)
        return step

    return adapt


PAGE_ATTENTION = Pass(
    PASS_NAME,
    run,
    after=("recognize_masks", "recognize_norm", "fuse_rope", "merge_linears"),
    serving=True,
    optional=False,
)
