"""Options of the pass pipeline: which passes and matches to leave out, where to stop, whether to measure or quantise.

`disable` and `limit` exist to find the pass behind a wrong number: switch off one pass, or one match of
one pass, or apply only the first so many matches (as LLVM's opt-bisect-limit does) and halve.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from infercomp.runtime.config import LARGEST_COUNT, describe, require_int
from infercomp.runtime.errors import ConfigError

from .grouped_query import GroupedQuery, grouped_query_of
from .linear_recipes import Recipe
from .n_m_sparsity import NM, nm_of
from .recipes import RECIPES, recipe_from_json

# A match is looked up by its text, so an index has one spelling only: no leading zeros.
_DISABLE_ENTRY = re.compile(r"[a-z][a-z0-9_]*(#(0|[1-9][0-9]*))?")


def recipe_of(quantization: str | Recipe) -> Recipe:
    """The recipe that a name or JSON stands for. Raises ConfigError for text that is neither."""
    if isinstance(quantization, Recipe):
        return quantization
    return RECIPES[quantization] if quantization in RECIPES else recipe_from_json(quantization)


def _canonical(quantization: str | Recipe | None) -> str | None:
    return None if quantization is None else recipe_of(quantization).to_json()


def _canonical_heads(kv_heads: str | GroupedQuery | None) -> str | None:
    return None if kv_heads is None else grouped_query_of(kv_heads).to_json()


def _canonical_sparsity(sparsity: str | NM | None) -> str | None:
    return None if sparsity is None else nm_of(sparsity).to_json()


@dataclass(frozen=True)
class PassConfig:
    """What the pipeline may do; it knows no pass names, so `check_pass_names` is for who does."""

    disable: tuple[str, ...] = ()
    """Passes left out whole (`"fuse_mlp"`), or one match of a pass by its index (`"fuse_mlp#12"`)."""

    limit: int | None = None
    """At most so many matches are applied over the whole pipeline; None means all."""

    verify: bool = False
    """Whether each pass is measured against its numeric class on real inputs."""

    quantization: str | Recipe | None = field(default=None, metadata={"fingerprint": _canonical})
    """How linears are quantised: a recipe, a name of `RECIPES`, or a recipe's JSON; None leaves them as they are."""

    quantize_lm_head: bool = True
    """Whether the LM head, and the embedding that shares its weight, are quantised with the other linears."""

    kv_heads: str | GroupedQuery | None = field(default=None, metadata={"fingerprint": _canonical_heads})
    """How many heads of keys and values are left and how they are merged: a `GroupedQuery`, its JSON, or their number
    alone; None leaves all."""

    sparsity: str | NM | None = field(default=None, metadata={"fingerprint": _canonical_sparsity})
    """Which weights of linears become zeros: an `NM`, its JSON, or a pattern such as "2:4"; None keeps all."""

    kv_cache_layout: str = "auto"
    """How a KV cache lies in memory: "rows" of channels, "tiled" as CPU kernels read it, "auto" to suit the kernels."""

    kv_cache_dtype: str = "auto"
    """What a KV cache holds: "auto" is the model's dtype, "int8" codes with a float32 scale for each token and head."""

    def __post_init__(self) -> None:
        _check_disable(self.disable)
        if self.kv_cache_layout not in ("auto", "rows", "tiled"):
            what = f"kv_cache_layout must be auto, rows or tiled, not {describe(self.kv_cache_layout)}"
            raise ConfigError(what, field="kv_cache_layout")
        if self.kv_cache_dtype not in ("auto", "int8"):
            what = f"kv_cache_dtype must be auto or int8, not {describe(self.kv_cache_dtype)}"
            raise ConfigError(what, field="kv_cache_dtype")
        if self.limit is not None:
            require_int(self.limit, "limit", 0, LARGEST_COUNT)
        for name in ("verify", "quantize_lm_head"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ConfigError(f"{name} must be True or False, not {describe(value)}", field=name)
        _check_quantization(self.quantization)
        if self.kv_heads is not None:
            _check_kv_heads(self.kv_heads)
        if self.sparsity is not None:
            _check_sparsity(self.sparsity)

    @property
    def recipe(self) -> Recipe | None:
        """What `quantization` stands for."""
        return None if self.quantization is None else recipe_of(self.quantization)

    @property
    def grouped_query(self) -> GroupedQuery | None:
        """What `kv_heads` stands for."""
        return None if self.kv_heads is None else grouped_query_of(self.kv_heads)

    @property
    def nm(self) -> NM | None:
        """What `sparsity` stands for."""
        return None if self.sparsity is None else nm_of(self.sparsity)

    @property
    def needs_calibration(self) -> str | None:
        """The option that needs samples of text, or None where none does."""
        needs = {"quantization": self.recipe, "kv_heads": self.grouped_query, "sparsity": self.nm}
        return next((name for name, value in needs.items() if value is not None and value.needs_calibration), None)


def check_pass_names(config: PassConfig, known: Sequence[str]) -> None:
    """Refuse a `disable` entry that names no known pass: it would silently switch off nothing."""
    for entry in config.disable:
        name = entry.partition("#")[0]
        if name not in known:
            raise ConfigError(
                f"disable names no pass: {name!r}",
                remedy=f"did you mean {nearest_name(name, known)!r}? valid: {', '.join(known)}",
                field="disable",
            )


def nearest_name(name: str, known: Iterable[str]) -> str:
    """The known name most like `name`, however unlike it is; upper and lower case are the same to it."""
    by_lowered = {each.lower(): each for each in known}
    return by_lowered[difflib.get_close_matches(name.lower(), by_lowered, n=1, cutoff=0.0)[0]]


def _check_quantization(quantization: object) -> None:
    valid = f"valid: {', '.join(RECIPES)}"
    if isinstance(quantization, str):
        if quantization in RECIPES:
            return
        if quantization.lstrip().startswith("{"):
            recipe_from_json(quantization)
            return
        begun = [name for name in RECIPES if name.startswith(quantization)]
        nearest = begun[0] if begun else nearest_name(quantization, RECIPES)
        valid = f"did you mean {nearest!r}? {valid}"
    if quantization is not None and not isinstance(quantization, Recipe):
        what = f"quantization must be a recipe, the name of one or None, not {describe(quantization)}"
        raise ConfigError(what, remedy=valid, field="quantization")


def _check_kv_heads(kv_heads: object) -> None:
    if not isinstance(kv_heads, (str, GroupedQuery)):
        what = f"kv_heads must be a GroupedQuery, its JSON, a number of heads as text or None, not {describe(kv_heads)}"
        raise ConfigError(what, field="kv_heads")
    grouped_query_of(kv_heads)


def _check_sparsity(sparsity: object) -> None:
    if not isinstance(sparsity, (str, NM)):
        what = f"sparsity must be an NM, its JSON, a pattern as text or None, not {describe(sparsity)}"
        raise ConfigError(what, field="sparsity")
    nm_of(sparsity)


def _check_disable(disable: object) -> None:
    if not isinstance(disable, tuple):
        raise ConfigError(f"disable must be a tuple of strings, not {describe(disable)}", field="disable")
    for entry in disable:
        if not isinstance(entry, str) or not _DISABLE_ENTRY.fullmatch(entry):
            raise ConfigError(
                f"disable has an entry that cannot name a pass: {describe(entry)}",
                remedy='write "pass_name" or "pass_name#match_index", for example "recognize_attention#12"',
                field="disable",
            )
