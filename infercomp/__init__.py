"""A PyTorch compiler plugin for LLM inference: one line compiles a model, one class serves it.

    model = torch.compile(model, backend="infercomp")
    outputs = infercomp.LLM("path/or/hub-id").generate(["Hello"])

Names are loaded on first use, so `import infercomp` costs nothing and needs no torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from infercomp.config import Config as Config
    from infercomp.explain import explain as explain
    from infercomp.llm import LLM as LLM
    from infercomp.passes.grouped_query import GroupedQuery as GroupedQuery
    from infercomp.passes.linear_recipes import GOBO as GOBO
    from infercomp.passes.linear_recipes import W3A16 as W3A16
    from infercomp.passes.linear_recipes import W4A8 as W4A8
    from infercomp.passes.linear_recipes import W4A16 as W4A16
    from infercomp.passes.linear_recipes import W8A8 as W8A8
    from infercomp.passes.linear_recipes import W8A16 as W8A16
    from infercomp.passes.n_m_sparsity import NM as NM
    from infercomp.passes.recipes import HAWQ as HAWQ
    from infercomp.passes.recipes import LayerRecipes as LayerRecipes
    from infercomp.passes.rounding import GPTQ as GPTQ
    from infercomp.passes.rounding import ScaleSearch as ScaleSearch
    from infercomp.runtime.errors import CapacityError as CapacityError
    from infercomp.runtime.errors import CaptureError as CaptureError
    from infercomp.runtime.errors import ConfigError as ConfigError
    from infercomp.runtime.errors import InfercompError as InfercompError
    from infercomp.runtime.errors import InputError as InputError
    from infercomp.runtime.errors import ModelLoadError as ModelLoadError
    from infercomp.runtime.errors import NumericalError as NumericalError
    from infercomp.runtime.errors import PassError as PassError
    from infercomp.runtime.errors import ProofError as ProofError
    from infercomp.runtime.errors import UnsupportedError as UnsupportedError
    from infercomp.runtime.errors import VerificationError as VerificationError
    from infercomp.runtime.request import CompletionOutput as CompletionOutput
    from infercomp.runtime.request import RequestOutput as RequestOutput
    from infercomp.runtime.request import SamplingParams as SamplingParams

__version__ = "0.1.0"

_MODULE_OF = {
    "Config": "infercomp.config",
    "explain": "infercomp.explain",
    "LLM": "infercomp.llm",
    "GroupedQuery": "infercomp.passes.grouped_query",
    "HAWQ": "infercomp.passes.recipes",
    "LayerRecipes": "infercomp.passes.recipes",
    "GPTQ": "infercomp.passes.rounding",
    "ScaleSearch": "infercomp.passes.rounding",
    "GOBO": "infercomp.passes.linear_recipes",
    "NM": "infercomp.passes.n_m_sparsity",
    "W3A16": "infercomp.passes.linear_recipes",
    "W4A8": "infercomp.passes.linear_recipes",
    "W4A16": "infercomp.passes.linear_recipes",
    "W8A8": "infercomp.passes.linear_recipes",
    "W8A16": "infercomp.passes.linear_recipes",
    "CompletionOutput": "infercomp.runtime.request",
    "RequestOutput": "infercomp.runtime.request",
    "SamplingParams": "infercomp.runtime.request",
    "CapacityError": "infercomp.runtime.errors",
    "CaptureError": "infercomp.runtime.errors",
    "ConfigError": "infercomp.runtime.errors",
    "InfercompError": "infercomp.runtime.errors",
    "InputError": "infercomp.runtime.errors",
    "ModelLoadError": "infercomp.runtime.errors",
    "NumericalError": "infercomp.runtime.errors",
    "PassError": "infercomp.runtime.errors",
    "ProofError": "infercomp.runtime.errors",
    "UnsupportedError": "infercomp.runtime.errors",
    "VerificationError": "infercomp.runtime.errors",
}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """This package, in which a submodule never takes the place of a public name."""

    def __setattr__(self, name: str, value: object) -> None:
        # Python binds each loaded submodule to its package: `explain` has to stay the function, not become its file.
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
