"""Triton kernels as text: emitting needs no Triton, ``compile`` and ``module`` do."""

from .emit import emit
from .errors import KernelCompileError, KernelSpecError

__all__ = ["KernelCompileError", "KernelSpecError", "emit"]
