"""``TritonStep``: launches of generated kernels in phase order on the current stream, over one arena."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import torch

from .errors import InputError
from .native_step import OutputSpec, SizeSource

_ALIGNMENT = 64


class LaunchableKernel(Protocol):
    """A kernel that can be run on a grid."""

    def launch(self, grid: tuple[int, int, int], *arguments: object) -> None: ...


@dataclass(frozen=True)
class KernelLaunch:
    """One launch: operands are places in inputs + slots + outputs with the dtypes that the kernel reads them in.

    ``grid`` and ``condition`` are expressions of the step's sizes ``s0``, ``s1`` …; ``symbols`` are the places
    of the sizes that the kernel takes. ``num_workspaces`` of the step's workspaces come after its operands.
    """

    kernel: LaunchableKernel
    operands: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    num_workspaces: int
    symbols: tuple[int, ...]
    grid: tuple[str, str, str]
    condition: str


@dataclass(frozen=True)
class _Layout:
    """What the sizes of a call say: bytes of slots and workspaces, shapes of outputs, launches with their grids."""

    slots: tuple[tuple[int, int], ...]  # offset and bytes
    num_bytes: int
    shapes: tuple[tuple[int, ...], ...]
    launches: tuple[tuple[KernelLaunch, tuple[int, int, int]], ...]


@dataclass(frozen=True, eq=False)
class TritonStep:
    """Inputs are tensors of one device (copied where not contiguous) and integers.

    ``slot_bytes`` and ``workspace_bytes`` are expressions of the sizes. A kernel that meets an index out of
    range uses 0 in its place, writes nothing there, and InputError is raised: on a CPU by this call, on
    a GPU, which is not waited for, by the first call that finds it done.
    """

    launches: tuple[KernelLaunch, ...]
    sizes: tuple[SizeSource, ...]
    slot_bytes: tuple[str, ...]
    workspace_bytes: tuple[str, ...]
    outputs: tuple[OutputSpec, ...]
    num_inputs: int

    def __call__(self, *inputs: Any) -> list[torch.Tensor]:
        device = next(value.device for value in inputs if isinstance(value, torch.Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return self._run(device, inputs)

    def _run(self, device: torch.device, inputs: Sequence[Any]) -> list[torch.Tensor]:
        flag = self._flag(device)
        flag.check()
        sizes = tuple(inputs[s.position] if s.dim is None else inputs[s.position].shape[s.dim] for s in self.sizes)
        layout = self._layout(sizes)
        given = [value.contiguous() if isinstance(value, torch.Tensor) else value for value in inputs]
        outputs = [
            torch.empty(shape, dtype=output.dtype, device=device)
            for shape, output in zip(layout.shapes, self.outputs, strict=True)
        ]
        arena = torch.empty(layout.num_bytes, dtype=torch.uint8, device=device)
        slots = [arena[offset : offset + num_bytes] for offset, num_bytes in layout.slots]
        places = [*given, *slots[: len(self.slot_bytes)], *outputs]
        workspaces = [slot.view(torch.float32) for slot in slots[len(self.slot_bytes) :]]
        for launch, grid in layout.launches:
            operands = [_as(places[i], dtype) for i, dtype in zip(launch.operands, launch.dtypes, strict=True)]
            numbers = [sizes[i] for i in launch.symbols]
            launch.kernel.launch(grid, *operands, *workspaces[: launch.num_workspaces], flag.tensor, *numbers)
        flag.note()
        return outputs

    def check(self) -> None:
        """Raise InputError if a run that is done, a replayed graph's too, met an index out of range."""
        for flag in self._flags.values():
            flag.check()

    @cached_property
    def _flags(self) -> dict[torch.device, _ErrorFlag]:
        return {}

    def _flag(self, device: torch.device) -> _ErrorFlag:
        if device not in self._flags:
            self._flags[device] = _ErrorFlag(device)
        return self._flags[device]

    @cached_property
    def _sized(self) -> Callable[..., Sequence[Any]]:
        names = ", ".join(f"s{i}" for i in range(len(self.sizes)))
        shapes = "".join("(" + "".join(f"{extent}, " for extent in output.shape) + "), " for output in self.outputs)
        slots = "".join(f"{text}, " for text in (*self.slot_bytes, *self.workspace_bytes))
        grids = "".join(f"({launch.condition}, ({', '.join(launch.grid)})), " for launch in self.launches)
        function: Callable[..., Sequence[Any]] = eval(
            f"lambda {names}: (({slots}), ({shapes}), ({grids}))", {"Max": max, "min": min, "max": max}
        )
        return function

    @cached_property
    def _layout(self) -> Callable[[tuple[int, ...]], _Layout]:
        @lru_cache(maxsize=1024)
        def layout(sizes: tuple[int, ...]) -> _Layout:
            slot_bytes, shapes, grids = self._sized(*sizes)
            slots, end = [], 0
            for num_bytes in slot_bytes:
                slots.append((end, num_bytes))
                end += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
            launches = tuple(
                (launch, grid)
                for launch, (condition, grid) in zip(self.launches, grids, strict=True)
                if condition and min(grid) > 0
            )
            return _Layout(tuple(slots), max(end, _ALIGNMENT), shapes, launches)

        return layout

    def __deepcopy__(self, memo: dict[int, Any]) -> TritonStep:
        return self


def _as(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A slot's bytes as the values that a kernel keeps there; inputs and outputs are what they are."""
    if value.dtype == dtype:
        return value
    num_values = value.numel() // dtype.itemsize
    return value[: num_values * dtype.itemsize].view(dtype)


class _ErrorFlag:
    """An int32 that kernels set to 1 when they meet an index out of range."""

    def __init__(self, device: torch.device) -> None:
        self.tensor = torch.zeros(4, dtype=torch.int32, device=device)
        self._host = self.tensor
        if device.type == "cuda":
            self._host = torch.zeros(4, dtype=torch.int32, device="cpu", pin_memory=True)
        self._event: torch.cuda.Event | None = None

    def note(self) -> None:
        """The step's launches are queued."""
        if self.tensor.device.type == "cpu":
            self.check()
            return
        self._host.copy_(self.tensor, non_blocking=True)
        if not torch.cuda.is_current_stream_capturing():
            self._event = torch.cuda.Event()
            self._event.record()

    def check(self) -> None:
        if self.tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return
        is_done = self._event is None or self._event.query()
        if is_done and int(self._host[0]):
            self._host.zero_()
            self.tensor.zero_()
            raise InputError(
                "an index was out of range of the table that it indexes",
                remedy="check token ids against the vocabulary and positions against the model's limit",
                field="input_ids",
            )
