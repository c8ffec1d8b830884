"""Every field of a request has a type, a least and a largest value, and an error that names it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infercomp.runtime.config import RuntimeConfig, describe
from infercomp.runtime.errors import ConfigError, InputError
from infercomp.runtime.request import Request, SamplingParams, checked_prompt

NAN, INFINITY = float("nan"), float("inf")
POISON = {
    "n": [0, -1, 17, True, 1.0, "1", None, 10**5000],
    "temperature": [NAN, INFINITY, -INFINITY, -0.1, 1e308, 10**400, True, "1", None],
    "top_k": [-2, True, 1.5, "5", 1 << 80, None],
    "top_p": [0.0, -0.0, -0.5, 1.0001, NAN, INFINITY, True, "1", None],
    "max_tokens": [0, -1, True, 2.0, 1 << 80, None],
    "stop": ["", [""], ["a", ""], [1], 5, {"a": 1}, ["x"] * 17, "y" * 257, b"a"],
    "stop_token_ids": [[-1], [1.0], [True], 5, "5", [1 << 80], [0] * 257],
    "ignore_eos": [1, "yes", None],
    "seed": [-1, True, 1.0, "1", 1 << 63, 1 << 80],
}
FIRST_BAD = [(field, value) for field, values in POISON.items() for value in values]


@pytest.mark.parametrize(("field", "value"), FIRST_BAD, ids=lambda value: describe(value)[:30])
def test_a_poisoned_parameter_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InputError) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert caught.value.field == field
    assert field in str(caught.value) and caught.value.remedy
    assert len(str(caught.value)) < 500


anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text("ab\0", max_size=5),
    st.lists(st.text("ab", max_size=3), max_size=3),
)


@given(st.dictionaries(st.sampled_from(sorted(POISON)), anything))
def test_any_value_is_either_accepted_or_refused_by_name(values: dict[str, object]) -> None:
    try:
        params = SamplingParams(**values)  # type: ignore[arg-type]
    except InputError as error:
        assert error.field in values
    else:
        assert 1 <= params.n <= 16 and 0 <= params.temperature <= 100 and 0 < params.top_p <= 1


def test_params_are_frozen_and_normalised() -> None:
    params = SamplingParams(stop="end", stop_token_ids=[3], temperature=-0.0, top_k=-1)
    assert params.stop_strings == ("end",) and params.stop_token_ids == (3,)
    assert SamplingParams().stop_strings == ()
    assert dataclasses.replace(params, seed=5).stop_strings == ("end",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    "prompt",
    [[], (), "text", None, [1.0], [True], [-1], [100], [1 << 31], [[1]], [None], list(range(20)), {1: 2}],
    ids=lambda prompt: str(prompt)[:20],
)
def test_a_bad_prompt_is_refused(prompt: object) -> None:
    with pytest.raises(InputError) as caught:
        checked_prompt(prompt, max_model_len=20, vocab_size=100)
    assert caught.value.field == "prompt" and caught.value.remedy


def test_a_good_prompt_is_copied() -> None:
    prompt = [0, 99]
    assert checked_prompt(prompt, 3, 100) == prompt
    assert checked_prompt(prompt, 3, 100) is not prompt
    assert checked_prompt([1 << 30], 3) == [1 << 30]


@given(st.lists(st.integers(0, 9), min_size=1), st.lists(st.integers(0, 9)), st.integers(0, 30), st.integers(0, 30))
def test_token_ids_slices_prompt_and_output_as_one(prompt: list[int], output: list[int], start: int, stop: int) -> None:
    request = Request("r", prompt, SamplingParams(), output_token_ids=output)
    assert request.token_ids(start, stop) == (prompt + output)[start:stop]
    assert request.num_tokens == len(prompt) + len(output)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_size", 0),
        ("block_size", True),
        ("block_size", 16.0),
        ("block_size", 1 << 20),
        ("num_blocks", 0),
        ("kv_cache_bytes", -1),
        ("max_num_batched_tokens", 0),
        ("max_num_seqs", "8"),
        ("max_model_len", 1),
    ],
)
def test_config_names_the_field_at_fault(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        RuntimeConfig(**{field: value})  # type: ignore[arg-type]
    assert caught.value.field == field and caught.value.remedy


def test_the_ledger_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from infercomp.runtime import block_pool, config, errors, request, scheduler\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
