"""What emitters return, and the frame around every kernel's text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy

from ..indexing import FloorDiv
from ..specs import Buffer, KernelSpec, symbols_of
from .scalar_text import POINTERS

_ALIGNMENT_BYTES = 16


@dataclass(frozen=True)
class Launch:
    """One kernel of a spec: the module that holds it, and its grid over the spec's sizes ``n0``, ``n1`` …

    ``condition`` says for which sizes it is launched; its name is the kernel function's.
    """

    name: str
    text: str
    grid: tuple[str, str, str]
    condition: str = "True"


@dataclass(frozen=True)
class Emitted:
    """The launches of one spec, in order. All take its buffers, its workspaces, ``errors`` and its sizes.

    ``workspaces`` are numbers of float32 values that launches hand to each other.
    """

    launches: tuple[Launch, ...]
    workspaces: tuple[str, ...] = ()


def size_text(expression: sympy.Expr) -> str:
    """An expression of sizes as Python text."""
    expression = sympy.sympify(expression)
    if isinstance(expression, FloorDiv):
        numerator, divisor = map(size_text, expression.args)
        return f"({numerator} // {divisor})"
    if isinstance(expression, sympy.Add):
        return "(" + " + ".join(map(size_text, expression.args)) + ")"
    if isinstance(expression, sympy.Mul):
        return "(" + " * ".join(map(size_text, expression.args)) + ")"
    if expression.is_Integer or expression.is_Symbol:
        return str(expression)
    raise ValueError(f"no text for the size {expression}")


def divided_up(count: str, divisor: int) -> str:
    return f"-(-{count} // {divisor})"


def module_text(
    spec: KernelSpec,
    name: str,
    body: Sequence[str],
    *,
    constants: Mapping[str, int | float] | None = None,
    num_workspaces: int = 0,
    num_warps: int = 4,
    num_stages: int = 2,
    allows_contraction: bool = False,
) -> str:
    """A module with one kernel: its arguments' types and launch options stand beside it."""
    arguments = _arguments(spec.buffers, num_workspaces)
    sizes = [str(symbol) for symbol in symbols_of(spec)]
    arguments |= dict.fromkeys(sizes, "i32")
    # Sizes of the batch change from step to step: a kernel of its own for each would be compiled again and again.
    decorator = f"@triton.jit(do_not_specialize={json.dumps(sizes)})" if sizes else "@triton.jit"
    entries = "".join(f'    "{argument}": "{kind}",\n' for argument, kind in arguments.items())
    lines = [
        "import triton",
        "import triton.language as tl",
        "",
        f'KERNEL = "{name}"',
        f"ARGUMENTS = {{\n{entries}}}",
        f"NUM_WARPS = {num_warps}",
        f"NUM_STAGES = {num_stages}",
        f"ALLOWS_CONTRACTION = {allows_contraction}",
        "",
        "",
        decorator,
        f"def {name}({', '.join(arguments)}):",
        *(f"    {constant}: tl.constexpr = {value!r}" for constant, value in (constants or {}).items()),
        *(f"    {size} = {size}.to(tl.int64)" for size in sizes),
        *(f"    {line}".rstrip() for line in body),
    ]
    return "\n".join([*lines, ""])


def _arguments(buffers: Sequence[Buffer], num_workspaces: int) -> dict[str, str]:
    pointers = {buffer.name: POINTERS[buffer.dtype] for buffer in buffers}
    pointers |= {f"w{i}": "*fp32" for i in range(num_workspaces)} | {"errors": "*i32"}
    return {name: f"{pointer}:{_ALIGNMENT_BYTES}" for name, pointer in pointers.items()}
