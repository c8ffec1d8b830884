"""``NativeStep``: a table of generated kernels, run as one parallel region over one arena."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from operator import is_
from pathlib import Path
from typing import Any

import torch

from .errors import InputError

SizeFunction = Callable[..., Sequence[int]]
_INT64 = ctypes.c_int64
_ALIGNMENT = 64


@dataclass(frozen=True)
class KernelCall:
    """One call: operands are places in inputs + slots + outputs, symbols places in the step's sizes."""

    kernel: str
    phase: int
    operands: tuple[int, ...]
    symbols: tuple[int, ...]


@dataclass(frozen=True)
class SizeSource:
    """Where a size is read: dimension ``dim`` of input ``position``, or the input itself where dim is None."""

    position: int
    dim: int | None


@dataclass(frozen=True)
class OutputSpec:
    """A tensor that the step returns; its shape as expressions of the sizes ``s0``, ``s1`` …"""

    shape: tuple[str, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class StepTiming:
    """One run of a step: its sizes, its nanoseconds, and those of each call, added over threads."""

    sizes: tuple[int, ...]
    nanoseconds: int
    call_nanoseconds: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class NativeStep:
    """Kernels of ``library`` called in phases.

    Inputs are contiguous tensors (others are copied) and integers; ``slot_bytes`` are expressions of the
    sizes; ``weight_inputs`` are the places of inputs that stay the same tensors. Raises InputError where
    a kernel met an index out of range.
    """

    library: Path
    executor: Path
    calls: tuple[KernelCall, ...]
    sizes: tuple[SizeSource, ...]
    slot_bytes: tuple[str, ...]
    outputs: tuple[OutputSpec, ...]
    num_inputs: int
    weight_inputs: tuple[int, ...]

    def __call__(self, *inputs: Any) -> list[torch.Tensor]:
        weights = [inputs[position] for position in self.weight_inputs]
        with self._lock:
            bound = self._bound[0] if self._bound else None
            if bound is None or not all(map(is_, weights, bound.fixed.values())):
                bound = self.bound(dict(zip(self.weight_inputs, weights, strict=True)))
                self._bound[:] = [bound]
        return bound(*(inputs[position] for position in bound.varying))

    def bound(self, fixed: Mapping[int, Any]) -> BoundStep:
        """The step as a function of its other inputs; the tensors of ``fixed``, by place, stay where they lie."""
        return BoundStep(self, fixed)

    @contextlib.contextmanager
    def timed(self) -> Iterator[list[StepTiming]]:
        """Every run inside of the block is timed, kernel by kernel; reading clocks costs a little time itself."""
        timings: list[StepTiming] = []
        self.timings.append(timings)
        try:
            yield timings
        finally:
            self.timings.remove(timings)

    @cached_property
    def timings(self) -> list[list[StepTiming]]:
        """Where runs in progress are noted; nothing is timed while it is empty."""
        return []

    @cached_property
    def _lock(self) -> threading.Lock:
        return threading.Lock()

    @cached_property
    def _bound(self) -> list[BoundStep]:
        return []

    @cached_property
    def _layout_function(self) -> SizeFunction:
        names = ", ".join(f"s{i}" for i in range(len(self.sizes)))
        shapes = ", ".join("(" + "".join(f"{extent}, " for extent in output.shape) + ")" for output in self.outputs)
        slots = ", ".join(self.slot_bytes)
        function: SizeFunction = eval(f"lambda {names}: ([{slots}], [{shapes}])", {"Max": max})
        return function

    @cached_property
    def layout(self) -> Callable[[tuple[int, ...]], tuple[list[int], int, list[tuple[int, ...]]]]:
        @lru_cache(maxsize=1024)
        def layout(sizes: tuple[int, ...]) -> tuple[list[int], int, list[tuple[int, ...]]]:
            slots, shapes = self._layout_function(*sizes)
            offsets, end = [], 0
            for num_bytes in slots:  # type: ignore[attr-defined]
                offsets.append(end)
                end += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
            return offsets, end, shapes  # type: ignore[return-value]

        return layout

    def __deepcopy__(self, memo: dict[int, Any]) -> NativeStep:
        return self


class BoundStep:
    """A step with inputs that stay where they are: its call table on the other side, and its arena."""

    def __init__(self, step: NativeStep, fixed: Mapping[int, Any]) -> None:
        self.fixed = dict(fixed)
        self.varying = tuple(position for position in range(step.num_inputs) if position not in self.fixed)
        self._step = step
        self._executor = load_executor(step.executor)
        self._library = ctypes.CDLL(str(step.library))
        self._handle = ctypes.c_void_p(self._executor.infercomp_step_new())
        self._num_inputs = step.num_inputs
        self._pointers = (ctypes.c_void_p * (step.num_inputs + len(step.slot_bytes) + len(step.outputs)))()
        self._sizes = (_INT64 * max(1, len(step.sizes)))()
        self._num_sizes = len(step.sizes)
        # Steps of several threads share the table's pointers and its arena: one at a time.
        self._lock = threading.Lock()
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._add_calls()
        self._contiguous = self._note(self.fixed.items())
        places = {position: place for place, position in enumerate(self.varying)}
        self._size_places = [(places.get(source.position), source) for source in step.sizes]

    def __call__(self, *varying: Any) -> list[torch.Tensor]:
        """Takes the inputs that are not fixed, in their order."""
        with self._lock:
            # Copies of inputs that were not contiguous live until the step is done.
            contiguous = self._note(zip(self.varying, varying, strict=True))
            sizes = tuple([self._size(place, source, varying) for place, source in self._size_places])
            offsets, num_bytes, shapes = self._step.layout(sizes)
            outputs = [torch.empty(shape, dtype=o.dtype) for shape, o in zip(shapes, self._step.outputs, strict=True)]
            base = self._arena_of(num_bytes)
            rest = [*[base + offset for offset in offsets], *[output.data_ptr() for output in outputs]]
            self._pointers[self._num_inputs :] = rest
            self._run(sizes)
            del contiguous
        return outputs

    def _size(self, place: int | None, source: SizeSource, varying: tuple[Any, ...]) -> int:
        value = self.fixed[source.position] if place is None else varying[place]
        return int(value if source.dim is None else value.shape[source.dim])

    def _add_calls(self) -> None:
        step = self._step
        for call in step.calls:
            kernel = ctypes.c_char.in_dll(self._library, f"infercomp_kernel_{call.kernel}")
            self._executor.infercomp_step_add(
                self._handle,
                ctypes.byref(kernel),
                _INT64(call.phase),
                (_INT64 * len(call.operands))(*call.operands),
                _INT64(len(call.operands)),
                (_INT64 * len(call.symbols))(*call.symbols),
                _INT64(len(call.symbols)),
            )

    def _arena_of(self, num_bytes: int) -> int:
        """The address of that much memory, kept between steps: new memory costs a fault for each of its pages."""
        if self._arena.numel() < num_bytes + _ALIGNMENT:
            self._arena = torch.empty(num_bytes + _ALIGNMENT, dtype=torch.uint8)
        return -(-self._arena.data_ptr() // _ALIGNMENT) * _ALIGNMENT

    def _note(self, inputs: Iterable[tuple[int, Any]]) -> list[torch.Tensor]:
        """Note where inputs lie; returns the tensors that must live until the step is done."""
        tensors = [(position, x.contiguous()) for position, x in inputs if isinstance(x, torch.Tensor)]
        for position, tensor in tensors:
            self._pointers[position] = tensor.data_ptr()
        return [tensor for _, tensor in tensors]

    def _run(self, sizes: tuple[int, ...]) -> None:
        """One step over the inputs, slots and outputs that were noted."""
        if not self._step.timings:
            self._execute(sizes, is_timed=False)
            return
        start = time.perf_counter_ns()
        self._execute(sizes, is_timed=True)
        nanoseconds = time.perf_counter_ns() - start
        calls = tuple(self._nanoseconds(call) for call in range(len(self._step.calls)))
        for timings in self._step.timings:
            timings.append(StepTiming(sizes, nanoseconds, calls))

    def _execute(self, sizes: tuple[int, ...], is_timed: bool) -> None:
        self._sizes[: self._num_sizes] = [*sizes]
        num_bad = self._executor.infercomp_step_run(
            self._handle, self._pointers, self._sizes, torch.get_num_threads(), int(is_timed)
        )
        if num_bad < 0:
            raise InputError(
                "a kernel has more tasks than can be counted", remedy="pass fewer rows at a time", field="input"
            )
        if num_bad:
            raise InputError(
                f"{num_bad} indices were out of range of the table that they index",
                remedy="check token ids against the vocabulary and positions against the model's limit",
                field="input_ids",
            )

    def _nanoseconds(self, call: int) -> int:
        return int(self._executor.infercomp_step_nanoseconds(self._handle, _INT64(call)))

    def __del__(self) -> None:
        self._executor.infercomp_step_delete(self._handle)


@lru_cache(maxsize=4)
def load_executor(path: Path) -> ctypes.CDLL:
    executor = ctypes.CDLL(str(path))
    executor.infercomp_step_new.restype = ctypes.c_void_p
    executor.infercomp_step_delete.argtypes = [ctypes.c_void_p]
    executor.infercomp_step_run.restype = _INT64
    executor.infercomp_step_nanoseconds.restype = _INT64
    return executor
