"""Which kernels run a graph: the language they are written in, by the option ``codegen`` and the device."""

from __future__ import annotations

import os

import torch

from ..runtime.errors import ConfigError
from .config import CodegenConfig


def language_of(config: CodegenConfig, device: torch.device) -> str | None:
    """ "cpp", "triton", or None where definitions and ATen run; raises ConfigError for a pair that cannot be."""
    if config.codegen == "reference":
        return None
    if config.codegen == "auto":
        return {"cpu": "cpp", "cuda": "triton"}.get(device.type)
    if config.codegen == "cpp" and device.type != "cpu":
        raise ConfigError(
            f'codegen="cpp" makes kernels for the CPU, and the model is on {device}',
            field="codegen",
            remedy='use codegen="triton" or "auto", or move the model to the CPU',
        )
    if config.codegen == "triton" and device.type != "cuda" and not (device.type == "cpu" and is_interpreted()):
        raise ConfigError(
            f'codegen="triton" makes kernels for GPUs, and the model is on {device}',
            field="codegen",
            remedy='move the model to "cuda", use codegen="cpp", or set TRITON_INTERPRET=1 to try the kernels slowly',
        )
    return config.codegen


def is_interpreted() -> bool:
    """Whether Triton runs kernels by its interpreter, on any device: its own variable, read when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"
