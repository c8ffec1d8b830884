"""Tiles worth trying for a spec: a short list per family, pruned and ordered by the cost model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeVar, cast

from .chip import Chip
from .cost import estimated_seconds, fits
from .errors import KernelSpecError
from .specs.attention import AttentionOptions, PagedAttentionSpec
from .specs.base import KernelSpec
from .specs.matmul import MatmulSpec

SpecType = TypeVar("SpecType", bound=KernelSpec)
Tuning = dict[str, int | bool]

TUNED_FIELDS = (
    "tile_rows",
    "tile_columns",
    "tile_inner",
    "tile_keys",
    "num_splits",
    "is_persistent",
    "use_descriptors",
    "num_warps",
    "num_stages",
)


def candidates(spec: SpecType, chip: Chip, num_rows: int, num_keys: int = 0, limit: int = 8) -> list[SpecType]:
    """At most ``limit`` forms of the spec for the chip, the one believed fastest first; the spec itself if none fits.

    ``num_rows`` is a size that the caller fixes per shape class (16 for decoding, 2048 for prefill, say). Were
    it the size of the batch at hand, a row's tiles, and so its last bits, would depend on the batch.
    """
    forms = dict.fromkeys(form for form in _forms(spec, chip) if fits(form, chip))
    ordered = sorted(forms, key=lambda form: estimated_seconds(form, chip, num_rows, num_keys))
    return ordered[:limit] or [spec]


def tuning_of(spec: KernelSpec) -> Tuning:
    """The fields that candidates differ in."""
    return {name: getattr(spec, name) for name in TUNED_FIELDS if hasattr(spec, name)}


def with_tuning(spec: SpecType, tuning: Tuning) -> SpecType:
    """The same kernel with other tiles."""
    return replace(spec, **cast(dict[str, Any], tuning))


def _forms(spec: SpecType, chip: Chip) -> Iterable[SpecType]:
    for tuning in _tunings(spec, chip):
        try:
            yield with_tuning(spec, tuning)
        except KernelSpecError:
            continue  # tiles that this spec's sizes do not allow, as groups of weights cut in the middle


def _tunings(spec: KernelSpec, chip: Chip) -> Iterable[Tuning]:
    if isinstance(spec, MatmulSpec):
        return _gemv_tunings() if spec.is_single_row else _matmul_tunings(chip)
    if isinstance(spec, AttentionOptions):
        is_decode = isinstance(spec, PagedAttentionSpec) and spec.chunk_keys is not None
        return _attention_tunings((16, 32) if is_decode else (32, 64, 128))
    return [{"num_warps": num_warps} for num_warps in (2, 4, 8)]


def _matmul_tunings(chip: Chip) -> Iterable[Tuning]:
    for rows, columns, warps in ((16, 64, 4), (16, 128, 4), (64, 64, 4), (64, 128, 4), (128, 128, 8), (128, 256, 8)):
        for inner, stages in ((16, 3), (32, 4), (64, 3), (64, 4), (128, 3)):
            tiles = {"tile_rows": rows, "tile_columns": columns, "tile_inner": inner}
            plain: Tuning = {"num_splits": 1, "is_persistent": False, "use_descriptors": False}
            tuning: Tuning = {**tiles, **plain, "num_warps": warps, "num_stages": stages}
            for num_splits in (1, 2, 4, 8) if rows == 16 else (1,):
                yield {**tuning, "num_splits": num_splits}
            if chip.has_tensor_memory_access and rows >= 64:
                yield {**tuning, "use_descriptors": True, "is_persistent": True}


def _gemv_tunings() -> Iterable[Tuning]:
    for columns, inner in ((4, 512), (8, 512), (4, 1024), (16, 256)):
        yield {"tile_columns": columns, "tile_inner": inner, "num_warps": 4, "num_stages": 2}


def _attention_tunings(rows: tuple[int, ...]) -> Iterable[Tuning]:
    for tile_rows in rows:
        for tile_keys in (16, 32, 64, 128):
            for num_warps in (4, 8):
                for num_stages in (2, 3):
                    tiles = {"tile_rows": tile_rows, "tile_keys": tile_keys}
                    yield {**tiles, "num_warps": num_warps, "num_stages": num_stages}
