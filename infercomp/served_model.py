"""A compiled model as a step function: what serving needs to know of it, and how a step reaches it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch

from .config import Config
from .report import Report
from .runtime.config import RuntimeConfig
from .runtime.decode_graphs import Capture, DecodeGraphs
from .runtime.kv_pools import KvCacheSpec
from .runtime.program import Program
from .runtime.step import STEP_INPUT_NAMES, StepInputs
from .runtime.triton_step import TritonStep


@dataclass(frozen=True)
class ServedLinear:
    """A linear of the model: how many weights it has, and its codes, scales and zeros, or floats, by name.

    ``weight_bits`` are those of a code, or of a float; ``activation_bits`` is 8 for activations that are rounded, else
    16; ``input_step`` is that of the grid that they are on, where a token has none of its own.
    """

    name: str
    num_weights: int
    tensors: tuple[str, ...]
    is_head: bool
    weight_bits: int
    activation_bits: int
    input_step: float | None = None


@dataclass(frozen=True)
class ServedForm:
    """All that a compiled model is served by, but its weights.

    ``config`` is what it was compiled with; ``position_limit`` the most positions, None where nothing limits
    them; ``tensor_names`` maps the program's weights to the names of the model's own tensors, where they are
    such; ``model_config`` is the model's own, None where its tensors are not what other tools would load by it;
    ``linears`` are the model's, with the names of their tensors in the program.
    """

    program: Program
    report: Report
    config: Config
    cache_specs: tuple[KvCacheSpec, ...]
    vocab_size: int
    device: torch.device
    position_limit: int | None
    eos_token_ids: frozenset[int]
    tensor_names: Mapping[str, str]
    model_config: Mapping[str, Any] | None
    linears: tuple[ServedLinear, ...]


class ServedModel:
    """The step of a served form with its weights bound; they leave ``weights`` as they are packed."""

    def __init__(self, form: ServedForm, weights: MutableMapping[str, torch.Tensor]) -> None:
        self.form = form
        self.program = form.program
        self.device = form.device
        self._input_names = form.program.input_names
        self._bound = form.program.bind_releasing(weights)

    def source_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor that was bound, by its name in the program."""
        return self._bound.source_weights()

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

        bound = self._bound.with_inputs(pools)
        names = tuple(name for name in self._input_names if name in STEP_INPUT_NAMES)

        def step(inputs: StepInputs) -> torch.Tensor:
            given = [getattr(inputs, name).to(self.device) for name in names]
            with torch.inference_mode():
                return bound(*given)[0][0]

        return step
