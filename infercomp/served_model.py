"""A causal language model as a step function: what it is captured as, and how a step reaches it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .capture import capture_export
from .codegen.model_graph import ModelGraph, value_of
from .compiler import Compiled
from .runtime.config import RuntimeConfig
from .runtime.decode_graphs import Capture, DecodeGraphs
from .runtime.kv_pools import KvCacheSpec
from .runtime.step import STEP_INPUT_NAMES, StepInputs
from .runtime.triton_step import TritonStep

_POSITION_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
_CAPTURE_LENGTH = 7


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


class ServedModel:
    """The compiled step with its weights bound."""

    def __init__(self, compiled: Compiled) -> None:
        graph = compiled.model_graph
        self._input_names = compiled.program.input_names
        self.program = compiled.program
        self._bound = compiled.program.bind_releasing(graph.weights)
        self.cache_specs = _cache_specs(graph)
        logits = value_of(graph.output_node().args[0][0])
        self.vocab_size = int(logits.shape[-1])
        self.device = logits.device

    @property
    def runs_as_graph(self) -> bool:
        """Whether every call of the step is queued on a GPU: definitions may read values back."""
        calls = [op for op in self.program.ops if op.op != "infercomp.merge_weights"]
        is_queued = all(op.how in ("triton", "aten") for op in calls)
        return self.device.type == "cuda" and is_queued and any(op.how == "triton" for op in calls)

    def with_graphs(
        self, pools: Mapping[str, torch.Tensor], num_blocks: int, config: RuntimeConfig, capture: Capture
    ) -> DecodeGraphs:
        """The step over caches of one block more than ``num_blocks``, decoding by graphs."""
        return DecodeGraphs(
            self.with_pools(pools),
            capture,
            max_num_sequences=config.max_num_seqs,
            spare_slot=num_blocks * config.block_size,
            device=self.device,
            check=self._check,
        )

    def _check(self) -> None:
        for step in self.program.steps:
            if isinstance(step, TritonStep):
                step.check()

    def with_pools(self, pools: Mapping[str, torch.Tensor]) -> Callable[[StepInputs], torch.Tensor]:
        """The step over these caches: StepInputs of T tokens -> logits [R, vocabulary]."""

        arguments = [None if name in STEP_INPUT_NAMES else pools[name] for name in self._input_names]
        varying = [(i, name) for i, name in enumerate(self._input_names) if name in STEP_INPUT_NAMES]

        def step(inputs: StepInputs) -> torch.Tensor:
            given: list[Any] = arguments.copy()
            for position, name in varying:
                given[position] = getattr(inputs, name).to(self.device)
            with torch.inference_mode():
                return self._bound(*given)[0][0]

        return step


def _cache_specs(graph: ModelGraph) -> tuple[KvCacheSpec, ...]:
    names = [
        name.removesuffix("_key") for name in graph.input_names if name.startswith("layer_") and name.endswith("_key")
    ]
    specs = []
    for name in names:
        key, value = (value_of(graph.placeholder(f"{name}_{role}")) for role in ("key", "value"))
        if key.dim() == 4:
            specs.append(KvCacheSpec(name, int(key.shape[2]), int(key.shape[3]), int(value.shape[3]), key.dtype))
        else:
            heads, tile = int(key.shape[1]), int(key.shape[4])
            specs.append(KvCacheSpec(name, heads, int(key.shape[2]) * tile, int(value.shape[3]), key.dtype, tile))
    return tuple(specs)
