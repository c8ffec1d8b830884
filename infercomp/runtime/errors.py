"""The error tree: every error says what happened, where, and what to do about it."""

from __future__ import annotations


class InfercompError(Exception):
    """Root of all errors raised on purpose by infercomp.

    ``what`` is one sentence; ``where`` names the place (a line of the model's source, a file, a
    tensor); ``remedy`` says what to do; ``field`` is the name of the argument at fault, if one is.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        remedy: str | None = None,
        field: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.remedy = remedy
        self.field = field
        lines = [what]
        if where:
            lines.append(f"  where: {where}")
        if remedy:
            lines.append(f"  remedy: {remedy}")
        super().__init__("\n".join(lines))


class ConfigError(InfercompError):
    """An option is unknown, of the wrong type, or out of range."""


class InputError(InfercompError):
    """A prompt or a sampling parameter cannot be served as given."""


class CapacityError(InfercompError):
    """A request can never fit into the KV cache; ``needed_blocks`` and ``num_blocks`` say by how much."""

    def __init__(self, what: str, *, needed_blocks: int, num_blocks: int, remedy: str, field: str = "prompt") -> None:
        super().__init__(what, remedy=remedy, field=field)
        self.needed_blocks = needed_blocks
        self.num_blocks = num_blocks


class ModelLoadError(InfercompError):
    """A path, hub id or file does not hold a model that can be loaded."""


class CaptureError(InfercompError):
    """The model could not be captured as one functional graph."""


class UnsupportedError(InfercompError):
    """Under ``strict``, something would have run outside of infercomp's own pipeline."""


class PassError(InfercompError):
    """A rewrite pass could not run; ``pass_name`` and ``site`` say which."""

    def __init__(
        self,
        what: str,
        *,
        pass_name: str,
        site: str | None = None,
        where: str | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.pass_name = pass_name
        self.site = site


class VerificationError(PassError):
    """A pass broke the graph's structure or left its numeric class."""


class ProofError(PassError):
    """KV-cache insertion relies on a property that could not be proved for this model."""


class DeviceMemoryError(InfercompError):
    """The device has no memory left for what decoding wants to keep there."""


class NumericalError(InfercompError):
    """A model produced logits that are not numbers."""


class BuildError(InfercompError):
    """A kernel could not be built: no compiler, a compiler that refuses, or a cache that cannot be written."""


class BenchmarkError(InfercompError):
    """A benchmark could not be run: a peer that is not installed or does not take the model, a worker that failed."""


class CompilerRefusedError(BuildError):
    """The C++ compiler refused a generated file, which is kept; ``where`` names it."""


class FallbackWarning(UserWarning):
    """Something runs outside of infercomp's own pipeline, or by definitions in place of kernels."""
