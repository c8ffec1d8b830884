"""Triton kernels as text: ``emit(spec)`` needs no Triton, ``compile`` and ``module`` do."""

from .emit import emit
from .errors import KernelCompileError, KernelSpecError

__all__ = ["KernelCompileError", "KernelSpecError", "emit"]
