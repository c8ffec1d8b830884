"""From a causal language model to the form in which it is served: what it is captured as, and compiled to."""

from __future__ import annotations

import gc
import inspect
import json
from collections.abc import Collection, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch

from .calibration_samples import calibration_for, evaluation_for
from .capture import capture_export
from .codegen.model_graph import ModelGraph, value_of
from .codegen.ops import write_kv
from .codegen.regions import named_arguments
from .compiler import lower_graph, rewrite_graph
from .config import Config
from .loading.compressed_tensors import SCALE
from .loading.stored_linears import StoredLinear
from .passes.compress_weights import SPARSE_VALUES
from .passes.grouped_query import GroupedQuery
from .passes.quantize_linears import ZERO_VALUE
from .passes.sparsify_linears import CHANNEL_ORDER
from .progress import work_progress
from .runtime.disk_memory import DiskMemory, DiskWeights
from .runtime.kv_pools import KvCacheSpec
from .served_linears import linears_of
from .served_model import ServedForm
from .stored_recipe import require_all_found, require_all_taken
from .texts import NO_TEXTS, Texts

_POSITION_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
_CAPTURE_LENGTH = 7
_KV_HEADS = "num_key_value_heads"


class _Uncached(torch.nn.Module):
    """The model's forward over one sequence, without a cache, as a function of ids and positions."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self._options = {"use_cache": False} if "use_cache" in _parameters(model) else {}

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return _logits(self.model(input_ids=input_ids, position_ids=position_ids, **self._options))


class _UncachedWithoutPositions(_Uncached):
    """The same for a model that counts positions by itself (ALiBi models)."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return _logits(self.model(input_ids=input_ids, **self._options))


def _parameters(model: torch.nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters


def _logits(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.logits


def capture_for_serving(
    model: torch.nn.Module, max_positions: int | None
) -> tuple[ModelGraph, dict[str, torch.Tensor]]:
    """The uncached forward of ``model`` for every length, and the example inputs it was captured with."""
    length = min(_CAPTURE_LENGTH, max_positions - 1) if max_positions else _CAPTURE_LENGTH
    device = next(model.parameters()).device
    examples = {"input_ids": torch.arange(1, length + 1, device=device)[None]}
    wrapper: torch.nn.Module = _UncachedWithoutPositions(model)
    if "position_ids" in _parameters(model):
        examples["position_ids"] = torch.arange(length, device=device)[None]
        wrapper = _Uncached(model)
    # The last position is left to the proof: models guard on "longer than the table" exactly there.
    limit = max_positions - 1 if max_positions else None
    return capture_export(wrapper, examples, max_length=limit), examples


def position_limit(model: torch.nn.Module) -> int | None:
    """The number of positions that the model's config allows, or None where nothing limits them (ALiBi)."""
    config = getattr(model, "config", None)
    for name in _POSITION_LIMITS:
        limit = getattr(config, name, None)
        if isinstance(limit, int):
            return limit
    return None


def end_of_sequence_ids(model: torch.nn.Module, tokenizer: Any) -> frozenset[int]:
    """Ids that end a completion: the generation config's, else the config's, else the tokenizer's."""
    for holder in (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()


def compile_for_serving(
    model: torch.nn.Module,
    tokenizer: Any,
    config: Config,
    linears: Mapping[str, StoredLinear] | None = None,
    texts: Texts = NO_TEXTS,
    *,
    releases_model: bool = False,
    disk: DiskMemory | None = None,
) -> tuple[ServedForm, MutableMapping[str, torch.Tensor]]:
    """The served form of ``model``, and its weights by their names in the program.

    ``linears`` are those whose weights come in integers. Where ``releases_model``, the model loses its tensors, so that
    each goes once a pass has replaced it. With ``disk``, weights are there until they are looked at. Raises
    UnsupportedError for a linear in integers that no kernel takes.
    """
    limit, facts = position_limit(model), _CheckpointFacts.of(model)
    captured, examples = capture_for_serving(model, limit)
    if releases_model:
        model.to("meta")
        # Capturing leaves cycles behind that hold the tensors.
        gc.collect()
    if disk is not None:
        captured.weights = DiskWeights(disk, captured.weights)
    if linears:
        readers = {f"model.{name}.weight": linear.read for name, linear in linears.items()}
        sources = captured.weight_sources
        captured.stored_integers |= {n: readers[source] for n, source in sources.items() if source in readers}
        steps = {f"model.{name}.weight": linear.input_step for name, linear in linears.items()}
        captured.stored_steps |= {n: step for n, source in sources.items() if (step := steps.get(source)) is not None}
        require_all_found(linears, {source.removeprefix("model.") for source in sources.values()})
    sizes = {"vocab_size": getattr(getattr(model, "config", None), "vocab_size", None), "max_positions": limit}
    heads = config.passes.grouped_query
    data, folder = texts.calibration, texts.calibration_folder
    samples = calibration_for(config.passes, data, tokenizer, examples, folder=folder, **sizes)
    evaluated = evaluation_for(texts.evaluation, tokenizer, examples, **sizes)
    rewritten = rewrite_graph(
        captured,
        config,
        examples,
        serving=True,
        calibration=samples,
        evaluation=evaluated,
        progress=work_progress,
    )
    if linears:
        require_all_taken(captured, rewritten.records)
    compiled = lower_graph(rewritten, config)
    if isinstance(captured.weights, DiskWeights):
        captured.weights.bring_in(compiled.program.weight_names)
    logits = value_of(captured.output_node().args[0][0])
    names = {name: source.removeprefix("model.") for name, source in captured.weight_sources.items()}
    # What smoothing has put behind a norm is none of the model's own tensors, nor is what a weight is compressed to.
    has_factors = any(name.endswith("_smoothing") for name in captured.weights)
    has_factors |= any(name.endswith((SPARSE_VALUES, ZERO_VALUE)) for name in names.values())
    has_factors |= any(name.endswith(CHANNEL_ORDER) for name in captured.weights)
    specs = _cache_specs(captured)
    has_factors |= heads is not None and any(spec.num_kv_heads != heads.groups for spec in specs)
    form = ServedForm(
        compiled.program,
        compiled.report,
        config,
        specs,
        int(logits.shape[-1]),
        logits.device,
        limit,
        end_of_sequence_ids(model, tokenizer),
        names,
        None if has_factors else facts.config_for(names.values(), heads),
        linears_of(captured),
    )
    return form, captured.weights


@dataclass(frozen=True)
class _CheckpointFacts:
    """What is to be known of a model to say whether other tools could load its tensors once they are quantised."""

    config: str | None
    own_linears: frozenset[str]
    """The names of linears whose weights no other module holds."""

    @classmethod
    def of(cls, model: Any) -> _CheckpointFacts:
        modules = dict(model.named_modules())
        others = [module for module in modules.values() if not isinstance(module, torch.nn.Linear)]
        elsewhere = {id(parameter) for module in others for parameter in module.parameters(recurse=False)}
        linears = {name: module for name, module in modules.items() if isinstance(module, torch.nn.Linear)}
        own = frozenset(name for name, module in linears.items() if id(module.weight) not in elsewhere)
        config: Any = getattr(model, "config", None)
        return cls(config.to_json_string() if hasattr(config, "to_json_string") else None, own)

    def config_for(self, names: Collection[str], heads: GroupedQuery | None) -> dict[str, Any] | None:
        """The model's config if other tools could load tensors of these names with it: they know quantised linears."""
        quantized = {name.removesuffix(SCALE) for name in names if name.endswith(SCALE)}
        # A layer that was split has none of its own tensors any more.
        held = {name.rpartition(".weight")[0] for name in names}
        is_known = quantized <= self.own_linears <= held
        if not is_known or self.config is None:
            return None
        config: dict[str, Any] = json.loads(self.config)
        if heads is None:
            return config
        return {**config, _KV_HEADS: heads.groups} if _KV_HEADS in config else None


def _cache_specs(graph: ModelGraph) -> tuple[KvCacheSpec, ...]:
    specs = []
    for write in graph.calls(write_kv.overload):
        given = named_arguments(write)
        cache, key, value = (value_of(given[name]) for name in ("key_cache", "key", "value"))
        heads, width, value_width = int(cache.shape[1 if given["tile"] else 2]), int(key.shape[2]), int(value.shape[2])
        is_int8 = given["key_scale"] is not None
        name = given["key_cache"].name.removesuffix("_key")
        specs.append(KvCacheSpec(name, heads, width, value_width, key.dtype, given["tile"], is_int8))
    return tuple(specs)
