"""What codegen may do."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..runtime.config import describe
from ..runtime.errors import ConfigError
from .overrides import overrides_digest

BACKENDS = ("reference", "cpp", "triton", "auto")


@dataclass(frozen=True)
class CodegenConfig:
    """How a graph is executed.

    codegen: "reference" for the ops' definitions and ATen, "cpp" for generated C++ kernels (CPU), "triton" for
    generated Triton kernels (CUDA), "auto" for whichever the device runs. instruction_set: "native", "avx2" or
    "portable", what the C++ compiler may use. cache_dir: folder of built libraries; None is ``infercomp`` in the
    user's cache folder. kernel_overrides: folder of C++ texts ``<kernel>.cpp`` that replace the
    generated ones.
    """

    codegen: str = "auto"
    instruction_set: str = "native"
    cache_dir: str | None = field(default=None, metadata={"affects_compilation": False})
    kernel_overrides: str | None = field(default=None, metadata={"fingerprint": overrides_digest})

    def __post_init__(self) -> None:
        _require_one_of("codegen", self.codegen, BACKENDS)
        for name in ("cache_dir", "kernel_overrides"):
            if getattr(self, name) == "":
                raise ConfigError(f"{name} must be the name of a folder or None, not ''", field=name)
        _require_one_of("instruction_set", self.instruction_set, ("native", "avx2", "portable"))


def _require_one_of(field: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{field} must be one of {', '.join(allowed)}, not {describe(value)}", field=field)
