"""What codegen may do."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..runtime.config import describe
from ..runtime.errors import ConfigError

BACKENDS = ("reference", "cpp", "auto")


@dataclass(frozen=True)
class CodegenConfig:
    """How a graph is executed.

    codegen: "reference" for the ops' definitions and ATen, "cpp" for generated C++ kernels, "auto" for kernels
    wherever there are some for the device. instruction_set: "native", "avx2" or "portable", what the C++
    compiler may use. cache_dir: folder of built libraries; None is ``infercomp`` in the user's cache folder.
    """

    codegen: str = "auto"
    instruction_set: str = "native"
    cache_dir: str | None = field(default=None, metadata={"affects_compilation": False})

    def __post_init__(self) -> None:
        _require_one_of("codegen", self.codegen, BACKENDS)
        if self.cache_dir == "":
            raise ConfigError("cache_dir must be the name of a folder or None, not ''", field="cache_dir")
        _require_one_of("instruction_set", self.instruction_set, ("native", "avx2", "portable"))


def _require_one_of(field: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{field} must be one of {', '.join(allowed)}, not {describe(value)}", field=field)
