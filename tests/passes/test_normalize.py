"""normalize: every spelling becomes one, nothing else changes, and the values stay the same bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_testing import FileCheck, captured, count, outputs, run_passes, text
from hypothesis import given, settings
from hypothesis import strategies as st

aten = torch.ops.aten

GONE = {
    "alias": lambda x: torch.ops.aten.alias(x) * 2,
    "clone": lambda x: x.clone() * 2,
    "detach": lambda x: x.detach() * 2,
    "contiguous": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1) * 2,
    "same dtype": lambda x: x.to(torch.float32) * 2,
    "type_as": lambda x: x.type_as(x) * 2,
    "same shape": lambda x: x.view(2, 3, 4) * 2,
    "chain back": lambda x: x.reshape(6, 4).reshape(2, 3, 4) * 2,
    "flatten and back": lambda x: x.flatten(1).view(2, 3, 4) * 2,
    "permuted twice": lambda x: x.transpose(0, 2).permute(2, 1, 0) * 2,
    "whole slice": lambda x: x[:, 0:] * 2,
    "whole split": lambda x: x.split(4, -1)[0] * 2,
    "cat of one": lambda x: torch.cat([x]) * 2,
    "cat with empty": lambda x: torch.cat([x[:, :0], x], 1) * 2,
    "expand": lambda x: x.expand(-1, 3, -1) * 2,
    "repeat once": lambda x: x.repeat(1, 1, 1) * 2,
    "add nothing": lambda x: (x + 0) * 2,
    "take nothing": lambda x: (x - 0) * 2,
    "times one": lambda x: (1 * x) * 2,
    "over one": lambda x: (x / 1) * 2,
    "dropout in eval": lambda x: torch.dropout(x, 0.5, False) * 2,
    "dropout of nothing": lambda x: torch.dropout(x, 0.0, True) * 2,
}


@pytest.mark.parametrize("spelling", GONE.values(), ids=GONE)
def test_what_does_nothing_is_removed(spelling: Callable[..., Any]) -> None:
    x = torch.randn(2, 3, 4)
    model_graph = captured(spelling, x)
    (record,) = run_passes(model_graph, "normalize", inputs=[x])
    assert record.matches >= 1
    assert record.max_error == 0.0
    assert [node.target for node in model_graph.graph.nodes if node.op == "call_function"] == [aten.mul.Tensor]
    assert torch.equal(outputs(model_graph, [x])[0], spelling(x))


FORMS = {
    "view": (lambda x: x.view(6, 4), "aten.reshape.default](args = (%x, [6, 4])"),
    "flatten": (lambda x: x.flatten(1), "aten.reshape.default](args = (%x, [2, 12])"),
    "reshapes": (lambda x: x.view(6, 4).view(3, 8), "aten.reshape.default](args = (%x, [3, 8])"),
    "transpose": (lambda x: x.transpose(-1, 1), "aten.permute.default](args = (%x, [0, 2, 1])"),
    "swapaxes": (lambda x: x.swapaxes(0, 1), "aten.permute.default](args = (%x, [1, 0, 2])"),
    "negative dims": (lambda x: x.permute(-1, 0, 1), "aten.permute.default](args = (%x, [2, 0, 1])"),
    "two permutes": (lambda x: x.transpose(0, 1).transpose(1, 2), "aten.permute.default](args = (%x, [1, 2, 0])"),
    "split": (lambda x: x.split([1, 3], -1)[1], "aten.slice.Tensor](args = (%x, 2, 1, 4)"),
    "chunk": (lambda x: x.chunk(2, 2)[1], "aten.slice.Tensor](args = (%x, 2, 2, 4)"),
    "uneven split": (lambda x: x.split(2, 1)[1], "aten.slice.Tensor](args = (%x, 1, 2, 3)"),
    "negative slice": (lambda x: x[..., -3:-1], "aten.slice.Tensor](args = (%x, 2, 1, 3)"),
    "slice with step": (lambda x: x[..., 1::2], "aten.slice.Tensor](args = (%x, 2, 1, 4, 2)"),
    "product with itself": (lambda x: x * x, "aten.pow.Tensor_Scalar](args = (%x, 2)"),
    "square": (lambda x: torch.square(x), "aten.pow.Tensor_Scalar](args = (%x, 2)"),
    "cast": (lambda x: x.double(), "aten._to_copy.default](args = (%x,), kwargs = {dtype: torch.float64}"),
    "cat on a negative dim": (lambda x: torch.cat([x, x], -1), "aten.cat.default](args = ([%x, %x], 2)"),
}


@pytest.mark.parametrize(("spelling", "expected"), FORMS.values(), ids=FORMS)
def test_each_thing_has_one_form(spelling: Callable[..., Any], expected: str) -> None:
    x = torch.randn(2, 3, 4)
    model_graph = captured(spelling, x)
    run_passes(model_graph, "normalize", inputs=[x])
    FileCheck().check_count("call_function", 1, exactly=True).check(expected).run(text(model_graph))
    assert torch.equal(outputs(model_graph, [x])[0], spelling(x))


KEPT = {
    "dropout in training": (lambda x: torch.dropout(x, 0.5, True), aten.dropout.default),
    "another factor": (lambda x: x * 1.5, aten.mul.Tensor),
    "another term": (lambda x: x + 1, aten.add.Tensor),
    "division of integers": (lambda x: x.long() / 1, aten.div.Tensor),
    "0.0 makes a float": (lambda x: x.long() + 0.0, aten.add.Tensor),
    "real expand": (lambda x: x[:, :1].expand(2, 3, 4), aten.expand.default),
    "repeat": (lambda x: x.repeat(2, 1, 1), aten.repeat.default),
    "step over one entry": (lambda x: x[:, ::3], aten.slice.Tensor),
    "cat promotes by an empty part": (lambda x: torch.cat([x, x[:0].double()]), aten.cat.default),
    "integer square": (lambda x: torch.square(x.long()), aten.square.default),
    "cast down and up": (lambda x: x.half().float() * 2, aten._to_copy.default),
}


@pytest.mark.parametrize(("spelling", "target"), KEPT.values(), ids=KEPT)
def test_what_changes_something_is_kept(spelling: Callable[..., Any], target: Any) -> None:
    x = torch.randn(2, 3, 4)
    model_graph = captured(spelling, x)
    run_passes(model_graph, "normalize")
    assert count(model_graph, target) >= 1
    if target != aten.dropout.default:
        (found,) = outputs(model_graph, [x])
        assert found.dtype == spelling(x).dtype
        assert torch.equal(found, spelling(x))


def test_equal_calls_become_one_and_count_as_matches() -> None:
    x = torch.randn(2, 3)
    model_graph = captured(lambda x: x.exp() + x.exp() * x.exp(), x)
    (record,) = run_passes(model_graph, "normalize", inputs=[x])
    assert count(model_graph, aten.exp.default) == 1
    assert count(model_graph, aten.pow.Tensor_Scalar) == 1
    assert record.matches == 3, "two merges, and a product that became a square"


def test_equal_random_calls_stay_two() -> None:
    x = torch.randn(2, 3)
    model_graph = captured(lambda x: torch.rand_like(x) - torch.rand_like(x), x)
    run_passes(model_graph, "normalize")
    assert count(model_graph, aten.rand_like.default) == 2


def test_calls_that_differ_in_type_of_a_number_stay_two() -> None:
    x = torch.arange(6)
    model_graph = captured(lambda x: (x + 1, x + 1.0), x)
    run_passes(model_graph, "normalize")
    assert [each.dtype for each in outputs(model_graph, [x])] == [torch.int64, torch.float32]


def test_disabled_it_changes_nothing() -> None:
    x = torch.randn(2, 3)
    model_graph = captured(lambda x: x.exp().clone() + x.exp(), x)
    before = text(model_graph)
    (record,) = run_passes(model_graph, "normalize", disable=("normalize",))
    assert text(model_graph) == before
    assert record.matches == 0
    assert record.skipped >= 2


def test_flatten_of_nothing_and_of_a_number() -> None:
    for x, dims in ((torch.randn(0, 3, 4), (1, 2)), (torch.randn(2, 0, 4), (0, 1)), (torch.tensor(3.0), (0, -1))):
        model_graph = captured(lambda x, dims=dims: x.flatten(*dims) * 2, x)
        run_passes(model_graph, "normalize", inputs=[x])
        assert torch.equal(outputs(model_graph, [x])[0], x.flatten(*dims) * 2)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.clone(),
        lambda x: x.clone().view(-1).transpose(0, 0),
        lambda x: torch.cat([x]).split(2)[0],
        lambda x: x.t().contiguous().t(),
        lambda x: x.to(torch.float64).to(torch.float32).clone(),
        lambda x: (x * 1).expand(3, *x.shape),
    ],
)
def test_copy_of_an_input_stays_a_copy(function: Callable[..., Any]) -> None:
    """Who writes to a result must not change the input; an input that is written later must not change a result."""
    x = torch.randn(4, 3)
    model_graph = captured(function, x)
    run_passes(model_graph, "normalize", inputs=[x])
    (found,) = outputs(model_graph, [x])
    assert found.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert torch.equal(found, function(x))


def test_two_outputs_do_not_come_to_share_memory() -> None:
    x = torch.randn(4)
    model_graph = captured(lambda x: (y := x.exp(), y.clone(), y.view(2, 2), x.exp()), x)
    run_passes(model_graph, "normalize", inputs=[x])
    assert count(model_graph, aten.exp.default) == 1
    first, copy, view, again = (each.untyped_storage().data_ptr() for each in outputs(model_graph, [x]))
    assert first == view
    assert len({first, copy, again}) == 3


def test_sizes_are_read_from_inputs() -> None:
    x = torch.randn(1, 5, 4)
    model_graph = captured(lambda x: torch.arange(x.exp().shape[1]), x, dynamic={0: 1})
    run_passes(model_graph, "normalize", inputs=[x])
    FileCheck().check("sym_size.int](args = (%x, 1)").check_not("exp").run(text(model_graph))


Chain = list[tuple[int, int, int]]


def _steps(x: torch.Tensor, a: int, b: int, static: bool) -> list[Callable[[], torch.Tensor]]:
    """The ops that may come next; sizes are never compared, so that they hold for a symbolic extent too."""
    rank = x.dim()
    first, second = a % rank, b % rank
    order = [(each + a) % rank for each in range(rank)]
    steps = [
        lambda: x.transpose(first, second),
        lambda: x.transpose(first - rank, second).permute(order),
        lambda: x.permute(order),
        lambda: x.contiguous().view(x.shape),
        lambda: x.flatten(min(first, second), max(first, second)),
        lambda: x.clone(),
        lambda: torch.dropout(x, 0.3, False),
        lambda: x + 0,
        lambda: 1 * x,
        lambda: x / 1,
        lambda: x.double().to(torch.float32),
        lambda: x.to(torch.float16),
        lambda: x[None].expand(1 + b % 2, *x.shape).reshape((1 + b % 2) * x.shape[0], *x.shape[1:]),
        lambda: x.expand(x.shape),
        lambda: x.repeat(*([1] * rank)),
        lambda: torch.cat([x, x * 2], first),
        lambda: torch.cat([x], first),
        lambda: x.exp() + x.exp(),
    ]
    if static:
        steps += [
            lambda: x.narrow(first, 0, x.shape[first] // 2),
            lambda: torch.slice_copy(x, first, -(b + 1), None, 1 + a % 2),
            lambda: x.movedim(first, second),
            lambda: x.split(1 + b, first)[-1],
            lambda: x.chunk(1 + b, first)[0],
            lambda: torch.cat([x.narrow(first, 0, 0), x], first),
            lambda: x.reshape(-1) if x.numel() else x,
        ]
    return steps


def _chain(steps: Chain, static: bool) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    def run(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        between = x
        for position, (which, a, b) in enumerate(steps):
            choices = _steps(x, a, b, static)
            x = choices[which % len(choices)]()
            between = x if position == 0 else between
        return between, x

    return run


def _shares_memory(results: list[torch.Tensor], x: torch.Tensor) -> list[bool]:
    address = x.untyped_storage().data_ptr()
    return [each.numel() > 0 and each.untyped_storage().data_ptr() == address for each in results]


def _check_chain(steps: Chain, example: torch.Tensor, others: list[torch.Tensor], static: bool) -> None:
    function = _chain(steps, static)
    model_graph = captured(function, example, dynamic=None if static else {0: 1})
    inputs = [example, *others]
    before = [outputs(model_graph, [x]) for x in inputs]
    shared = [_shares_memory(results, x) for results, x in zip(before, inputs, strict=True)]
    run_passes(model_graph, "normalize", inputs=[example])
    for x, expected, was_shared in zip(inputs, before, shared, strict=True):
        found = outputs(model_graph, [x])
        for one, other, eager in zip(expected, found, function(x), strict=True):
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            assert torch.equal(one, other)
            assert torch.equal(eager, other)
        assert all(was or not now for was, now in zip(was_shared, _shares_memory(found, x), strict=True))


_CHAINS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=6)


@settings(max_examples=50)
@given(_CHAINS, st.lists(st.sampled_from([0, 1, 2, 3, 4]), min_size=1, max_size=4), st.booleans())
def test_static_chains_are_bit_identical(steps: Chain, shape: list[int], is_contiguous: bool) -> None:
    x = torch.randn(shape) if is_contiguous else torch.randn(shape[::-1]).permute(*range(len(shape))[::-1])
    _check_chain(steps, x, [], static=True)


@settings(max_examples=20)
@given(_CHAINS)
def test_symbolic_chains_are_bit_identical_at_every_length(steps: Chain) -> None:
    _check_chain(steps, torch.randn(2, 5, 4), [torch.randn(2, length, 4) for length in (2, 8)], static=False)
