"""Texts of samplers."""

from __future__ import annotations

from ..specs.sampling import SamplingSpec
from ..template import Filling, fill, lines_of, read_template
from .parts import frame_holes

_WEIGHT = "weight = tl.where({condition}, tl.exp((value - largest) / temperature), 0.0)"


def emit_sampling(spec: SamplingSpec) -> str:
    """Logits to tokens: the largest, or one drawn from what temperature, top_k and top_p leave."""
    row_stride = spec.vocabulary_size if spec.logits_row_stride is None else spec.logits_row_stride
    constants = {
        "VOCABULARY_SIZE": spec.vocabulary_size,
        "TILE_TOKENS": spec.tile_tokens,
        "LOGITS_ROW_STRIDE": row_stride,
    }
    load_tile = lines_of(read_template("sample_tile"))
    largest = lines_of(fill(read_template("sample_largest"), {"load_tile": load_tile}))
    if spec.method == "greedy":
        return fill(read_template("sample_greedy"), {**frame_holes(spec, constants), "largest": largest})
    constants["SIGN_BIT"] = -(2**31)
    key = lines_of(read_template("sample_key"))
    holes: dict[str, Filling] = {
        **frame_holes(spec, constants),
        "largest": largest,
        "load_tile": load_tile,
        "key": key,
        "weight_of_reaching": _WEIGHT.format(condition="key >= smallest_key"),
        "choose": _choose(spec, load_tile, key),
    }
    return fill(read_template("sample"), holes)


def _choose(spec: SamplingSpec, load_tile: tuple[str, ...], key: tuple[str, ...]) -> tuple[str, ...]:
    holes: dict[str, Filling] = {"load_tile": load_tile, "key": key, "kept": lines_of(read_template("sample_kept"))}
    if spec.method == "inverse_cdf":
        holes["weight_of_kept"] = _WEIGHT.format(condition="is_kept")
    return lines_of(fill(read_template(f"sample_{spec.method}"), holes))
