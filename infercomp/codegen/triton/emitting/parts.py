"""Pieces of text that all families need."""

from __future__ import annotations

import json
from collections.abc import Mapping

from ..specs.base import DTYPES, Argument, KernelSpec
from ..template import Filling

LOG2_E = 1.4426950408889634


def frame_holes(spec: KernelSpec, constants: Mapping[str, int | float]) -> dict[str, Filling]:
    """The holes of every kernel's head: its name, parameters and constants."""
    arguments = spec.arguments()
    # Sizes of the batch change from step to step: a kernel of its own for each would be compiled again and again.
    unspecialized = [argument.name for argument in arguments if not argument.is_pointer and argument.multiple == 1]
    return {
        "decorator": f"@triton.jit(do_not_specialize={json.dumps(unspecialized)})" if unspecialized else "@triton.jit",
        "name": spec.name,
        "parameters": tuple(f"{argument.name}," for argument in arguments),
        "constants": tuple(f"{name}: tl.constexpr = {value!r}" for name, value in constants.items()),
    }


def tl_dtype(argument_type: str) -> str:
    """``tl.float16`` for ``*fp16`` or ``fp16``."""
    return DTYPES[argument_type.removeprefix("*")]


def pointee(arguments: tuple[Argument, ...], name: str) -> str:
    """The dtype that the pointer ``name`` points to."""
    return next(argument.type[1:] for argument in arguments if argument.name == name)


def dot_options(dtype: str, *, allow_tf32: bool = False) -> str:
    """float32 products keep float32's digits (``ieee``) unless TF32 is allowed; other dtypes have no choice."""
    if dtype != "fp32":
        return ""
    return ', input_precision="tf32"' if allow_tf32 else ', input_precision="ieee"'


def masked(address: str, conditions: list[str], other: str = "0.0") -> str:
    """A load, masked only where it needs to be."""
    if not conditions:
        return f"tl.load({address})"
    mask = " & ".join(conditions) if len(conditions) == 1 else " & ".join(f"({each})" for each in conditions)
    return f"tl.load({address}, mask={mask}, other={other})"
