"""``Program``: what codegen hands to the runtime, and how weights are bound to it.

A program is a pure function of weights and inputs. Binding evaluates the merges that passes asked
for, once; the merged parameters then become views of the merged tensor, so that no second copy of
the weights exists and a change in place by the user is seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from .bound_driver import bound_driver
from .freed_memory import return_freed_memory
from .weight_memory import Empty, WeightMemory

Shape = tuple[int, ...]

_FREED_BYTES = 64 << 20
"""What may be free and yet held before it is given back."""


@dataclass(frozen=True)
class WeightSource:
    """A tensor that weights are made of."""

    name: str
    shape: Shape


@dataclass(frozen=True)
class MergedWeight:
    """A weight laid out as ``sources`` end to end along ``dim``."""

    name: str
    sources: tuple[WeightSource, ...]
    dim: int

    @property
    def source_names(self) -> tuple[str, ...]:
        return tuple(source.name for source in self.sources)

    def taken_apart(self, merged: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The sources as views of what they were merged to."""
        parts = merged.split([source.shape[self.dim] for source in self.sources], self.dim)
        yield from zip(self.source_names, parts, strict=True)


class Packing(Protocol):
    """The layout that a kernel reads a weight's parts in; it lies in memory from ``empty``."""

    def pack(self, *parts: torch.Tensor, empty: Empty = ...) -> torch.Tensor: ...

    def unpack(self, packed: torch.Tensor, shapes: Sequence[Shape]) -> tuple[torch.Tensor, ...]: ...


@dataclass(frozen=True)
class PackedWeightSource:
    """A weight in the layout that a kernel reads, packed of its parts, each laid end to end from its sources."""

    name: str
    parts: tuple[tuple[WeightSource, ...], ...]
    packing: Packing

    @property
    def source_names(self) -> tuple[str, ...]:
        return tuple(source.name for part in self.parts for source in part)

    def packed(self, weights: Mapping[str, torch.Tensor], empty: Empty) -> torch.Tensor:
        """The weight, in memory from ``empty``."""
        parts = [[weights[source.name].detach() for source in sources] for sources in self.parts]
        return self.packing.pack(*(part[0] if len(part) == 1 else torch.cat(part) for part in parts), empty=empty)

    def taken_apart(self, packed: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The sources again, bit for bit."""
        shapes = [(sum(source.shape[0] for source in part), *part[0].shape[1:]) for part in self.parts]
        for sources, part in zip(self.parts, self.packing.unpack(packed, shapes), strict=True):
            pieces = part.split([source.shape[0] for source in sources])
            yield from ((source.name, piece) for source, piece in zip(sources, pieces, strict=True))


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
    to lie in memory (None: as it comes). ``fallbacks`` says why kernels that were planned are not used, and
    ``kernel_uses`` what each is for and how often. ``language`` is "cpp" or "triton", or "reference" for a
    program without kernels. In codegen's own types: ``kernels`` are what the kernels were generated from, by
    name; ``steps`` call them and are made of ``step_parts``; ``driver`` is the graph that ``function`` runs.
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
    driver: Any = None
    steps: tuple[Any, ...] = ()
    step_parts: tuple[Any, ...] = ()
    language: str = "reference"
    kernel_uses: tuple[KernelUse, ...] = ()
    taken_apart: tuple[TakenApart, ...] = ()
    fallbacks: tuple[str, ...] = ()

    def bind(self, weights: Mapping[str, torch.Tensor]) -> BoundProgram:
        """Fix the weights: ``weights`` holds every source and every weight that is no merge."""
        return self.bind_releasing(dict(weights))

    def bind_releasing(self, weights: MutableMapping[str, torch.Tensor]) -> BoundProgram:
        """The same, and what is only packed leaves ``weights`` once it is: no second copy of all grows beside them."""
        merges = {m.name: _Merge(m, [weights[name] for name in m.source_names]) for m in self.merged_weights}
        made = {name: merge.tensor for name, merge in merges.items()}
        with torch.inference_mode(False), torch.no_grad():
            uses = Counter(name for packed in self.packed_weights for name in packed.source_names)
            uses.update([*self.weight_names, *(name for merge in self.merged_weights for name in merge.source_names)])
            memory, num_freed_bytes = WeightMemory(), 0
            for packed in self.packed_weights:
                made[packed.name] = packed.packed(weights, memory.empty)
                uses.subtract(packed.source_names)
                for name in set(packed.source_names):
                    if not uses[name]:
                        num_freed_bytes += weights.pop(name).nbytes
                if num_freed_bytes > _FREED_BYTES:
                    return_freed_memory()
                    num_freed_bytes = 0
        tensors = [made[name] if name in made else weights[name].detach() for name in self.weight_names]
        kept = tuple((weights[name], weights[name].data_ptr()) for name in self.weight_names if name not in made)
        return BoundProgram(self, tensors, tuple(merges.values()), kept)


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

    def source_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor that was bound, by name, as it was before it was merged or packed; each once."""
        tensors = dict(zip(self.program.weight_names, self._weights, strict=True))
        made: list[MergedWeight | PackedWeightSource] = [*self.program.merged_weights, *self.program.packed_weights]
        seen: set[str] = {each.name for each in made}
        for name, tensor in tensors.items():
            if name not in seen:
                seen.add(name)
                yield name, tensor
        for each in made:
            if not seen.issuperset(each.source_names):
                for name, tensor in each.taken_apart(tensors[each.name]):
                    if name not in seen:
                        seen.add(name)
                        yield name, tensor

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        results = self.program.function(*self._weights, *inputs)
        return self._settled(results, [inputs[position] for position in self._mutated])

    def with_inputs(self, fixed: Mapping[str, torch.Tensor]) -> Callable[..., Sequence[Any]]:
        """The program as a function of its other inputs; weights and ``fixed`` stay where they lie from now on."""
        program = self.program
        weights = dict(zip(program.weight_names, self._weights, strict=True))
        function = bound_driver(program.driver, program.steps, {**weights, **fixed})
        others = [name for name in program.input_names if name not in fixed]

        def call(*inputs: Any) -> Sequence[Any]:
            results = function(*inputs)
            mutated = program.mutated_inputs
            return self._settled(results, [fixed[n] if n in fixed else inputs[others.index(n)] for n in mutated])

        return call

    def _settled(self, results: Sequence[Any], mutated: list[torch.Tensor]) -> Sequence[Any]:
        """The outputs in the order that is expected of them, once inputs have their new values."""
        for target, value in zip(mutated, results, strict=False):
            target.copy_(value)
        orders = self.program.output_orders[len(mutated) :]
        return [_in_order(value, order) for value, order in zip(results[len(mutated) :], orders, strict=True)]


def _in_order(value: Any, order: tuple[int, ...] | None) -> Any:
    """``value`` with its dimensions in memory from outermost to innermost as ``order`` says."""
    if order is None or value.permute(order).is_contiguous():
        return value
    inverse = [order.index(dim) for dim in range(len(order))]
    return value.permute(order).contiguous().permute(inverse)
