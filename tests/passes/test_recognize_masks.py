"""Masks that mean causal, a window, ALiBi or nothing become attributes; all others stay as they are, with a reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from infercomp.codegen.model_graph import ModelGraph
from infercomp.codegen.ops import attention
from infercomp.passes import recognize_masks
from infercomp.passes.mask_proof import MaskSpec
from infercomp.passes.record import PassRecord
from infercomp.runtime.errors import VerificationError
from tests.graph_testing import assert_graph_agrees, captured, count, run_passes

PASSES = ("normalize", "recognize_attention", "recognize_masks")
HEADS = 4
LENGTHS = (2, 7, 13)
Mask = Callable[[int], torch.Tensor]


def tokens(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, HEADS, length, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attending(mask: Mask) -> Callable[[torch.Tensor], torch.Tensor]:
    """Attention of a sequence to itself under ``mask(length)``: bool masks are seen where True, floats are added."""

    def function(x: torch.Tensor) -> torch.Tensor:
        bias = mask(x.shape[2])
        if bias.dtype != torch.bool:
            bias = bias.to(x.dtype)
        return F.scaled_dot_product_attention(x, x, x, attn_mask=bias)

    return function


def with_masks(function: Callable[..., Any], *inputs: torch.Tensor, **options: Any) -> tuple[ModelGraph, PassRecord]:
    model_graph = captured(function, *inputs, **options)
    return model_graph, run_passes(model_graph, *PASSES, inputs=inputs)[-1]


def attributes(model_graph: ModelGraph) -> tuple[bool, int | None, bool, bool]:
    """(is_causal, sliding_window, has a bias, has slopes) of the graph's one attention."""
    (node,) = model_graph.calls(attention.overload)
    bias, slopes = (*node.args[3:5], None, None)[:2]
    window = node.kwargs.get("sliding_window")
    return bool(node.kwargs.get("is_causal")), window, bias is not None, slopes is not None


def order(length: int) -> torch.Tensor:
    return torch.arange(length)


def distance(length: int) -> torch.Tensor:
    return order(length)[:, None] - order(length)[None]


def ones(length: int, **options: Any) -> torch.Tensor:
    return torch.ones(length, length, **options)


def hidden_by(hidden: torch.Tensor, fill: float = -math.inf) -> torch.Tensor:
    return torch.zeros(hidden.shape).masked_fill(hidden, fill)


def _counted(length: int) -> torch.Tensor:
    counted = torch.cumsum(torch.ones(1, length, dtype=torch.int64), -1) - 1
    return counted[:, None, :] <= counted[:, :, None]


def _packed_sequences(length: int) -> torch.Tensor:
    """As transformers builds it: the same document, found from jumps of the positions, and not later."""
    positions = order(length)[None]
    jumps = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1
    document = jumps.cumsum(-1)
    row, column = order(length)[:, None], order(length)[None]
    batch = torch.zeros(1, dtype=torch.int64)[:, None, None, None]
    same = document[batch, row[None, None]] == document[batch, column[None, None]]
    return (column <= row)[None, None] & same


CAUSAL: dict[str, Mask] = {
    "tril": lambda n: ones(n).tril().bool(),
    "tril_of_bool": lambda n: ones(n, dtype=torch.bool).tril(),
    "not_triu": lambda n: ~ones(n, dtype=torch.bool).triu(1),
    "keys_at_most_queries": lambda n: order(n)[None] <= order(n)[:, None],
    "queries_at_least_keys": lambda n: order(n)[:, None] >= order(n)[None],
    "keys_below_next": lambda n: order(n)[None] < order(n)[:, None] + 1,
    "distance": lambda n: distance(n) >= 0,
    "distance_above": lambda n: distance(n) > -1,
    "not_later": lambda n: ~(order(n)[None] > order(n)[:, None]),
    "cumsum": _counted,
    "filled_with_infinity": lambda n: hidden_by(ones(n, dtype=torch.bool).triu(1)),
    "filled_with_lowest": lambda n: hidden_by(ones(n, dtype=torch.bool).triu(1), torch.finfo(torch.float32).min),
    "full_of_infinity": lambda n: torch.full((n, n), -math.inf).triu(1),
    "full_of_lowest": lambda n: torch.full((n, n), torch.finfo(torch.float32).min).triu(1),
    "where": lambda n: torch.where(distance(n) >= 0, 0.0, -math.inf)[None, None],
    "one_minus": lambda n: (1.0 - ones(n).tril()) * torch.finfo(torch.float32).min,
    "equal_to_zero": lambda n: ones(n).tril()[None, None] != 0,
    "product_of_bools": lambda n: ones(n, dtype=torch.bool).tril() * (order(n)[None] >= 0),
    "above_infinity": lambda n: hidden_by(ones(n, dtype=torch.bool).triu(1)) > -math.inf,
    "packed_sequences": _packed_sequences,
    "expanded": lambda n: (distance(n) >= 0)[None, None].expand(2, HEADS, n, n),
    "doubled_lengths": lambda n: 2 * order(n)[None] <= 2 * order(n)[:, None] + 1,
    "halves": lambda n: order(n)[None].float() - 0.5 <= order(n)[:, None].float(),
    "implied_twice": lambda n: (distance(n) >= 0) & (distance(n) >= -5) | (distance(n) > 3),
}

WINDOWS: dict[str, Mask] = {
    "newer_than": lambda n: (order(n)[None] <= order(n)[:, None]) & (order(n)[None] > order(n)[:, None] - 3),
    "distance_below": lambda n: (distance(n) >= 0) & (distance(n) < 3),
    "triu_of_tril": lambda n: ones(n).tril().triu(-2).bool(),
    "two_fills": lambda n: hidden_by(distance(n) < 0) + hidden_by(distance(n) >= 3),
    "nested_where": lambda n: torch.where(distance(n) > 2, -math.inf, torch.where(distance(n) < 0, -math.inf, 0.0)),
    "absolute": lambda n: (distance(n) >= 0) & (distance(n).abs() <= 2),
    "not_or": lambda n: ~((distance(n) < 0) | (distance(n) >= 3)),
}

NOTHING: dict[str, Mask] = {
    "zeros": lambda n: torch.zeros(n, n),
    "trues": lambda n: ones(n, dtype=torch.bool),
    "always_true": lambda n: order(n)[None] + order(n)[:, None] >= 0,
    "of_the_row_only": lambda n: (order(n)[:, None] * 0.5).expand(n, n),
    "inside_of_the_length": lambda n: (order(n)[None] < n).expand(n, n),
}


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        *[pytest.param(mask, (True, None), id=f"causal-{name}") for name, mask in CAUSAL.items()],
        *[pytest.param(mask, (True, 3), id=f"window-{name}") for name, mask in WINDOWS.items()],
        *[pytest.param(mask, (False, None), id=f"nothing-{name}") for name, mask in NOTHING.items()],
    ],
)
def test_a_mask_is_proved_and_gives_the_same_numbers(
    mask: Mask, expected: tuple[bool, int | None], dynamic: bool
) -> None:
    function = attending(mask)
    model_graph, record = with_masks(function, tokens(7), dynamic={0: 2} if dynamic else None)
    assert attributes(model_graph) == (*expected, False, False), record.near_misses
    for length in LENGTHS if dynamic else (7,):
        assert_graph_agrees(model_graph, function, [tokens(length)])


def computed_slopes() -> torch.Tensor:
    return torch.pow(2.0, -torch.arange(1, HEADS + 1, dtype=torch.float32))[:, None, None]


def constant_slopes() -> torch.Tensor:
    return torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None]


ALIBI: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "key": lambda slopes, n: slopes * order(n)[None, None].float(),
    "key_minus_query": lambda slopes, n: slopes * -distance(n)[None].float(),
    "key_minus_last": lambda slopes, n: slopes * (order(n)[None, None] - (n - 1)).float(),
    "negative_distance": lambda slopes, n: -slopes * distance(n)[None].float(),
    "doubled": lambda slopes, n: 2.0 * (slopes * order(n)[None, None].float()),
}


@pytest.mark.parametrize("slopes", [computed_slopes, constant_slopes])
@pytest.mark.parametrize("name", ALIBI)
def test_alibi_becomes_slopes(name: str, slopes: Callable[[], torch.Tensor]) -> None:
    def mask(length: int) -> torch.Tensor:
        return (ALIBI[name](slopes(), length) + hidden_by(distance(length) < 0))[None]

    model_graph, record = with_masks(attending(mask), tokens(7), dynamic={0: 2})
    assert attributes(model_graph) == (True, None, False, True), record.near_misses
    for length in LENGTHS:
        assert_graph_agrees(model_graph, attending(mask), [tokens(length)])


UNUSUAL: dict[str, tuple[Mask, str]] = {
    "prefix": (lambda n: (distance(n) >= 0) | (order(n)[None] < 3), "is not about the distance"),
    "documents": (
        lambda n: (distance(n) >= 0) & ((order(n) // 3)[:, None] == (order(n) // 3)[None]),
        "whose value is not known when compiling",
    ),
    "both_directions": (lambda n: distance(n).abs() < 3, "visible from distance -2"),
    "one_future_key": (lambda n: distance(n) >= -1, "visible from distance -"),
    "hides_itself": (lambda n: (distance(n) > 0) | (order(n)[None] == 0), "is not about the distance"),
    "strictly_causal": (lambda n: hidden_by(distance(n) <= 0, -1e9), "get different biases"),
    "every_other_key": (lambda n: (distance(n) >= 0) & (distance(n) % 2 == 0), "not known when compiling"),
    "a_hole": (lambda n: (distance(n) == 0) | (distance(n) >= 2), "are not one interval"),
    "later_only": (lambda n: distance(n) <= 0, "visible from distance"),
    "soft_bias": (lambda n: torch.where(distance(n) >= 0, 0.0, -1.0), "get different biases"),
    "window_of_half_the_length": (
        lambda n: (distance(n) >= 0) & (2 * distance(n) <= n),
        "is not about the distance",
    ),
    "quadratic": (lambda n: -(order(n)[None].float() ** 2) * 0.01 + hidden_by(distance(n) < 0), ""),
    "depends_on_head": (
        lambda n: (distance(n) >= 0)[None] & (distance(n)[None] <= torch.arange(HEADS)[:, None, None]),
        "",
    ),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_an_unusual_mask_stays_with_its_reason(name: str) -> None:
    mask, reason = UNUSUAL[name]
    model_graph, record = with_masks(attending(mask), tokens(7), dynamic={0: 2})
    assert attributes(model_graph)[2:] == (True, False)
    assert attributes(model_graph)[:2] == (False, None)
    (miss,) = record.near_misses
    assert reason in miss.reason
    for length in LENGTHS:
        assert_graph_agrees(model_graph, attending(mask), [tokens(length)])


@pytest.mark.parametrize("queries", [3, 9])
def test_other_lengths_of_queries_and_keys(queries: int) -> None:
    """Aligned with the last key it is causal, unless some query would see nothing; with the first it stays."""

    def aligned_last(q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        offset = x.shape[2] - q.shape[2]
        mask = order(x.shape[2])[None] <= order(q.shape[2])[:, None] + offset
        lowest = hidden_by(~mask, torch.finfo(torch.float32).min).to(q.dtype)
        return F.scaled_dot_product_attention(q, x, x, attn_mask=lowest)

    def aligned_first(q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, x, x, is_causal=True)

    inputs = [tokens(queries, seed=1), tokens(7)]
    proved, _ = with_masks(aligned_last, *inputs)
    assert attributes(proved) == ((True, None, False, False) if queries < 7 else (False, None, True, False))
    assert_graph_agrees(proved, aligned_last, inputs)
    kept, _ = with_masks(aligned_first, *inputs)
    assert attributes(kept) == (False, None, True, False)
    assert_graph_agrees(kept, aligned_first, inputs)


def _window_from_input(x: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    near = (distance(x.shape[2]) >= 0) & (distance(x.shape[2]) < window)
    return F.scaled_dot_product_attention(x, x, x, attn_mask=near)


def _padding_from_input(x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(x, x, x, attn_mask=(distance(x.shape[2]) >= 0) & padding)


def _learned_bias(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    hidden = hidden_by(distance(x.shape[2]) < 0).to(x.dtype)
    return F.scaled_dot_product_attention(x, x, x, attn_mask=hidden + bias)


@pytest.mark.parametrize(
    ("function", "extra", "reason"),
    [
        (_window_from_input, torch.tensor(3), "depends on window(), whose value is not known when compiling"),
        (_padding_from_input, torch.tensor([True, True, False, True, True, True, False]), "depends on padding(key)"),
        (_learned_bias, torch.linspace(-1, 1, 49, dtype=torch.float64).reshape(7, 7), "is not linear in the key's"),
    ],
)
def test_a_mask_that_depends_on_an_input_stays(function: Callable[..., Any], extra: torch.Tensor, reason: str) -> None:
    model_graph, record = with_masks(function, tokens(7), extra)
    assert attributes(model_graph) == (False, None, True, False)
    assert reason in record.near_misses[0].reason
    assert_graph_agrees(model_graph, function, [tokens(7), extra])


def test_positions_are_taken_to_count_only_by_contract() -> None:
    """An input of another name may hold anything, so a mask made from it is not proved."""

    def named(x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x, attn_mask=position_ids[:, None, :] <= position_ids[:, :, None])

    def unnamed(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return named(x, places)

    inputs = tokens(7)[:1], order(7)[None]
    assert attributes(with_masks(named, *inputs)[0]) == (True, None, False, False)
    assert attributes(with_masks(unnamed, *inputs)[0]) == (False, None, True, False)


def test_a_layer_is_switched_off_alone() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        layer = attending(CAUSAL["tril"])
        return layer(layer(x))

    model_graph = captured(function, tokens(7))
    record = run_passes(model_graph, *PASSES, disable=("recognize_masks#1",))[-1]
    assert (record.matches, record.skipped) == (1, 1)
    assert count(model_graph, attention) == 2
    assert_graph_agrees(model_graph, function, [tokens(7)])


@pytest.mark.parametrize(
    "wrong", [MaskSpec(False), MaskSpec(True, 2), MaskSpec(True, 4), MaskSpec(True)], ids=["all", "2", "4", "causal"]
)
def test_a_planted_wrong_proof_is_caught(wrong: MaskSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recognize_masks, "prove", lambda model_graph, node: wrong)
    with pytest.raises(VerificationError):
        with_masks(attending(WINDOWS["distance_below"]), tokens(7))
