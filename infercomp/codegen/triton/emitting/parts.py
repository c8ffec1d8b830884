"""Pieces of text that all samplers need."""

from __future__ import annotations

import json
from collections.abc import Mapping

from ..specs.base import KernelSpec
from ..template import Filling


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
