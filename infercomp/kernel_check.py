"""What a dumped kernel file does when it is run: build the text beside it, compare with the definition, take times.

The definition runs twice on the same random inputs: in float64, which is the reference, and in its own types,
which says what rounding alone may cost. A result passes if its error is at most twice the definition's own plus
8 units in the last place of the largest value; integers may be off by one where a kernel rounds to them, and by
nothing elsewhere.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch

from .codegen.config import CodegenConfig
from .codegen.cpp.toolchain import SUPPORT, build_library
from .codegen.packing import PanelPacking
from .codegen.sparse_weights import PAIRS_OF_PLACES
from .codegen.weight_panels import PanelFormat
from .runtime.errors import InfercompError
from .runtime.native_step import KernelCall, NativeStep, OutputSpec, SizeSource

EXIT_WRONG = 1
EXIT_ERROR = 2
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_WIDE = SimpleNamespace(**dict.fromkeys(_FLOATS, torch.float64))
_SECONDS_OF_TIMING = 0.3


@dataclass(frozen=True)
class Input:
    """One argument of the definition: how random values of it are drawn; ``limit`` is what the kind needs.

    kind: "normal" (standard deviation ``limit``), "codes" (all integers of the dtype, -128 left out), "scale"
    (small and positive), "index" (below ``limit``), "slots" (different ones below ``limit``), "starts" (``limit``
    rows cut evenly), "lengths" (at most ``limit``), "sums" (of the groups of the input called ``limit``),
    "places" (indices of 2:4 weights).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: str = "normal"
    limit: Any = 1


@dataclass(frozen=True)
class Packed:
    """An operand in panels, made of these inputs."""

    parts: tuple[str, ...]
    panel_format: PanelFormat
    half_distance: int
    is_transposed: bool = False


@dataclass(frozen=True)
class Result:
    """A tensor that the kernel returns, row-major."""

    name: str
    dtype: str
    shape: tuple[int, ...]


Values: TypeAlias = dict[str, torch.Tensor]


@dataclass(frozen=True)
class KernelCheck:
    """One kernel: its operands are inputs by name or packed, then ``results``; ``written`` inputs are changed in place.

    ``num_operations`` counts multiplications and additions of products, 0 where that says little; ``tables`` are
    inputs of which only some rows are read.
    """

    name: str
    sizes: tuple[int, ...]
    inputs: tuple[Input, ...]
    operands: tuple[str | Packed, ...]
    results: tuple[Result, ...]
    written: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    num_operations: int = 0
    rounds_to_integers: bool = False
    instruction_set: str = "native"

    def main(self, file: str, definition: Callable[..., Sequence[torch.Tensor]]) -> int:
        """Check and time the text beside ``file``: 0 if all is right, 1 if a result is wrong, 2 if it cannot run."""
        try:
            with torch.inference_mode():
                return self._run(Path(file).with_suffix(".cpp"), definition)
        except InfercompError as error:
            print(error)
            return EXIT_ERROR

    def _run(self, text: Path, definition: Callable[..., Sequence[torch.Tensor]]) -> int:
        torch.manual_seed(0)
        inputs = self._random_inputs()
        exact = definition(_WIDE, *(_widened(value) for value in inputs.values()))
        plain = definition(torch, *(value.clone() for value in inputs.values()))
        step, given = self._step(text), inputs | {name: inputs[name].clone() for name in self.written}
        arguments = [*(self._operand(operand, given) for operand in self.operands), *self.sizes]
        returned = step(*arguments)
        found = [*returned, *(given[name] for name in self.written)]
        names = [*(result.name for result in self.results), *self.written]
        print(f"{self.name}, sizes {', '.join(f'n{i}={size}' for i, size in enumerate(self.sizes)) or 'fixed'}")
        right = [self._compare(*row) for row in zip(names, found, plain, exact, strict=True)]
        self._print_time(step, arguments, returned)
        return 0 if all(right) else EXIT_WRONG

    def _random_inputs(self) -> Values:
        values: Values = {}
        for each in self.inputs:
            values[each.name] = _random(each, values)
        return values

    def _operand(self, operand: str | Packed, values: Values) -> torch.Tensor:
        if isinstance(operand, str):
            return values[operand]
        parts = [values[name] for name in operand.parts]
        return PanelPacking(operand.panel_format, operand.half_distance, operand.is_transposed).pack(*parts)

    def _step(self, text: Path) -> NativeStep:
        config = CodegenConfig(codegen="cpp", instruction_set=self.instruction_set)
        library = build_library([text.read_text()], config)
        executor = build_library([(SUPPORT / "executor.cpp").read_text()], config)
        num_operands, num_sizes = len(self.operands), len(self.sizes)
        places = (*range(num_operands), *(num_operands + num_sizes + i for i in range(len(self.results))))
        return NativeStep(
            library,
            executor,
            (KernelCall(self.name, 0, places, tuple(range(num_sizes))),),
            tuple(SizeSource(num_operands + i, None) for i in range(num_sizes)),
            (),
            tuple(OutputSpec(tuple(map(str, result.shape)), getattr(torch, result.dtype)) for result in self.results),
            num_operands + num_sizes,
            (),
        )

    def _compare(self, name: str, found: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> bool:
        own, error = _difference(plain, exact), _difference(found, exact)
        if found.dtype.is_floating_point:
            finite = exact[exact.isfinite()].abs()
            largest = float(finite.max()) if finite.numel() else 0.0
            bound = 2 * own + 8 * torch.finfo(found.dtype).eps * max(largest, 1e-6)
        else:
            bound = float(self.rounds_to_integers)
        is_right = found.shape == exact.shape and error <= bound
        what = f"{name} {str(found.dtype).removeprefix('torch.')} {'x'.join(map(str, found.shape))}"
        print(f"  {what}: error {error:.3g}, bound {bound:.3g}: {'right' if is_right else 'WRONG'}")
        return is_right

    def _print_time(self, step: NativeStep, arguments: Sequence[Any], returned: Sequence[torch.Tensor]) -> None:
        nanoseconds: list[int] = []
        stop = time.perf_counter() + _SECONDS_OF_TIMING
        while time.perf_counter() < stop or len(nanoseconds) < 5:
            start = time.perf_counter_ns()
            step(*arguments)
            nanoseconds.append(time.perf_counter_ns() - start)
        median = statistics.median(nanoseconds)
        read = (a for o, a in zip(self.operands, arguments, strict=False) if o not in self.tables)
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in (*read, *returned))
        speeds = f"{num_bytes / median:.3g} GB/s"
        if self.num_operations:
            speeds += f", {self.num_operations / median:.3g} GFLOP/s"
        print(f"  {median / 1e3:.3g} us, the median of {len(nanoseconds)} calls: {speeds}")


def _widened(value: torch.Tensor) -> torch.Tensor:
    return value.double() if value.is_floating_point() else value.clone()


def _difference(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest absolute difference; equal infinities and NaNs in both are none, a NaN in one is infinite."""
    if found.shape != exact.shape:
        return float("inf")
    left, right = found.double(), exact.double()
    same = (left == right) | (left.isnan() & right.isnan())
    difference = torch.where(same, 0.0, (left - right).abs()).nan_to_num(nan=float("inf"))
    return float(difference.max()) if difference.numel() else 0.0


def _random(each: Input, values: Values) -> torch.Tensor:
    dtype: torch.dtype = getattr(torch, each.dtype)
    shape = each.shape
    if each.kind == "sums":
        quantized = values[each.limit]
        return quantized.unflatten(-1, (shape[-1], -1)).sum(-1, dtype=dtype).reshape(shape)
    if each.kind == "starts":
        return torch.linspace(0, each.limit, shape[0]).to(dtype)
    if each.kind == "lengths":
        return each.limit - torch.arange(shape[0], dtype=dtype)
    if each.kind == "slots":
        return torch.randperm(each.limit)[: shape[0]].to(dtype)
    if each.kind == "index":
        return torch.randint(each.limit, shape, dtype=dtype)
    if each.kind == "places":
        low, high = PAIRS_OF_PLACES[torch.randint(len(PAIRS_OF_PLACES), (2, *shape))]
        return low | high << 4
    if each.kind == "scale":
        return (torch.rand(shape) * 0.02 + 0.01).to(dtype)
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    if each.kind == "codes":
        low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
        return torch.randint(-high if low < 0 else 0, high + 1, shape, dtype=dtype)
    return (torch.randn(shape) * each.limit).to(dtype)
