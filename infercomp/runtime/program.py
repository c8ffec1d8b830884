"""``Program``: what codegen hands to the runtime, and how weights are bound to it.

A program is a pure function of weights and inputs. Binding evaluates the merges that passes asked
for, once; the merged parameters then become views of the merged tensor, so that no second copy of
the weights exists and a change in place by the user is seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class MergedWeight:
    """A weight laid out as ``sources`` end to end along ``dim``."""

    name: str
    sources: tuple[str, ...]
    dim: int


@dataclass(frozen=True)
class PackedWeightSource:
    """A weight in the layout that a kernel reads: ``pack`` of its parts, each laid end to end from its sources."""

    name: str
    parts: tuple[tuple[str, ...], ...]
    pack: Callable[..., torch.Tensor]

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(name for part in self.parts for name in part)


@dataclass(frozen=True)
class OpExecution:
    """How the calls of one op are executed: ``how`` is "cpp", "triton", "definition" or "aten".

    ``reason`` says why not better.
    """

    op: str
    how: str
    calls: int
    reason: str | None = None


@dataclass(frozen=True)
class KernelUse:
    """A generated kernel: the ops that it computes, how many calls of it the program makes, and whether
    ``kernel_overrides`` gave its text."""

    name: str
    ops: tuple[str, ...]
    calls: int
    is_overridden: bool = False


@dataclass(frozen=True)
class TakenApart:
    """A fused group that no kernel takes, and why; its calls were placed one by one. ``count`` groups are alike."""

    ops: tuple[str, ...]
    reason: str
    where: str | None
    count: int = 1


@dataclass(frozen=True)
class Program:
    """``function(*weights, *inputs)`` returns the new values of ``mutated_inputs``, then the outputs.

    ``output_orders`` says in which order of dimensions, outermost first, the caller expects each output
    to lie in memory (None: as it comes). ``kernels`` says what each kernel was generated from, by name
    (codegen's own type), ``steps`` are the native and Triton steps that call them, ``kernel_uses`` says what
    for and how often, and ``fallbacks`` why kernels that were planned are not used.
    """

    function: Callable[..., Sequence[Any]]
    weight_names: tuple[str, ...]
    input_names: tuple[str, ...]
    merged_weights: tuple[MergedWeight, ...]
    packed_weights: tuple[PackedWeightSource, ...]
    mutated_inputs: tuple[str, ...]
    ops: tuple[OpExecution, ...]
    output_orders: tuple[tuple[int, ...] | None, ...]
    kernels: Mapping[str, Any] = field(default_factory=dict)
    steps: tuple[Any, ...] = ()
    kernel_uses: tuple[KernelUse, ...] = ()
    taken_apart: tuple[TakenApart, ...] = ()
    fallbacks: tuple[str, ...] = ()

    def bind(self, weights: Mapping[str, torch.Tensor]) -> BoundProgram:
        """Fix the weights: ``weights`` holds every source and every weight that is no merge."""
        return self.bind_releasing(dict(weights))

    def bind_releasing(self, weights: dict[str, torch.Tensor]) -> BoundProgram:
        """The same, and what is only packed leaves ``weights`` once it is: no second copy of all grows beside them."""
        merges = {merge.name: _Merge(merge, [weights[name] for name in merge.sources]) for merge in self.merged_weights}
        made = {name: merge.tensor for name, merge in merges.items()}
        with torch.inference_mode(False), torch.no_grad():
            uses = Counter(name for packed in self.packed_weights for name in packed.sources)
            uses.update([*self.weight_names, *(name for merge in self.merged_weights for name in merge.sources)])
            for packed in self.packed_weights:
                made[packed.name] = _packed(packed, weights)
                uses.subtract(packed.sources)
                for name in set(packed.sources):
                    if not uses[name]:
                        del weights[name]
        tensors = [made[name] if name in made else weights[name].detach() for name in self.weight_names]
        kept = tuple((weights[name], weights[name].data_ptr()) for name in self.weight_names if name not in made)
        return BoundProgram(self, tensors, tuple(merges.values()), kept)


def _packed(weight: PackedWeightSource, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    parts = [[weights[name].detach() for name in names] for names in weight.parts]
    return weight.pack(*(part[0] if len(part) == 1 else torch.cat(part) for part in parts))


class _Merge:
    """One merged tensor and the parameters that are views of it."""

    def __init__(self, merge: MergedWeight, sources: list[torch.Tensor]) -> None:
        # Outside of the caller's inference mode: a tensor made under it carries other dispatch keys, which Dynamo
        # guards on (all would compile again) and autograd refuses, and the user's parameters become views of this one.
        with torch.inference_mode(False), torch.no_grad():
            adjacent = _adjacent_view(sources) if merge.dim == 0 else None
            self.tensor = _merged_in_place(sources, merge.dim) if adjacent is None else adjacent
        self.addresses = [(source, source.data_ptr()) for source in sources]

    def is_current(self) -> bool:
        return all(source.data_ptr() == address for source, address in self.addresses)


def _merged_in_place(sources: list[torch.Tensor], dim: int) -> torch.Tensor:
    """The sources laid end to end, each of which becomes a view of its part."""
    with torch.inference_mode(sources[0].is_inference()):
        return _concatenated(sources, dim)


def _concatenated(sources: list[torch.Tensor], dim: int) -> torch.Tensor:
    merged = torch.cat([source.detach() for source in sources], dim)
    parts = merged.split([source.shape[dim] for source in sources], dim)
    for source, part in zip(sources, parts, strict=True):
        source.data = part
    return merged


def _adjacent_view(sources: list[torch.Tensor]) -> torch.Tensor | None:
    """One tensor over sources that already lie end to end in one storage: another graph has merged them.

    A model has several graphs (prefill, decode, each with a static and a symbolic length); all of them
    must share one layout, or each would undo what the other has bound.
    """
    first = sources[0]
    address = first.data_ptr()
    for source in sources:
        same_storage = source.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same_storage and source.is_contiguous() and source.data_ptr() == address):
            return None
        address += source.numel() * source.element_size()
    extent = sum(source.shape[0] for source in sources)
    return first.detach().as_strided((extent, *first.shape[1:]), first.stride(), first.storage_offset())


class BoundProgram:
    """A program with its weights; call it with the inputs in ``input_names`` order."""

    def __init__(
        self,
        program: Program,
        weights: list[torch.Tensor],
        merges: tuple[_Merge, ...],
        kept: tuple[tuple[torch.Tensor, int], ...],
    ) -> None:
        self.program = program
        self._weights = weights
        self._merges = merges
        self._kept = kept
        self._mutated = tuple(program.input_names.index(name) for name in program.mutated_inputs)

    def is_current(self) -> bool:
        """False once somebody has given a parameter other storage: bind again."""
        is_kept = all(weight.data_ptr() == address for weight, address in self._kept)
        return is_kept and all(merge.is_current() for merge in self._merges)

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        results = self.program.function(*self._weights, *inputs)
        for position, value in zip(self._mutated, results, strict=False):
            inputs[position].copy_(value)
        num_mutated = len(self._mutated)
        orders = self.program.output_orders[num_mutated:]
        return [_in_order(value, order) for value, order in zip(results[num_mutated:], orders, strict=True)]


def _in_order(value: Any, order: tuple[int, ...] | None) -> Any:
    """``value`` with its dimensions in memory from outermost to innermost as ``order`` says."""
    if order is None or value.permute(order).is_contiguous():
        return value
    inverse = [order.index(dim) for dim in range(len(order))]
    return value.permute(order).contiguous().permute(inverse)
