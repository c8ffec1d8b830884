"""Kernel specs: frozen, hashable descriptions from which kernel texts are made."""

from .attention import AttentionSpec, PagedAttentionSpec, PagedCombineSpec
from .base import NOTHING, Argument, Fragment, Grid, KernelSpec, Origin
from .matmul import MatmulReduceSpec, MatmulSpec
from .rows import GatedActivationSpec, NormSpec, QuantizeSpec, RotaryWriteKvSpec, WriteKvSpec
from .sampling import SamplingSpec

__all__ = [
    "NOTHING",
    "Argument",
    "AttentionSpec",
    "Fragment",
    "GatedActivationSpec",
    "Grid",
    "KernelSpec",
    "MatmulReduceSpec",
    "MatmulSpec",
    "NormSpec",
    "Origin",
    "PagedAttentionSpec",
    "PagedCombineSpec",
    "QuantizeSpec",
    "RotaryWriteKvSpec",
    "SamplingSpec",
    "WriteKvSpec",
]
