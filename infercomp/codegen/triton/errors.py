"""What can go wrong between a kernel spec and a binary."""

from __future__ import annotations

from infercomp.runtime.errors import InfercompError


class KernelSpecError(InfercompError):
    """A spec asks for a kernel that its family cannot give; ``field`` names the option at fault."""


class KernelCompileError(InfercompError):
    """Triton, or the assembler behind it, refused an emitted kernel; ``target`` says for which chip."""

    def __init__(self, what: str, *, target: str, where: str | None = None, remedy: str | None = None) -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.target = target
