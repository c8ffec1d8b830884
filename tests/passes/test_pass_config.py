"""PassConfig refuses what cannot mean anything, and names the field, the value and the way out."""

from __future__ import annotations

import pytest

from infercomp.passes.config import PassConfig, check_pass_names, nearest_name
from infercomp.runtime.config import describe
from infercomp.runtime.errors import ConfigError

KNOWN = ("recognize_attention", "recognize_rms_norm", "fuse_mlp")


def test_default_leaves_nothing_out() -> None:
    config = PassConfig()
    assert (config.disable, config.limit, config.verify) == ((), None, False)
    assert (config.quantization, config.quantize_lm_head) == (None, True)


@pytest.mark.parametrize(
    "entry",
    ["", "#3", "fuse_mlp#", "fuse_mlp#x", "fuse_mlp#-1", "fuse_mlp#03", "fuse mlp", "Fuse", "fuse_mlp\n", "a#1#2"],
)
def test_entry_of_wrong_form_is_refused(entry: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PassConfig(disable=(entry,))
    assert caught.value.field == "disable"
    assert repr(entry) in str(caught.value)
    assert "pass_name#match_index" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("disable", "fuse_mlp"),
        ("disable", ["fuse_mlp"]),
        ("disable", (3,)),
        ("disable", None),
        ("limit", -1),
        pytest.param("limit", 10**5000, id="limit-huge"),
        ("limit", True),
        ("limit", "3"),
        ("limit", 2.0),
        ("verify", 1),
        ("verify", None),
        ("quantization", 8),
        ("quantization", ["w8a8"]),
        ("quantize_lm_head", "no"),
    ],
)
def test_wrong_type_or_range_names_field_and_value(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        PassConfig(**{field: value})  # type: ignore[arg-type]
    assert caught.value.field == field
    assert field in caught.value.what
    assert describe(value) in str(caught.value) or value == (3,)


def test_limit_of_zero_is_allowed() -> None:
    assert PassConfig(limit=0).limit == 0


def test_known_names_pass_with_and_without_index() -> None:
    check_pass_names(PassConfig(disable=("fuse_mlp", "recognize_attention#12")), KNOWN)


@pytest.mark.parametrize(
    ("entry", "nearest"),
    [("fuse_mpl", "fuse_mlp"), ("recognise_attention#12", "recognize_attention"), ("rms_norm", "recognize_rms_norm")],
)
def test_unknown_name_is_answered_with_the_nearest(entry: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{nearest}'") as caught:
        check_pass_names(PassConfig(disable=(entry,)), KNOWN)
    assert caught.value.field == "disable"
    assert repr(entry.partition("#")[0]) in caught.value.what


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("w8", "w8a8"), ("W8A16", "w8a16"), ("w4a8-", "w4a8-g32"), ("w4a16-g32-asym", "w4a16-g32-sym"), ("", "w8a8")],
)
def test_unknown_recipe_is_answered_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{nearest}'") as caught:
        PassConfig(quantization=name)
    assert caught.value.field == "quantization"
    assert repr(name) in caught.value.what
    assert "w4a16-g128-sym" in str(caught.value)


def test_nearest_name_always_answers_and_ignores_case() -> None:
    assert nearest_name("qqq", KNOWN) in KNOWN
    assert nearest_name("FUSE_MLP", KNOWN) == "fuse_mlp"
    assert nearest_name("fuse_mlp", ("OTHER", "FUSE_MLP")) == "FUSE_MLP"
