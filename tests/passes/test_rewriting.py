"""The rule engine: what a pattern matches, what it says of what it nearly matches, and what stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_testing import FileCheck, assert_graph_agrees, captured, count, run_passes, text
from torch import fx

from infercomp.codegen.model_graph import Emitter, ModelGraph
from infercomp.passes.graph_pass import Pass, PassContext
from infercomp.passes.record import PassRecord
from infercomp.passes.rewriting import Bindings, Pattern, Rule, apply_rules, call

aten = torch.ops.aten


def _rule(name: str, pattern: Callable[..., Pattern], replacement: Callable[..., fx.Node], **options: Any) -> Rule:
    return Rule(name, pattern, replacement, **options)


def _pass(*rules: Rule) -> Pass:
    def run(model_graph: ModelGraph, context: PassContext) -> None:
        apply_rules(rules, model_graph, context)

    return Pass("test_rules", run)


def _exp(x: Pattern) -> Pattern:
    return call(aten.exp.default, x)


def _product_of_exps(x: Pattern, y: Pattern) -> Pattern:
    return _exp(x) * _exp(y)


def _exp_of_sum(emit: Emitter, x: fx.Node, y: fx.Node) -> fx.Node:
    return emit(aten.exp.default, emit(aten.add.Tensor, x, y))


EXPS = _rule("exps", _product_of_exps, _exp_of_sum, near_miss_at=2)


def _run(function: Callable[..., Any], *inputs: torch.Tensor, rules: tuple[Rule, ...] = (EXPS,), **options: Any):  # type: ignore[no-untyped-def]
    model_graph = captured(function, *inputs)
    (record,) = run_passes(model_graph, _pass(*rules), inputs=inputs, **options)
    return model_graph, record


def _inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    return torch.randn(3, dtype=dtype), torch.randn(3, dtype=dtype), torch.randn(3, dtype=dtype)


def test_match_is_replaced_and_its_interior_goes() -> None:
    x, y, _ = _inputs()
    model_graph, record = _run(lambda x, y: x.exp() * y.exp(), x, y)
    assert record.matches == 1
    FileCheck().check("aten.add.Tensor](args = (%x, %y)").check("exp").check_not("mul").run(text(model_graph))
    assert_graph_agrees(model_graph, lambda x, y: x.exp() * y.exp(), [x, y])


def test_interior_that_is_used_elsewhere_stays() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        e = x.exp()
        return e * y.exp() + e

    x, y, _ = _inputs()
    model_graph, _ = _run(function, x, y)
    assert count(model_graph, aten.exp.default) == 2
    assert_graph_agrees(model_graph, function, [x, y])


def _same_twice(x: Pattern, y: Pattern) -> Pattern:
    return x * (_exp(x) + y)


def _left(emit: Emitter, x: fx.Node, y: fx.Node) -> fx.Node:
    return emit(aten.add.Tensor, emit(aten.mul.Tensor, x, emit(aten.exp.default, x)), emit(aten.mul.Tensor, x, y))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: x * (x.exp() + y),
        lambda x, y: x * (y + x.exp()),
        lambda x, y: (x.exp() + y) * x,
        lambda x, y: (y + x.exp()) * x,
    ],
)
def test_both_orders_of_commutative_calls_match(function: Callable[..., torch.Tensor]) -> None:
    x, y, _ = _inputs()
    model_graph, record = _run(function, x, y, rules=(_rule("twice", _same_twice, _left),))
    assert record.matches == 1
    assert_graph_agrees(model_graph, function, [x, y])


def test_wildcard_that_stands_twice_must_be_one_node() -> None:
    x, y, z = _inputs()
    model_graph, record = _run(lambda x, y, z: z * (x.exp() + y), x, y, z, rules=(_rule("twice", _same_twice, _left),))
    assert record.matches == 0
    assert record.near_misses[0].reason == "twice: x is z in one place and x in another"
    assert count(model_graph, aten.mul.Tensor) == 1


def test_division_does_not_commute() -> None:
    rule = _rule(
        "over", lambda x, y: _exp(x) / y, lambda emit, x, y: emit(aten.div.Tensor, emit(aten.exp.default, x), y)
    )
    x, y, _ = _inputs()
    assert _run(lambda x, y: x.exp() / y, x, y, rules=(rule,))[1].matches == 1
    assert _run(lambda x, y: y / x.exp(), x, y, rules=(rule,))[1].matches == 0


def test_casts_between_floats_are_looked_through_and_the_dtype_is_kept() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.float().exp() * y.double().exp().to(torch.float32)

    x, y, _ = _inputs(torch.bfloat16)
    model_graph, record = _run(function, x, y)
    assert record.matches == 1
    assert_graph_agrees(model_graph, function, [x, y], 1e-2)


def test_casts_from_integers_are_not_looked_through() -> None:
    x, y = torch.arange(3), torch.randn(3, dtype=torch.float64)
    model_graph, record = _run(lambda x, y: x.double().exp() * y.exp(), x, y)
    assert record.matches == 1
    FileCheck().check("torch.float64").check("aten.add.Tensor](args = (%to, %y)").run(text(model_graph))


def test_wide_result_is_computed_from_wide_operands() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.float().exp() * y.float().exp()

    x, y, _ = _inputs(torch.bfloat16)
    model_graph, _ = _run(function, x, y)
    assert count(model_graph, aten.mul.Tensor) == 0
    assert_graph_agrees(model_graph, function, [x, y], 1e-6)


@pytest.mark.parametrize(
    "function", [lambda x, y: torch.add(x.exp(), y, alpha=2) * x, lambda x, y: x * torch.add(y, x.exp(), alpha=2)]
)
def test_further_operands_must_be_at_their_default(function: Callable[..., torch.Tensor]) -> None:
    x, y, _ = _inputs()
    _, record = _run(function, x, y, rules=(_rule("twice", _same_twice, _left, near_miss_at=1),))
    assert record.matches == 0
    assert "has other operands than add" in record.near_misses[0].reason


def test_guard_refuses_with_its_reason() -> None:
    def refuse(bindings: Bindings, root: fx.Node) -> str | None:
        return f"not with {bindings['x'].name} at {root.name}"

    rule = _rule("guarded", _product_of_exps, _exp_of_sum, guard=refuse)
    x, y, _ = _inputs()
    model_graph, record = _run(lambda x, y: x.exp() * y.exp(), x, y, rules=(rule,))
    assert [miss.reason for miss in record.near_misses] == ["guarded: not with y at mul"]
    assert count(model_graph, aten.mul.Tensor) == 1


def test_guard_may_refuse_one_order_and_accept_the_other() -> None:
    def only_x_first(bindings: Bindings, root: fx.Node) -> str | None:
        return None if bindings["x"].name == "y" else "x comes first"

    rule = _rule("guarded", _product_of_exps, _exp_of_sum, guard=only_x_first)
    x, y, _ = _inputs()
    _, record = _run(lambda x, y: x.exp() * y.exp(), x, y, rules=(rule,))
    assert record.matches == 1
    assert not record.near_misses


def test_first_rule_that_fits_wins_and_near_misses_of_others_are_dropped() -> None:
    never = _rule("never", _product_of_exps, _exp_of_sum, guard=lambda bindings, root: "never")
    x, y, _ = _inputs()
    _, record = _run(lambda x, y: x.exp() * y.exp(), x, y, rules=(never, EXPS))
    assert record.matches == 1
    assert not record.near_misses


def test_near_miss_needs_enough_of_the_pattern() -> None:
    x, y, _ = _inputs()
    assert not _run(lambda x, y: x.sin() * y.sin(), x, y)[1].near_misses
    (miss,) = _run(lambda x, y: x.exp() * y.sin(), x, y)[1].near_misses
    assert miss.reason == "exps: expected aten.exp.default, found sin.default (sin)"


_ANY_EXP = _rule("exp", _exp, lambda emit, x: emit(aten.exp.default, x))


def _places(record: PassRecord) -> dict[int, str]:
    return {site.index: site.node for site in record.sites}


@pytest.mark.parametrize("off", range(3))
def test_interior_of_a_match_that_is_switched_off_does_not_match_by_itself(off: int) -> None:
    """Else ``test_rules#1`` would name another place as soon as ``test_rules#0`` is off."""

    def function(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return (x.exp() * y.exp()).sin() + (y.exp() * z.exp()).sin() + (x.exp() * z.exp()).sin()

    inputs = _inputs()
    places = _places(_run(function, *inputs, rules=(EXPS, _ANY_EXP))[1])
    assert list(places) == [0, 1, 2]
    model_graph, record = _run(function, *inputs, rules=(EXPS, _ANY_EXP), disable=(f"test_rules#{off}",))
    del places[off]
    assert _places(record) == places
    assert record.skipped == 1
    assert count(model_graph, aten.mul.Tensor) == 1
    assert_graph_agrees(model_graph, function, inputs)


def test_shared_interior_of_a_match_that_is_switched_off_still_matches() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        e = x.exp()
        return (e * y.exp()).sin() + e

    inputs = _inputs()[:2]
    on = _places(_run(function, *inputs, rules=(EXPS, _ANY_EXP))[1])
    off = _places(_run(function, *inputs, rules=(EXPS, _ANY_EXP), disable=("test_rules#0",))[1])
    assert on == {0: "mul", 1: "exp"}
    assert off == {1: "exp"}
