"""Fewer heads of keys and values: multi-head attention becomes grouped-query or multi-query attention.

    k, v = heads(linear(x, wk), 8), heads(linear(x, wv), 8)    ->    k, v = heads(linear(x, wk'), 2), heads(…, 2)
    y = attention(q, k, v)                                           y = attention(q, k, v)

Shazeer 2019; Ainslie et al. 2023. For the option ``kv_heads``: heads in groups of equal size become one each, whose
weights and biases are the mean of the group's, or the first or a random head's. With "aligned" heads are first turned
to lie over one another on the calibration samples, values by any orthogonal map, keys by those that a rotary embedding
cannot see: an angle for each pair that it turns, and signs alone where each head is normalised after its linear. The
queries and the linear behind attention are turned back, so that this changes nothing; heads that are alike are put
into one group, in whatever order the model has them. Heads that are equal to begin with are merged with no error.
Caches and merged weights follow, as passes behind this one see an attention of fewer heads. It needs weights that the
graph owns (``frozen``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ..codegen.model_graph import ModelGraph, shape_of, source_line
from ..codegen.ops import attention, linear
from ..runtime.errors import ConfigError
from .attention_errors import AttentionErrors
from .attention_heads import NoHeadsError, ProjectedHeads, ReadHeads, projected_heads, read_heads
from .calibration import Calibration, Tensors, observe
from .graph_pass import NumericClass, Pass, PassContext
from .grouped_query import GroupedQuery
from .head_alignment import Turns
from .head_merging import HeadPlan, head_moments, plan_by_moments, plan_by_name
from .quantizable_linears import parameters_of
from .recipe_layers import layer_names

# How far outputs move depends on the model alone, and is for the report.
CONVERSION = NumericClass("lossy", math.inf)


def run(model_graph: ModelGraph, context: PassContext) -> None:
    wanted = context.config.grouped_query
    if wanted is None:
        return
    if not model_graph.frozen:
        what = "kv_heads changes weights, and those of torch.compile are the user's"
        raise ConfigError(what, remedy="use LLM", field="kv_heads")
    if wanted.needs_calibration and context.calibration is None:
        what = "aligned heads need samples of text to see which directions they share"
        raise ConfigError(what, remedy="LLM(..., calibration=texts), or another merge", field="calibration")
    _Converter(model_graph, context, wanted).convert()


@dataclass(frozen=True)
class _Layer:
    """An attention that gets fewer heads; ``query`` and ``reader`` are known where they take part."""

    node: fx.Node
    name: str
    key: ProjectedHeads
    value: ProjectedHeads
    query: ProjectedHeads | None
    reader: ReadHeads | None

    @property
    def num_heads(self) -> int:
        return len(self.key.rows)

    @property
    def turns(self) -> Turns:
        """The maps of keys that the rotary embedding and the norms leave alone."""
        assert self.query is not None
        size = self.key.rows.shape[1]
        is_normalized = self.key.norm is not None or self.query.norm is not None
        if self.key.rotary is None:
            return Turns(size, is_normalized=is_normalized)
        _, cosine, _, *interleaved = self.key.rotary.args
        half = int(shape_of(cosine)[-1]) // 2  # type: ignore[arg-type]
        if interleaved and interleaved[0]:
            return Turns(size, tuple(range(0, 2 * half, 2)), tuple(range(1, 2 * half, 2)), is_normalized)
        return Turns(size, tuple(range(half)), tuple(range(half, 2 * half)), is_normalized)


class _Converter:
    def __init__(self, model_graph: ModelGraph, context: PassContext, wanted: GroupedQuery) -> None:
        self._model_graph = model_graph
        self._context = context
        self._wanted = wanted

    def convert(self) -> None:
        nodes = self._model_graph.calls(attention.overload)
        if not nodes:
            what = "no attention was recognised in this model, so there are no heads to merge"
            raise ConfigError(what, remedy="infercomp.explain says why", field="kv_heads")
        for node in nodes:
            self._require_groups(node)
        layers = [layer for layer in map(self._layer, nodes) if layer is not None]
        layers = [layer for layer in layers if self._context.claim(layer.node) is not None]
        plans = self._plans(layers)
        outputs = [layer.reader.reader if layer.reader is not None else layer.node for layer in layers]
        errors = AttentionErrors(self._model_graph, self._context.evaluation, outputs)
        sites = self._context.sites
        changed = [self._rewrite(layer, plan) for layer, plan in zip(layers, plans, strict=True)]
        for site, old, new in zip(sites, outputs, changed, strict=True):
            site.replaced[old.name] = new.name
        self._model_graph.eliminate_dead_code()
        self._drop_unread_weights()
        self._context.layer_errors.extend(errors.of(changed, [layer.name for layer in layers]))

    def _require_groups(self, node: fx.Node) -> None:
        heads, groups = int(shape_of(node.args[1])[1]), self._wanted.groups  # type: ignore[arg-type]
        if heads % groups:
            divisors = ", ".join(str(each) for each in range(1, heads + 1) if heads % each == 0)
            raise ConfigError(
                f"kv_heads={groups} does not divide the {heads} heads of keys and values of {node.name}",
                where=source_line(node),
                remedy=f"choose one of {divisors}",
                field="kv_heads",
            )

    def _layer(self, node: fx.Node) -> _Layer | None:
        query, key, value = (node.args[place] for place in range(3))
        if shape_of(key)[1] == self._wanted.groups:  # type: ignore[arg-type]
            self._context.near_miss(node, f"it has {self._wanted.groups} heads of keys and values already")
            return None
        try:
            layer = _Layer(
                node,
                "",
                projected_heads(self._model_graph, key),  # type: ignore[arg-type]
                projected_heads(self._model_graph, value),  # type: ignore[arg-type]
                projected_heads(self._model_graph, query) if self._is_aligned else None,  # type: ignore[arg-type]
                read_heads(self._model_graph, node) if self._is_aligned else None,
            )
            self._require_turnable(layer)
        except NoHeadsError as error:
            self._context.near_miss(node, str(error))
            return None
        weight = parameters_of(layer.key.source)[0]
        name = layer_names(self._model_graph, weight)[0].rpartition(".")[0]
        return _Layer(node, name, layer.key, layer.value, layer.query, layer.reader)

    @property
    def _is_aligned(self) -> bool:
        return self._wanted.needs_calibration

    def _require_turnable(self, layer: _Layer) -> None:
        if layer.value.rotary is not None or layer.value.norm is not None:
            raise NoHeadsError("values are normalised or rotated")
        if layer.query is not None:
            rotations = [None if each.rotary is None else each.rotary.args[1:] for each in (layer.key, layer.query)]
            if rotations[0] != rotations[1]:
                raise NoHeadsError("queries and keys are rotated in different ways")

    def _plans(self, layers: Sequence[_Layer]) -> list[HeadPlan]:
        if self._is_aligned:
            assert self._context.calibration is not None
            return self._aligned_plans(layers, self._context.calibration)
        generator = torch.Generator().manual_seed(self._wanted.seed)
        groups = self._wanted.groups
        return [plan_by_name(self._wanted.merge, layer.num_heads, groups, generator) for layer in layers]

    def _aligned_plans(self, layers: Sequence[_Layer], calibration: Calibration) -> list[HeadPlan]:
        readers: dict[fx.Node, list[tuple[_Layer, str]]] = {}
        for layer in layers:
            for role in ("key", "value"):
                readers.setdefault(getattr(layer, role).source, []).append((layer, role))
        moments: dict[tuple[fx.Node, str], torch.Tensor] = {}
        plans: dict[fx.Node, HeadPlan] = {}

        def measure(source: fx.Node, values: Sequence[torch.Tensor]) -> Tensors:
            found = {}
            for layer, role in readers[source]:
                heads: ProjectedHeads = getattr(layer, role)
                is_normalized = heads.norm is not None
                found[f"{layer.node.name}.{role}"] = head_moments(values, heads.rows, is_normalized=is_normalized)
            return found

        def visit(source: fx.Node, measured: Tensors) -> None:
            for layer, role in readers[source]:
                moments[layer.node, role] = measured[f"{layer.node.name}.{role}"]
                if (layer.node, "key") in moments and (layer.node, "value") in moments:
                    of_keys, of_values = (moments.pop((layer.node, each)) for each in ("key", "value"))
                    may_regroup = not self._tells_heads_apart(layer.node)
                    plans[layer.node] = plan_by_moments(
                        of_keys, of_values, layer.turns, self._wanted.groups, may_regroup=may_regroup
                    )

        names = {each: layers[0][0].name for each, layers in readers.items()}
        observe(self._model_graph, calibration, names, "convert_attention", measure, visit)
        return [plans[layer.node] for layer in layers]

    def _tells_heads_apart(self, node: fx.Node) -> bool:
        """Whether something else than queries, keys and values belongs to single heads: slopes of ALiBi, sinks."""
        operands = node.args[3:6]
        bias, others = operands[0] if operands else None, operands[1:]
        has_heads = isinstance(bias, fx.Node) and len(shape_of(bias)) > 2 and shape_of(bias)[-3] != 1
        return has_heads or any(each is not None for each in others)

    def _rewrite(self, layer: _Layer, plan: HeadPlan) -> fx.Node:
        """Emit the attention of fewer heads; returns what stands where its output can be compared."""
        node, anchor = layer.node, layer.node
        key = self._projection(anchor, layer.key, "key", plan.merged, plan.key_maps)
        value = self._projection(anchor, layer.value, "value", plan.merged, plan.value_maps)
        query = node.args[0]
        if layer.query is not None:
            query = self._projection(anchor, layer.query, "query", plan.regrouped, plan.key_maps)
        with self._model_graph.inserting_before(anchor) as emit:
            new = emit(attention, query, key, value, *node.args[3:], **node.kwargs)
        node.replace_all_uses_with(new, propagate_meta=False)
        return new if layer.reader is None else self._turn_back(layer.reader, plan)

    def _projection(self, anchor, heads: ProjectedHeads, role: str, change, maps) -> fx.Node:  # type: ignore[no-untyped-def]
        weight, bias, is_transposed = parameters_of(heads.source)
        rows = heads.rows.flatten()
        tensors = self._model_graph.weights
        matrix = tensors[weight.name].detach()
        own = (matrix.t() if is_transposed else matrix)[rows]
        count, size = heads.rows.shape
        is_whole = count * size == shape_of(heads.source)[-1]
        suffix = "" if is_whole else f".{role}"
        new = change(own.double().view(count, size, -1), maps).flatten(0, 1)
        new_weight = self._add_weight(weight, new, suffix)
        new_bias = None
        if bias is not None:
            of_heads = tensors[bias.name].detach()[rows].double().view(count, size)
            new_bias = self._add_weight(bias, change(of_heads, maps).flatten(), suffix)
        with self._model_graph.inserting_before(anchor) as emit:
            return heads.emitted(emit, new_weight, new_bias)

    def _turn_back(self, heads: ReadHeads, plan: HeadPlan) -> fx.Node:
        node = heads.reader
        weight, bias, is_transposed = parameters_of(node)
        tensor = self._model_graph.weights[weight.name].detach()
        columns = (tensor if is_transposed else tensor.t())[heads.columns.flatten()].double()
        changed = plan.regrouped(columns.view(*heads.columns.shape, -1), plan.value_maps)
        new = torch.empty_like(columns)
        new[heads.columns.flatten()] = changed.flatten(0, 1)
        new_weight = self._add_weight(weight, new.t().contiguous(), "")
        with self._model_graph.inserting_before(node) as emit:
            turned = emit(linear, node.args[0], new_weight, bias)
        node.replace_all_uses_with(turned, propagate_meta=False)
        return turned

    def _add_weight(self, old: fx.Node, value: torch.Tensor, suffix: str) -> fx.Node:
        """A parameter in the dtype of the one that it is made of, under its name in the model."""
        tensor = value.to(self._model_graph.weights[old.name].dtype)
        with self._model_graph.fake_mode:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        name = f"{old.name}_grouped{suffix.replace('.', '_')}"
        node = self._model_graph.add_placeholder(name, fake, weight=tensor)
        source = self._model_graph.weight_sources.get(old.name)
        if source is not None:
            stem, dot, kind = source.rpartition(".")
            self._model_graph.weight_sources[node.name] = f"{stem}{suffix}{dot}{kind}"
        return node

    def _drop_unread_weights(self) -> None:
        for node in [each for each in self._model_graph.graph.nodes if self._model_graph.is_weight(each)]:
            if not node.users:
                self._model_graph.graph.erase_node(node)
                del self._model_graph.weights[node.name]
                self._model_graph.weight_sources.pop(node.name, None)


CONVERT_ATTENTION = Pass(
    "convert_attention",
    run,
    CONVERSION,
    after=("recognize_linear", "recognize_norm", "fuse_rope", "recognize_attention", "recognize_masks"),
)
