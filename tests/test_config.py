"""Options: each key is checked by name, type and range, wherever it was given; the fingerprint misses no field."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from infercomp.config import Config, option_types, parse_options
from infercomp.passes.config import PassConfig
from infercomp.runtime.config import RuntimeConfig
from infercomp.runtime.errors import ConfigError

OPTION_NAMES = sorted(option_types())
LETTERS = "abcdefghijklmnopqrstuvwxyz_"


@st.composite
def misspellings(draw: st.DrawFn) -> tuple[str, str]:
    """An option name and the same with one letter dropped, added, changed, or two neighbours swapped."""
    name = draw(st.sampled_from(OPTION_NAMES))
    at = draw(st.integers(0, len(name) - 1))
    letter = draw(st.sampled_from(LETTERS))
    wrong = draw(
        st.sampled_from(
            [
                name[:at] + name[at + 1 :],
                name[:at] + letter + name[at:],
                name[:at] + letter + name[at + 1 :],
                name[:at] + name[at : at + 2][::-1] + name[at + 2 :],
            ]
        )
    )
    assume(wrong not in OPTION_NAMES)
    return name, wrong


def leaf_values(config: Any) -> dict[str, object]:
    result: dict[str, object] = {}
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        result |= leaf_values(value) if dataclasses.is_dataclass(value) else {each.name: value}
    return result


_OTHER_CHOICES = {
    "quantization": "w8a8",
    "kv_heads": "1",
    "sparsity": "2:4",
    "codegen": "cpp",
    "instruction_set": "portable",
    "kv_cache_layout": "tiled",
    "kv_cache_dtype": "int8",
    "kernel_overrides": str(Path(__file__).parent),
}


def other_value(name: str) -> object:
    """A valid value of the option that is not its default."""
    default = leaf_values(Config())[name]
    wanted = option_types()[name]
    if wanted is bool:
        return not default
    if wanted == tuple[str, ...]:
        return ("fuse_mlp", "recognize_rms_norm#3")
    if name in _OTHER_CHOICES:
        return _OTHER_CHOICES[name]
    if wanted in (str, str | None):
        return "some_folder"
    assert wanted in (int, int | None), f"teach this test a value for {name}: {wanted}"
    # Sizes are powers of two or counts above their default; None stands for "derived", any size is another.
    return 2 * default if isinstance(default, int) else 4096


def as_text(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(value)
    return {True: "1", False: "0"}[value] if isinstance(value, bool) else str(value)


def test_the_options_are_the_leaf_fields() -> None:
    assert set(OPTION_NAMES) == set(leaf_values(Config()))
    assert {"disable", "limit", "verify", "block_size", "max_num_seqs", "strict", "dump"} <= set(OPTION_NAMES)


def test_leaf_names_are_unique_over_all_parts() -> None:
    parts = [PassConfig, RuntimeConfig, Config]
    names = [each.name for part in parts for each in dataclasses.fields(part)]
    assert len(names) == len(set(names))


def test_nothing_given_is_the_default() -> None:
    assert parse_options(None, {}) == parse_options({}, {"PATH": "/bin"}) == Config()


def test_process_environment_is_read_if_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERCOMP_LIMIT", "7")
    assert parse_options().passes.limit == 7


@pytest.mark.parametrize("name", OPTION_NAMES)
def test_each_option_reaches_its_field_from_both_places(name: str) -> None:
    value = other_value(name)
    from_option = parse_options({name: value}, {})
    from_variable = parse_options({}, {f"INFERCOMP_{name.upper()}": as_text(value)})
    assert leaf_values(from_option)[name] == value
    assert from_option == from_variable != Config()


@pytest.mark.parametrize("name", OPTION_NAMES)
def test_an_option_wins_over_its_variable(name: str) -> None:
    default = leaf_values(Config())[name]
    variables = {f"INFERCOMP_{name.upper()}": as_text(other_value(name))}
    assert parse_options({name: default}, variables) == Config()


@pytest.mark.parametrize("name", OPTION_NAMES)
def test_each_field_changes_the_fingerprint_save_the_dump_folder(name: str) -> None:
    changed = parse_options({name: other_value(name)}, {}).fingerprint() != Config().fingerprint()
    assert changed == (name not in ("dump", "cache_dir", "offload_folder"))


def test_fingerprint_is_sha256_and_the_same_for_equal_configs() -> None:
    fingerprint = Config().fingerprint()
    assert len(bytes.fromhex(fingerprint)) == 32
    assert fingerprint == Config(passes=PassConfig(), runtime=RuntimeConfig()).fingerprint()


@given(misspellings())
def test_a_misspelt_option_names_the_right_one(names: tuple[str, str]) -> None:
    right, wrong = names
    with pytest.raises(ConfigError) as caught:
        parse_options({wrong: None}, {})
    assert caught.value.field == wrong
    assert repr(wrong) in caught.value.what
    assert f"did you mean {right!r}?" in str(caught.value)


@given(misspellings())
def test_a_misspelt_variable_names_the_right_one(names: tuple[str, str]) -> None:
    right, wrong = (f"INFERCOMP_{name.upper()}" for name in names)
    with pytest.raises(ConfigError) as caught:
        parse_options({}, {wrong: "1"})
    assert caught.value.field == wrong
    assert f"did you mean {right!r}?" in str(caught.value)


def test_variables_of_others_are_left_alone() -> None:
    assert parse_options({}, {"INFERCOMPLETE": "1", "MY_INFERCOMP_DUMP": "x"}) == Config()


def test_disable_takes_text_list_and_tuple() -> None:
    wanted = ("fuse_mlp", "recognize_attention#12")
    for given_value in ("fuse_mlp, recognize_attention#12", list(wanted), wanted):
        assert parse_options({"disable": given_value}, {}).passes.disable == wanted


@pytest.mark.parametrize("name", OPTION_NAMES)
def test_wrong_type_names_option_value_and_place(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_options({name: {"a": 1}}, {})
    assert caught.value.field == name
    assert "a value of type dict" in caught.value.what
    assert caught.value.where == f"option {name!r}"


@pytest.mark.parametrize(
    ("variable", "text", "valid"),
    [
        ("INFERCOMP_LIMIT", "many", "an integer"),
        ("INFERCOMP_BLOCK_SIZE", "1.5", "an integer"),
        ("INFERCOMP_VERIFY", "2", "true or false"),
        ("INFERCOMP_DISABLE", "fuse_mlp#x", "pass_name#match_index"),
        ("INFERCOMP_LIMIT", "-1", "from 0 to"),
        ("INFERCOMP_BLOCK_SIZE", "0", "block_size"),
    ],
)
def test_bad_text_in_a_variable_names_the_variable(variable: str, text: str, valid: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_options({}, {variable: text})
    assert caught.value.where == f"environment variable {variable}"
    assert text in caught.value.what
    assert valid in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"), [("1", True), ("TRUE", True), ("on", True), ("yes", True), ("0", False), ("off", False)]
)
def test_words_for_true_and_false(text: str, value: bool) -> None:
    assert parse_options({}, {"INFERCOMP_STRICT": text}).strict is value


def test_empty_variable_counts_as_unset() -> None:
    assert parse_options({}, {"INFERCOMP_DUMP": "", "INFERCOMP_LIMIT": " "}) == Config()


@pytest.mark.parametrize(
    ("field", "value"),
    [("strict", 1), ("dump", ""), ("offload_folder", ""), ("dump", 3), ("passes", None), ("runtime", PassConfig())],
)
def test_config_checks_its_own_fields(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        Config(**{field: value})  # type: ignore[arg-type]
    assert caught.value.field == field


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().strict = True  # type: ignore[misc]
