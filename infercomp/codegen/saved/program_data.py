"""``Program`` as plain data, without its weights, and back.

What is data can be checked: every name is looked up in a table, every expression is arithmetic over sizes, and a
kernel's name is the hash of its spec. No text of a saved program is ever run; its kernels are generated again from
their specs, or taken from the cache where the same generator has built them before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...runtime.errors import ModelLoadError
from ...runtime.program import (
    KernelUse,
    MergedWeight,
    OpExecution,
    PackedWeightSource,
    Program,
    TakenApart,
    WeightSource,
)
from ..config import CodegenConfig
from ..cpp.toolchain import cached_library, sources_digest
from ..packing import PanelPacking
from ..steps import StepParts, driver_function, make_steps
from .driver_nodes import DriverNode, driver_graph, driver_nodes
from .expressions import check_expression

if TYPE_CHECKING:
    from ..kernel_set import GeneratedKernel

_REMEDY = "copy the saved model again, or save it anew"


@dataclass(frozen=True)
class KernelData:
    """A generated kernel; ``spec`` is its table (see ``spec_table``)."""

    ops: tuple[str, ...]
    origin: tuple[str, ...]
    spec: list[list[Any]]


@dataclass(frozen=True)
class PackedWeightData:
    """A packed weight: its name, the sources of its parts, and how they are packed."""

    name: str
    parts: tuple[tuple[WeightSource, ...], ...]
    packing: PanelPacking


@dataclass(frozen=True)
class ProgramData:
    """The fields of ``Program`` that are no functions; ``texts`` is the digest of the kernels' C++ texts, and
    ``generator`` that of the code that wrote them."""

    language: Literal["reference", "cpp", "triton"]
    generator: str
    texts: str | None
    kernels: dict[str, KernelData]
    steps: tuple[StepParts, ...]
    driver: tuple[DriverNode, ...]
    weight_names: tuple[str, ...]
    input_names: tuple[str, ...]
    merged_weights: tuple[MergedWeight, ...]
    packed_weights: tuple[PackedWeightData, ...]
    mutated_inputs: tuple[str, ...]
    ops: tuple[OpExecution, ...]
    output_orders: tuple[tuple[int, ...] | None, ...]
    kernel_uses: tuple[KernelUse, ...]
    taken_apart: tuple[TakenApart, ...]

    @property
    def sources(self) -> dict[str, tuple[int, ...] | None]:
        """Every tensor that binding asks for, with its shape where it is laid into another."""
        sources = [source for merge in self.merged_weights for source in merge.sources]
        sources += [source for packed in self.packed_weights for part in packed.parts for source in part]
        made = {merge.name for merge in self.merged_weights} | {packed.name for packed in self.packed_weights}
        kept: dict[str, tuple[int, ...] | None] = {name: None for name in self.weight_names if name not in made}
        return kept | {source.name: source.shape for source in sources}


def program_data(program: Program, config: CodegenConfig) -> ProgramData:
    """The data of a program; raises UnsupportedError for one that calls what cannot be named."""
    from ..kernel_set import cpp_units
    from .spec_table import spec_table

    kernels = {
        name: KernelData(kernel.ops, kernel.origin, spec_table(kernel.spec)) for name, kernel in program.kernels.items()
    }
    return ProgramData(
        language=program.language,  # type: ignore[arg-type]
        generator=generator_digest(),
        texts=sources_digest(cpp_units(program.kernels, config)) if program.language == "cpp" else None,
        kernels=kernels,
        steps=program.step_parts,
        driver=driver_nodes(program.driver),
        weight_names=program.weight_names,
        input_names=program.input_names,
        merged_weights=program.merged_weights,
        packed_weights=tuple(_packed_data(packed) for packed in program.packed_weights),
        mutated_inputs=program.mutated_inputs,
        ops=program.ops,
        output_orders=program.output_orders,
        kernel_uses=program.kernel_uses,
        taken_apart=program.taken_apart,
    )


def program_of(data: ProgramData, config: CodegenConfig) -> Program:
    """The program whose data this is, its kernels built where they are not in the cache.

    Raises ModelLoadError for data that contradicts itself, and what building raises.
    """
    try:
        _check(data)
        driver = driver_graph(data.driver, len(data.steps))
    except (LookupError, TypeError, ValueError) as error:
        raise ModelLoadError(f"the saved program cannot be read: {error}", remedy=_REMEDY, field="program") from error
    kernels = _StoredKernels(data.kernels)
    steps = make_steps(data.steps, kernels, config, data.language, _built_before(data, config))
    return Program(
        driver_function(driver, steps),
        data.weight_names,
        data.input_names,
        data.merged_weights,
        tuple(PackedWeightSource(each.name, each.parts, each.packing) for each in data.packed_weights),
        data.mutated_inputs,
        data.ops,
        data.output_orders,
        kernels=kernels,
        driver=driver,
        steps=tuple(steps),
        step_parts=data.steps,
        language=data.language,
        kernel_uses=data.kernel_uses,
        taken_apart=data.taken_apart,
    )


@lru_cache(maxsize=1)
def generator_digest() -> str:
    """A hash of all the code that turns specs into texts."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


def _packed_data(packed: PackedWeightSource) -> PackedWeightData:
    assert isinstance(packed.packing, PanelPacking)
    return PackedWeightData(packed.name, packed.parts, packed.packing)


def _built_before(data: ProgramData, config: CodegenConfig) -> Future[Path] | None:
    """The library of these kernels if it is known without generating them."""
    is_known = data.texts is not None and data.generator == generator_digest() and config.kernel_overrides is None
    library = cached_library(data.texts, config) if is_known and data.texts else None
    if library is None:
        return None
    found: Future[Path] = Future()
    found.set_result(library)
    return found


class _StoredKernels(Mapping[str, "GeneratedKernel"]):
    """Kernels whose specs are read when they are asked for: running asks for none."""

    def __init__(self, stored: Mapping[str, KernelData]) -> None:
        self._stored = stored
        self._read: dict[str, GeneratedKernel] = {}

    def __getitem__(self, name: str) -> GeneratedKernel:
        if name not in self._read:
            from ..kernel_set import GeneratedKernel
            from .spec_table import spec_of

            kernel = self._stored[name]
            self._read[name] = GeneratedKernel(spec_of(kernel.spec, name), kernel.ops, kernel.origin)
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def _check(data: ProgramData) -> None:
    """Raise ValueError where a place, a name or an expression of a step leads nowhere."""
    for step in data.steps:
        num_places = step.num_inputs + len(step.slot_bytes) + len(step.outputs)
        for call in step.calls:
            if call.kernel not in data.kernels or not call.kernel.isidentifier():
                raise ValueError(f"no kernel is called {call.kernel[:60]!r}")
            _require_places(call.operands, num_places, "an operand")
            _require_places(call.symbols, len(step.sizes), "a size")
        _require_places((size.position for size in step.sizes), step.num_inputs, "a size's input")
        _require_places(step.weight_inputs, step.num_inputs, "a weight")
        for text in (*step.slot_bytes, *(extent for output in step.outputs for extent in output.shape)):
            check_expression(text)
    placeholders = tuple(node.name for node in data.driver if node.op == "placeholder")
    if placeholders != (*data.weight_names, *data.input_names):
        raise ValueError("the driver takes other weights and inputs than the program")
    if not set(data.mutated_inputs) <= set(data.input_names):
        raise ValueError("a mutated input is none of the inputs")


def _require_places(places: Any, count: int, what: str) -> None:
    for place in places:
        if not 0 <= place < count:
            raise ValueError(f"{what} is at place {place} of {count}")
