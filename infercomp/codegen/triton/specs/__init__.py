"""Specs of samplers, which no graph of calls stands for: frozen, hashable descriptions of their kernels."""

from .base import Argument, Grid, KernelSpec, Origin
from .sampling import SamplingSpec

__all__ = ["Argument", "Grid", "KernelSpec", "Origin", "SamplingSpec"]
