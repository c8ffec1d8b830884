"""The verdict on a mask against looking at every entry of it: never wrong, and never shy of the simple forms."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import sympy
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from infercomp.passes import mask_proof
from infercomp.passes.index_algebra import KEY, QUERY
from infercomp.passes.mask_proof import MaskSpec, Unproved, _classify, _NotOurs

LENGTH = sympy.Symbol("length", integer=True, positive=True)
SIZES = range(1, 10)
RELATIONS = (operator.lt, operator.le, operator.gt, operator.ge, sympy.Eq, sympy.Ne)


def verdict(expression: Any, length: Any = LENGTH) -> MaskSpec | str:
    try:
        return _classify(None, expression, sympy.sympify(length), sympy.sympify(length), 1)  # type: ignore[arg-type]
    except _NotOurs as reason:
        return str(reason)


def seen(expression: Any, size: int) -> list[list[bool]]:
    """The mask of one size, entry by entry."""
    function = sympy.lambdify((QUERY, KEY, LENGTH), expression, "math")
    return [[bool(function(query, key, size)) for key in range(size)] for query in range(size)]


def meant(spec: MaskSpec, size: int) -> list[list[bool]]:
    window = size if spec.sliding_window is None else spec.sliding_window
    if not spec.is_causal:
        return [[True] * size for _ in range(size)]
    return [[0 <= query - key < window for key in range(size)] for query in range(size)]


def check_sound(expression: Any) -> None:
    spec = verdict(expression)
    if isinstance(spec, MaskSpec):
        for size in SIZES:
            assert seen(expression, size) == meant(spec, size), (spec, size)


@st.composite
def comparisons(draw: st.DrawFn, about_distance: bool = False) -> Any:
    query = draw(st.integers(-2, 2))
    key = -query if about_distance else draw(st.one_of(st.just(-query), st.integers(-2, 2)))
    side = query * QUERY + key * KEY + draw(st.integers(-4, 4)) + draw(st.sampled_from((0, 0, 0, 1, -1))) * LENGTH
    return draw(st.sampled_from(RELATIONS))(side, 0)


def combinations(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds(sympy.And, inner, inner), st.builds(sympy.Or, inner, inner), st.builds(sympy.Not, inner)
        ),
        max_leaves=4,
    )


@settings(max_examples=150, derandomize=True, database=None)
@given(combinations(comparisons()))
def test_whatever_is_proved_is_the_mask_at_every_size(expression: Any) -> None:
    check_sound(expression)


@settings(max_examples=150, derandomize=True, database=None)
@given(combinations(comparisons(about_distance=True)))
def test_whatever_is_proved_about_distances_is_the_mask(expression: Any) -> None:
    check_sound(expression)


def _forget_the_window(spec: MaskSpec) -> MaskSpec:
    return MaskSpec(spec.is_causal)


def _window_off_by_one(spec: MaskSpec) -> MaskSpec:
    return MaskSpec(spec.is_causal, spec.sliding_window and spec.sliding_window + 1)


def _always_causal(spec: MaskSpec) -> MaskSpec:
    return MaskSpec(True, spec.sliding_window)


@pytest.mark.parametrize("planted", [_forget_the_window, _window_off_by_one, _always_causal])
def test_a_planted_wrong_verdict_is_caught(
    planted: Callable[[MaskSpec], MaskSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = mask_proof._classify
    monkeypatch.setattr(f"{__name__}._classify", lambda *arguments: planted(right(*arguments)))
    first = settings(max_examples=200, derandomize=True, database=None, phases=[Phase.generate])
    with pytest.raises(AssertionError):
        first(given(simple_masks())(lambda drawn: check_sound(drawn[0])))()


@st.composite
def simple_masks(draw: st.DrawFn) -> tuple[Any, MaskSpec]:
    """Causal, in a window, or everything, in any spelling by comparisons of one distance; and what it is."""
    window = draw(st.one_of(st.none(), st.integers(1, 5)))
    everything = window is None and draw(st.booleans())
    distance, factor = QUERY - KEY, draw(st.integers(1, 3))
    not_later = draw(
        st.sampled_from(
            (
                factor * distance >= 0,
                factor * distance > -1,
                -factor * distance <= 0,
                factor * KEY <= factor * QUERY,
                sympy.Not(KEY > QUERY),
                sympy.Not(QUERY < KEY),
            )
        )
    )
    if everything:
        always = draw(st.sampled_from((QUERY + KEY >= 0, KEY <= LENGTH - 1, distance < LENGTH, sympy.true)))
        return sympy.Or(always, not_later) if draw(st.booleans()) else always, MaskSpec(False)
    if window is None:
        redundant = draw(st.sampled_from((sympy.true, distance >= -3, KEY >= 0, distance < LENGTH)))
        return sympy.And(not_later, redundant), MaskSpec(True)
    near = draw(
        st.sampled_from(
            (distance < window, QUERY - window < KEY, sympy.Not(distance >= window), distance <= window - 1)
        )
    )
    return sympy.And(not_later, near), MaskSpec(True, window)


@settings(max_examples=150, derandomize=True, database=None)
@given(simple_masks())
def test_every_simple_mask_is_proved(drawn: tuple[Any, MaskSpec]) -> None:
    expression, expected = drawn
    assert verdict(expression) == expected


def test_a_window_that_no_static_length_reaches_is_no_window() -> None:
    mask = sympy.And(QUERY >= KEY, QUERY - KEY < 8)
    assert verdict(mask, 8) == MaskSpec(True)
    assert verdict(mask, 9) == MaskSpec(True, 8)


@pytest.mark.parametrize("expression", [sympy.Lt(QUERY, 0), sympy.false, QUERY + LENGTH < KEY])
def test_a_mask_that_hides_everything_is_refused(expression: Any) -> None:
    assert "every key is hidden" in verdict(expression)


def test_the_picture_shows_seen_hidden_and_unknown() -> None:
    unknown = sympy.Ne(sympy.Function("documents")(KEY), 0)
    assert Unproved("", sympy.Ge(QUERY, KEY)).picture(3) == "#..\n##.\n###"
    assert Unproved("", sympy.Piecewise((0, QUERY > KEY), (-sympy.oo, True))).picture(2) == "..\n#."
    assert Unproved("", sympy.And(QUERY >= KEY, unknown)).picture(2) == "?.\n??"
