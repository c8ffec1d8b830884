"""ModelGraph: placeholders in order, values that are never stale, sizes that come from inputs."""

from __future__ import annotations

import pytest
import torch
from graph_testing import captured, count, named_inputs, outputs
from torch import nn

from infercomp.codegen.model_graph import (
    mutates,
    refresh_value,
    same_shape,
    same_size,
    shape_of,
    source_line,
    value_of,
)
from infercomp.codegen.ops import rms_norm, write_kv

aten = torch.ops.aten


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.weight


def _names(model_graph) -> list[str]:  # type: ignore[no-untyped-def]
    return [node.name for node in model_graph.graph.nodes if node.op == "placeholder"]


def test_weight_is_added_after_weights_and_input_after_inputs() -> None:
    model_graph = captured(Model(), torch.randn(2, 4))
    value = value_of(model_graph.placeholder("x"))
    weight = model_graph.add_placeholder("more", value, weight=torch.ones(2, 4))
    model_graph.add_placeholder("positions", value)
    assert _names(model_graph) == ["p_weight", "p_layer_weight", "p_layer_bias", "more", "x", "positions"]
    assert model_graph.input_names == ("x", "positions")
    assert model_graph.is_weight(weight)
    assert not model_graph.is_weight(model_graph.placeholder("x"))
    assert not model_graph.is_weight(3)
    model_graph.graph.lint()


def test_first_weight_goes_before_all_inputs_and_the_graph_still_appends_at_its_end() -> None:
    model_graph = captured(lambda x: x.sin(), torch.randn(3))
    model_graph.add_placeholder("first", value_of(model_graph.placeholder("x")), weight=torch.ones(3))
    assert _names(model_graph) == ["first", "x"]
    appended = model_graph.graph.call_function(aten.cos.default, (model_graph.placeholder("x"),))
    assert next(reversed(model_graph.graph.nodes)) is appended


def test_name_that_is_taken_is_changed_and_kept_in_step() -> None:
    model_graph = captured(lambda x: x.sin(), torch.randn(3))
    node = model_graph.add_placeholder("sin", value_of(model_graph.placeholder("x")), weight=torch.ones(3))
    assert node.name != "sin"
    assert list(model_graph.weights) == [node.name]
    assert model_graph.placeholder(node.name) is node


def test_input_is_removed() -> None:
    model_graph = captured(lambda x, y: x.sin(), torch.randn(3), torch.randn(3))
    model_graph.remove_input("y")
    assert model_graph.input_names == ("x",)
    assert _names(model_graph) == ["x"]


def test_emitted_calls_have_values_and_the_models_line() -> None:
    x = torch.randn(1, 5, 4)
    model_graph = captured(Model(), x, dynamic={0: 1})
    (product,) = model_graph.calls(aten.mul.Tensor)
    with model_graph.inserting_before(product) as emit:
        new = emit(rms_norm, product.args[0], None, 1e-5)
    assert shape_of(new) == shape_of(product)
    assert source_line(new) == source_line(product)
    assert "return self.layer(x) * self.weight" in source_line(new)
    product.replace_all_uses_with(new)
    assert torch.isfinite(outputs(model_graph, [x])[0]).all()


def test_line_of_a_layer_of_torch_is_the_line_that_calls_it() -> None:
    model_graph = captured(Model(), torch.randn(2, 4))
    (node,) = model_graph.calls(aten.linear.default)
    assert "test_model_graph.py" in source_line(node)
    assert source_line(model_graph.placeholder("x")) is None


def test_sizes_are_numbers_where_static_and_inputs_where_symbolic() -> None:
    model_graph = captured(lambda x: x.exp(), torch.randn(2, 5, 4), dynamic={0: 1})
    (node,) = model_graph.calls(aten.exp.default)
    with model_graph.inserting_before(node) as emit:
        sizes = emit.sizes(node)
    assert (sizes[0], sizes[2]) == (2, 4)
    assert sizes[1].target == aten.sym_size.int
    assert sizes[1].args == (model_graph.placeholder("x"), 1)


def test_size_that_no_input_has_is_read_from_the_value() -> None:
    model_graph = captured(lambda x: torch.cat([x, x], 1).exp(), torch.randn(2, 5, 4), dynamic={0: 1})
    (node,) = model_graph.calls(aten.exp.default)
    assert model_graph.input_of_extent(shape_of(node)[1]) is None
    with model_graph.inserting_before(node) as emit:
        size = emit.size(node, 1)
    assert size.args == (node, 1)


def test_refresh_value_follows_changed_arguments() -> None:
    model_graph = captured(lambda x: x.sum(0), torch.randn(2, 3))
    (node,) = model_graph.calls(aten.sum.dim_IntList)
    node.update_arg(1, [1])
    refresh_value(model_graph, node)
    assert shape_of(node) == (2,)


def test_equality_of_symbolic_sizes_adds_no_guard() -> None:
    model_graph = captured(
        lambda x: (x.exp(), torch.cat([x, x], 1), torch.ones(2, 5, 4)), torch.randn(2, 5, 4), dynamic={0: 1}
    )
    whole, twice, five = (shape_of(argument) for argument in model_graph.output_node().args[0])
    guards = len(model_graph.fake_mode.shape_env.guards)
    assert same_size(whole[1], whole[1])
    assert not same_size(whole[1], twice[1])
    assert not same_size(whole[1], 5)
    assert same_size(4, 4)
    assert same_shape(whole, whole)
    assert not same_shape(whole, twice)
    assert not same_shape(whole, five)
    assert not same_shape(whole, whole[:2])
    assert len(model_graph.fake_mode.shape_env.guards) == guards


def test_dead_calls_go_but_cache_writes_stay() -> None:
    x = torch.randn(3, 1, 4)
    model_graph = captured(lambda x, cache, slots: x.sin(), x, torch.zeros(2, 4, 1, 4), torch.arange(3))
    (sine,) = model_graph.calls(aten.sin.default)
    cache, slots = model_graph.placeholder("cache"), model_graph.placeholder("slots")
    with model_graph.inserting_before(sine) as emit:
        dead = emit(aten.exp.default, emit(aten.cos.default, sine.args[0]))
        write = emit(write_kv, sine.args[0], sine.args[0], cache, cache, slots)
    assert mutates(write)
    assert not mutates(dead)
    model_graph.eliminate_dead_code()
    assert count(model_graph, write_kv) == count(model_graph, aten.sin.default) == 1
    assert count(model_graph, aten.exp.default) == count(model_graph, aten.cos.default) == 0


def test_calls_are_found_by_any_of_several_targets() -> None:
    model_graph = captured(lambda x: x.sin().cos().sin(), torch.randn(3))
    assert len(model_graph.calls(aten.sin.default, aten.cos.default)) == 3
    assert model_graph.calls(aten.exp.default) == []
    with pytest.raises(StopIteration):
        model_graph.placeholder("sin")
    assert list(named_inputs(model_graph, [1])) == ["x"]
