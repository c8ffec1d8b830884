"""The pipeline is one tuple; the runner does for every pass what is common to all.

Standardise first (``recognize_*``, ``fuse_rope``), then optimise (``merge_*``), then serve
(``page_attention``, ``select_logit_rows``), then round (``quantize_linears``, ``quantize_kv_cache``) and compress
(``compress_weights``). A new model needs a new recogniser, a new optimisation none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..codegen.model_graph import ModelGraph
from ..runtime.errors import PassError
from .allocate_bits import ALLOCATE_BITS
from .calibration import Calibration, Progress, silent
from .compress_weights import COMPRESS_WEIGHTS
from .config import PassConfig, check_pass_names
from .convert_attention import CONVERT_ATTENTION
from .fix_activation_scales import FIX_ACTIVATION_SCALES
from .fold_constants import FOLD_CONSTANTS
from .fuse_embedding_norm import FUSE_EMBEDDING_NORM
from .fuse_gated_epilogue import FUSE_GATED_EPILOGUE
from .fuse_linear_epilogue import FUSE_LINEAR_EPILOGUE
from .fuse_norm_gather import FUSE_NORM_GATHER
from .fuse_norm_quantize import FUSE_NORM_QUANTIZE
from .fuse_pointwise import FUSE_POINTWISE
from .fuse_residual_norm import FUSE_RESIDUAL_NORM
from .fuse_rope import FUSE_ROPE
from .fuse_rotary_write import FUSE_ROTARY_WRITE
from .graph_pass import Decision, MatchBudget, Pass, PassContext
from .layer_errors import LayerErrors
from .merge_linears import MERGE_LINEARS
from .normalize import NORMALIZE
from .page_attention import PAGE_ATTENTION
from .quantize_kv_cache import QUANTIZE_KV_CACHE
from .quantize_linears import QUANTIZE_LINEARS
from .recognize_attention import RECOGNIZE_ATTENTION
from .recognize_gated_mlp import RECOGNIZE_GATED_MLP
from .recognize_linear import RECOGNIZE_LINEAR
from .recognize_masks import RECOGNIZE_MASKS
from .recognize_norm import RECOGNIZE_NORM
from .record import PassRecord
from .round_weights import ROUND_WEIGHTS
from .select_logit_rows import SELECT_LOGIT_ROWS
from .smooth_activations import SMOOTH_ACTIVATIONS
from .sparsify_linears import SPARSIFY_LINEARS
from .split_channels import SPLIT_CHANNELS
from .verify import check_structure, measure, output_values, tape_of
from .widen_activations import WIDEN_ACTIVATIONS

PIPELINE: tuple[Pass, ...] = (
    NORMALIZE,
    RECOGNIZE_LINEAR,
    RECOGNIZE_NORM,
    FUSE_ROPE,
    RECOGNIZE_ATTENTION,
    RECOGNIZE_MASKS,
    RECOGNIZE_GATED_MLP,
    FOLD_CONSTANTS,
    CONVERT_ATTENTION,
    SPARSIFY_LINEARS,
    SMOOTH_ACTIVATIONS,
    SPLIT_CHANNELS,
    WIDEN_ACTIVATIONS,
    FIX_ACTIVATION_SCALES,
    ALLOCATE_BITS,
    ROUND_WEIGHTS,
    MERGE_LINEARS,
    PAGE_ATTENTION,
    SELECT_LOGIT_ROWS,
    QUANTIZE_LINEARS,
    COMPRESS_WEIGHTS,
    QUANTIZE_KV_CACHE,
    FUSE_GATED_EPILOGUE,
    FUSE_LINEAR_EPILOGUE,
    FUSE_RESIDUAL_NORM,
    FUSE_EMBEDDING_NORM,
    FUSE_NORM_GATHER,
    FUSE_NORM_QUANTIZE,
    FUSE_ROTARY_WRITE,
    FUSE_POINTWISE,
)

OnChange = Callable[[int, str, ModelGraph, Mapping[str, Any] | None], None]


def pass_names(pipeline: tuple[Pass, ...] = PIPELINE) -> tuple[str, ...]:
    return tuple(graph_pass.name for graph_pass in pipeline)


def check_order(pipeline: tuple[Pass, ...]) -> None:
    """Raise PassError where a pass stands before one that it declares to come after."""
    seen: set[str] = set()
    for graph_pass in pipeline:
        missing = [name for name in graph_pass.after if name not in seen]
        if missing:
            raise PassError(
                f"{graph_pass.name} must come after {', '.join(missing)}",
                pass_name=graph_pass.name,
                remedy="reorder the pipeline tuple",
            )
        seen.add(graph_pass.name)


def run_pipeline(
    model_graph: ModelGraph,
    config: PassConfig,
    *,
    serving: bool = False,
    example_inputs: Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
    evaluation: Sequence[Mapping[str, Any]] = (),
    pipeline: tuple[Pass, ...] = PIPELINE,
    on_change: OnChange | None = None,
    progress: Progress = silent,
) -> tuple[PassRecord, ...]:
    """Run the passes in order on ``model_graph``, in place; one record a pass.

    ``example_inputs`` (by placeholder name) are needed for ``config.verify``, ``calibration`` for recipes that say so.
    ``evaluation`` are samples that the errors of rounded layers are measured on, ``progress`` shows long work without
    samples. Raises ConfigError for an unknown pass name, VerificationError where a pass breaks the graph or leaves
    its class.
    """
    check_pass_names(config, pass_names(pipeline))
    check_order(pipeline)
    budget = MatchBudget(config.limit)
    inputs = example_inputs
    decisions: dict[str, Decision] = {}
    layer_errors = LayerErrors(evaluation) if evaluation else None
    records = []
    for index, graph_pass in enumerate(pipeline, start=1):
        if graph_pass.serving and not serving:
            continue
        # What serving cannot do without is no step of a bisection.
        own_budget = budget if graph_pass.optional else MatchBudget(None)
        context = PassContext(graph_pass.name, config, own_budget, calibration, decisions, evaluation, progress)
        record, inputs = _run_pass(graph_pass, model_graph, context, inputs, layer_errors)
        if record.matches and on_change is not None:
            on_change(index, graph_pass.name, model_graph, inputs)
        records.append(record)
    return tuple(records)


def _run_pass(
    graph_pass: Pass,
    model_graph: ModelGraph,
    context: PassContext,
    inputs: Mapping[str, Any] | None,
    layer_errors: LayerErrors | None,
) -> tuple[PassRecord, Mapping[str, Any] | None]:
    """The pass's record, and the example inputs as the graph takes them after it."""
    is_measured = context.config.verify
    before = tape_of(model_graph) if is_measured else []
    weights_before = dict(model_graph.weights) if is_measured else {}
    outputs_before = output_values(model_graph)
    if layer_errors is not None:
        layer_errors.before(model_graph, context, graph_pass.numeric_class)
    start = time.perf_counter()
    graph_pass.run(model_graph, context)
    milliseconds = (time.perf_counter() - start) * 1e3
    check_structure(model_graph, None if graph_pass.serving else outputs_before, graph_pass.name)
    inputs_after = inputs if inputs is None or context.input_adapter is None else context.input_adapter(inputs)
    max_error = None
    if is_measured and context.sites and inputs is not None and inputs_after is not None:
        max_error = measure(
            before, weights_before, inputs, model_graph, inputs_after, context, graph_pass.numeric_class
        )
    record = PassRecord(
        name=graph_pass.name,
        numeric_class=graph_pass.numeric_class.name,
        matches=len(context.sites),
        skipped=context.num_skipped,
        sites=tuple(context.sites),
        near_misses=tuple(context.near_misses),
        milliseconds=milliseconds,
        max_error=max_error,
        layer_errors=(*context.layer_errors, *(layer_errors.after(model_graph, context) if layer_errors else ())),
    )
    return record, inputs_after
