"""Specs of sampling on the device."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Argument, Grid, KernelSpec, require, require_dtype, require_power_of_two

METHODS = ("greedy", "inverse_cdf", "gumbel")


@dataclass(frozen=True, kw_only=True)
class SamplingSpec(KernelSpec):
    """logits [R, V] -> tokens [R] int64, one row a program; -1 for a row with NaN, +inf or only -inf.

    Order and meaning are those of ``runtime.sampler``: temperature (0 is greedy), top_k (0 is off; ties with
    the k-th stay), top_p (1 is off; equal probabilities leave from the lowest index on). Thresholds are found
    by bisecting the bits of the logits, so nothing is sorted. Weights are float32 where the sampler's are
    float64: a token may differ where a cumulative probability lies within about 1e-6 of its threshold.

    ``inverse_cdf`` inverts the cumulative distribution at ``uniforms`` [R], drawn by the request's own
    generator; ``gumbel`` adds Philox noise of ``seeds`` [R] (one a row and step) and takes the maximum
    (Gumbel 1954). Either way a row's token depends on its own logits, parameters and number only.
    """

    logits_dtype: str
    vocabulary_size: int
    method: str = "inverse_cdf"
    logits_row_stride: int | None = None
    tile_tokens: int = 4096
    num_warps: int = 8

    @property
    def name(self) -> str:
        return f"sample_{self.method}_{self.logits_dtype}"

    def validate(self) -> None:
        require_dtype(self.logits_dtype, "logits_dtype")
        require(self.method in METHODS, f"method {self.method!r} is not one of {', '.join(METHODS)}", field="method")
        require_power_of_two(self.tile_tokens, "tile_tokens", 16)

    def arguments(self) -> tuple[Argument, ...]:
        inputs = (Argument("tokens", "*i64"), Argument("logits", f"*{self.logits_dtype}"))
        if self.method == "greedy":
            return inputs
        random = Argument("seeds", "*i64") if self.method == "gumbel" else Argument("uniforms", "*fp32")
        options = (Argument("temperatures", "*fp32"), Argument("top_ks", "*i32"), Argument("top_ps", "*fp32"))
        return (*inputs, *options, random)

    def grid(self, num_rows: int) -> Grid:
        return (num_rows, 1, 1)
