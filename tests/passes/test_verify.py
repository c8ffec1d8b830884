"""The verifier: bugs planted in passes are found, and blamed on the pass and the match that has them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graph_testing import captured, named_inputs, outputs, run_passes
from torch import fx, nn

from infercomp.codegen.model_graph import Emitter, ModelGraph
from infercomp.codegen.ops import gated_activation, linear, rms_norm
from infercomp.passes.graph_pass import LOSSY, Pass, PassContext
from infercomp.passes.verify import evaluate, relative_error, tape_of
from infercomp.runtime.errors import VerificationError

aten = torch.ops.aten


class Model(nn.Module):
    """Two norms that compute in float32, two linears with bias, one gate."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        h = x.to(torch.float32)
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(self._norm(x))
        return self._norm(nn.functional.silu(h) * self.second(h))


def _planted(target: object, build: Callable[..., fx.Node | None], number: int = 1) -> Pass:
    """A pass that rewrites every call of ``target`` to itself, but the ``number``-th by ``build``."""

    def run(model_graph: ModelGraph, context: PassContext) -> None:
        for position, node in enumerate(model_graph.calls(target)):
            site = context.claim(node)
            with model_graph.inserting_before(node) as emit:
                wrong = build(emit, *node.args) if position == number else None
                new = wrong or emit(node.target, *node.args, **node.kwargs)
            context.replace(site, node, new)
        model_graph.eliminate_dead_code()

    return Pass("planted", run)


def _norms(build: Callable[..., fx.Node], number: int = 1) -> Pass:
    return _planted(rms_norm.overload, build, number)


BUGS = {
    "doubled eps": (_norms(lambda emit, x, w, eps: emit(rms_norm, x, w, 2 * eps)), 1),
    "doubled eps in the first": (_norms(lambda emit, x, w, eps: emit(rms_norm, x, w, 2 * eps), 0), 0),
    "offset": (_norms(lambda emit, x, w, eps: emit(rms_norm, x, w, eps, True)), 1),
    "no weight": (_norms(lambda emit, x, w, eps: emit(rms_norm, x, None, eps)), 1),
    "dropped bias": (_planted(linear.overload, lambda emit, x, w, b: emit(linear, x, w)), 1),
    "transposed weight": (_planted(linear.overload, lambda emit, x, w, b: emit(linear, x, w, b, transposed=True)), 1),
    "swapped operands": (
        _planted(gated_activation.overload, lambda emit, g, u, a: emit(gated_activation, u, g, a), 0),
        0,
    ),
    "other activation": (
        _planted(gated_activation.overload, lambda emit, g, u, a: emit(gated_activation, g, u, "gelu"), 0),
        0,
    ),
    "narrow cast": (
        _norms(lambda emit, x, w, eps: emit(rms_norm, emit(aten.mul.Tensor, x, 1 + 1e-7), w, eps * 1.01), 0),
        0,
    ),
}
STANDARD = ("normalize", "recognize_linear", "recognize_norm", "recognize_gated_mlp")


@pytest.mark.parametrize(("bug", "index"), BUGS.values(), ids=BUGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_planted_bug_is_blamed_on_pass_and_site(bug: Pass, index: int, dtype: torch.dtype) -> None:
    """Also where the model casts to float32 or the weights are bfloat16, which would hide it."""
    model, x = Model().to(dtype), torch.randn(2, 5, 8, dtype=dtype)
    with pytest.raises(VerificationError) as caught:
        run_passes(captured(model, x), *STANDARD, bug, inputs=[x])
    assert caught.value.pass_name == "planted"
    assert caught.value.site == f"planted#{index}"
    assert "test_verify.py" in caught.value.where
    assert f'"disable": ["planted#{index}"]' in caught.value.remedy


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_right_passes_are_not_blamed(dtype: torch.dtype) -> None:
    model, x = Model().to(dtype), torch.randn(2, 5, 8, dtype=dtype)
    records = run_passes(captured(model, x), *STANDARD, _norms(lambda emit, *args: None), inputs=[x])
    assert [record.matches for record in records[1:]] == [2, 2, 1, 2]
    assert all(record.max_error <= 1e-9 for record in records)


@pytest.mark.parametrize("bug", ["doubled eps", "dropped bias"])
def test_without_example_inputs_nothing_is_measured(bug: str) -> None:
    x = torch.randn(2, 5, 8)
    assert run_passes(captured(Model(), x), *STANDARD, BUGS[bug][0])[-1].max_error is None


def _replacing(target: object, build: Callable[[Emitter, fx.Node], fx.Node]) -> Pass:
    def run(model_graph: ModelGraph, context: PassContext) -> None:
        (node,) = model_graph.calls(target)
        with model_graph.inserting_before(node) as emit:
            new = build(emit, node)
        context.replace(context.claim(node), node, new)
        model_graph.eliminate_dead_code()

    return Pass("planted", run)


def test_difference_that_no_output_shows_is_found() -> None:
    """The sign is lost in the square; on other inputs or in a larger model it might not be."""
    x = torch.randn(5, dtype=torch.float64)
    bug = _replacing(aten.sin.default, lambda emit, node: emit(aten.neg.default, emit(aten.sin.default, *node.args)))
    model_graph = captured(lambda x: x.sin().pow(2), x)
    with pytest.raises(VerificationError) as caught:
        run_passes(model_graph, bug, inputs=[x])
    assert caught.value.site == "planted#0"
    assert torch.equal(outputs(model_graph, [x])[0], x.sin().pow(2))


def test_difference_in_a_replacement_that_was_replaced_again_is_found() -> None:
    def run(model_graph: ModelGraph, context: PassContext) -> None:
        (node,) = model_graph.calls(aten.sin.default)
        for target in (aten.sin.default, aten.sinh.default):
            with model_graph.inserting_before(node) as emit:
                new = emit(target, *node.args)
            context.replace(context.claim(node), node, new)
            node = new
        model_graph.eliminate_dead_code()

    x = torch.randn(5, dtype=torch.float64)
    with pytest.raises(VerificationError) as caught:
        run_passes(captured(lambda x: x.sin() * 0, x), Pass("planted", run), inputs=[x])
    assert caught.value.site == "planted#0"


def test_difference_outside_of_any_site_is_blamed_on_the_pass() -> None:
    def run(model_graph: ModelGraph, context: PassContext) -> None:
        (node,) = model_graph.calls(aten.sin.default)
        node.target = aten.cos.default
        context.claim(node)

    x = torch.randn(5)
    with pytest.raises(VerificationError, match="moved the outputs") as caught:
        run_passes(captured(lambda x: x.sin(), x), Pass("planted", run), inputs=[x])
    assert (caught.value.pass_name, caught.value.site) == ("planted", None)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda emit, node: emit(aten.reshape.default, node.args[0], [6]), "changed an output from"),
        (lambda emit, node: emit(aten._to_copy.default, node.args[0], dtype=torch.float16), "torch.float16"),
    ],
)
def test_output_of_another_shape_or_dtype_is_always_caught(build: Callable[..., fx.Node], message: str) -> None:
    model_graph = captured(lambda x: x.sin(), torch.randn(2, 3))
    with pytest.raises(VerificationError, match=message) as caught:
        run_passes(model_graph, _replacing(aten.sin.default, build))
    assert caught.value.pass_name == "planted"


def _structural(change: Callable[[ModelGraph], None]) -> Pass:
    return Pass("planted", lambda model_graph, context: change(model_graph))


def _append_late(model_graph: ModelGraph) -> None:
    (node,) = model_graph.calls(aten.sin.default)
    with model_graph.graph.inserting_after(model_graph.calls(aten.cos.default)[0]):
        late = model_graph.graph.call_function(aten.exp.default, (node,))
    late.meta["val"] = node.meta["val"]
    model_graph.calls(aten.cos.default)[0].args = (late,)


def _no_value(model_graph: ModelGraph) -> None:
    del model_graph.calls(aten.sin.default)[0].meta["val"]


def _fewer_outputs(model_graph: ModelGraph) -> None:
    model_graph.output_node().args = (model_graph.output_node().args[0][:1],)


def _output_is_a_number(model_graph: ModelGraph) -> None:
    model_graph.output_node().args = ((1, *model_graph.output_node().args[0][1:]),)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_append_late, "not well formed"),
        (_no_value, "without a value"),
        (_fewer_outputs, "number of outputs from 2 to 1"),
        (_output_is_a_number, "to 1"),
    ],
)
def test_broken_structure_is_always_caught(change: Callable[[ModelGraph], None], message: str) -> None:
    model_graph = captured(lambda x: (x.sin().cos(), x.exp()), torch.randn(2, 3))
    with pytest.raises(VerificationError, match=message) as caught:
        run_passes(model_graph, _structural(change))
    assert caught.value.pass_name == "planted"


def test_structure_of_symbolic_outputs_is_compared_without_a_guard() -> None:
    x = torch.randn(1, 5, 8)
    model_graph = captured(lambda x: x.sin(), x, dynamic={0: 1})
    bug = _replacing(aten.sin.default, lambda emit, node: emit(aten.slice.Tensor, node.args[0], 1, 0, 5))
    with pytest.raises(VerificationError, match="changed an output"):
        run_passes(model_graph, bug)


def test_widened_evaluation_widens_casts_and_weights() -> None:
    model, x = Model(), torch.randn(2, 5, 8)
    model_graph = captured(model, x)
    values = {**model_graph.weights, **named_inputs(model_graph, [x])}
    (wide,), kept = evaluate(tape_of(model_graph), values, frozenset({"rsqrt"}))
    assert wide.dtype == kept["rsqrt"].dtype == torch.float64
    (plain,), _ = evaluate(tape_of(model_graph), values, is_widened=False)
    assert torch.equal(plain, model(x))
    exact = 1e-6 + x.double().pow(2).mean(-1, keepdim=True)
    torch.testing.assert_close(kept["rsqrt"], exact.rsqrt(), rtol=1e-14, atol=0)


def test_tape_is_not_touched_by_later_rewrites() -> None:
    x = torch.randn(3)
    model_graph = captured(lambda x: x.sin() + 1, x)
    tape = tape_of(model_graph)
    model_graph.calls(aten.sin.default)[0].target = aten.cos.default
    model_graph.calls(aten.add.Tensor)[0].update_arg(1, 5)
    (found,), _ = evaluate(tape, {"x": x})
    assert torch.equal(found, x.double().sin() + 1)


@pytest.mark.parametrize(
    ("reference", "candidate", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([0.0, 4.0], [0.0, 5.0], 0.25),
        ([0.0, 0.1], [0.0, 0.2], 0.1),
        ([torch.inf, torch.nan, 1.0], [torch.inf, torch.nan, 1.0], 0.0),
        ([-torch.inf, 1.0], [torch.inf, 1.0], torch.inf),
        ([torch.nan], [1.0], torch.inf),
        ([1.0], [torch.nan], torch.inf),
        ([1.0, 2.0], [1.0], torch.inf),
        ([], [], 0.0),
    ],
)
def test_relative_error(reference: list[float], candidate: list[float], expected: float) -> None:
    assert relative_error(torch.tensor(reference), torch.tensor(candidate)) == pytest.approx(expected, rel=1e-6)


def test_relative_error_of_integers_is_all_or_nothing() -> None:
    assert relative_error(torch.tensor([1, 2]), torch.tensor([1, 2])) == 0
    assert relative_error(torch.tensor([1, 2]), torch.tensor([1, 3])) == torch.inf


def _scaled(factor: float, *, only: int | None = None) -> Pass:
    """A lossy pass that makes each linear's result ``factor`` times as large, or that of one only."""

    def run(model_graph: ModelGraph, context: PassContext) -> None:
        for position, node in enumerate(model_graph.calls(linear.overload)):
            site = context.claim(node)
            with model_graph.inserting_before(node) as emit:
                new = emit(node.target, *node.args)
                if only in (None, position):
                    new = emit(aten.mul.Tensor, new, factor)
            context.replace(site, node, new)
        model_graph.eliminate_dead_code()

    return Pass("scaled", run, LOSSY)


class Deep(nn.Module):
    """Six layers whose values are small, so that only an error beside their own size shows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = 0.1 * layer(x)
        return x


def test_lossy_errors_do_not_add_up() -> None:
    """Each site gets what it got before: 1.25 to the sixth would be far above the bound."""
    x = torch.randn(2, 8)
    model_graph = captured(Deep(), x)
    record = run_passes(model_graph, "normalize", "recognize_linear", _scaled(1.25), inputs=[x])[-1]
    assert record.numeric_class == "lossy"
    assert record.max_error == pytest.approx(0.25, rel=1e-3)


@pytest.mark.parametrize("factor", [0.0, -1.0, 2.0])
def test_a_wrong_result_of_a_lossy_pass_is_blamed_on_its_site(factor: float) -> None:
    x = torch.randn(2, 8)
    with pytest.raises(VerificationError, match="declared lossy") as caught:
        run_passes(captured(Deep(), x), "normalize", "recognize_linear", _scaled(factor, only=3), inputs=[x])
    assert caught.value.site == "scaled#3"


def test_a_pass_may_replace_weights() -> None:
    """Before the pass the graph is run with the weights that it had then."""

    def run(model_graph: ModelGraph, context: PassContext) -> None:
        for node in model_graph.calls(linear.overload):
            site, old = context.claim(node), node.args[1]
            tensor = model_graph.weights.pop(old.name)
            halved = model_graph.add_placeholder("halved", old.meta["val"], weight=tensor / 2)
            with model_graph.inserting_before(node) as emit:
                context.replace(site, node, emit(aten.mul.Tensor, emit(linear, node.args[0], halved), 2.0))
            model_graph.eliminate_dead_code()
            model_graph.graph.erase_node(old)

    x = torch.randn(2, 8)
    model_graph = captured(nn.Linear(8, 4, bias=False), x)
    record = run_passes(model_graph, "normalize", "recognize_linear", Pass("halved", run), inputs=[x])[-1]
    assert record.max_error < 1e-12
    assert list(model_graph.weights) == ["halved"]
