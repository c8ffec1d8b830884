"""Capture: Dynamo and torch.export arrive at one normal form, with parameters by name and mutations by input."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from graph_testing import captured, count, outputs, run_passes
from torch import nn

from infercomp.capture import capture_dynamo, capture_export
from infercomp.codegen.model_graph import ModelGraph, shape_of
from infercomp.runtime.errors import CaptureError

aten = torch.ops.aten


class Model(nn.Module):
    """Embedding, linear, SiLU, attention by torch: what must stay whole."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.linear = nn.Linear(8, 8)
        self.register_buffer("scale", torch.tensor([2.0]), persistent=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        h = nn.functional.silu(self.linear(self.embedding(input_ids))) * self.scale
        heads = h.view(h.shape[0], h.shape[1], 2, 4).transpose(1, 2)
        h = nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        return h.transpose(1, 2).reshape(input_ids.shape[0], -1, 8)


def _dynamo(function: Any, *arguments: Any) -> tuple[ModelGraph, list[Any]]:
    """Dynamo's graph in the normal form, and the inputs in the order of ``input_names``."""
    found: list[tuple[ModelGraph, list[Any]]] = []

    def backend(graph_module: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        model_graph = capture_dynamo(graph_module, example_inputs)
        names = [node.name for node in graph_module.graph.nodes if node.op == "placeholder"]
        values = dict(zip(names, example_inputs, strict=True))
        found.append((model_graph, [values[name] for name in model_graph.input_names]))
        return graph_module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, dynamic=False)(*arguments)
    ((model_graph, inputs),) = found
    return model_graph, inputs


def _targets(model_graph: ModelGraph) -> Counter[str]:
    return Counter(str(node.target) for node in model_graph.graph.nodes if node.op == "call_function")


_IDS = torch.arange(10).reshape(2, 5)


def test_both_paths_give_the_same_form_and_the_same_values() -> None:
    model = Model().eval()
    exported = captured(model, _IDS)
    traced, inputs = _dynamo(model, _IDS)
    for whole in ("linear", "silu", "scaled_dot_product_attention", "embedding"):
        assert _targets(traced)[f"aten.{whole}.default"] == 1
    assert torch.equal(outputs(traced, inputs)[0], model(_IDS))
    assert torch.equal(outputs(exported, [_IDS])[0], model(_IDS))
    # Functionalising already turns some reshapes into views, which is one thing to normalize.
    run_passes(traced, "normalize", inputs=inputs)
    run_passes(exported, "normalize", inputs=[_IDS])
    assert _targets(traced) == _targets(exported)


def test_export_knows_parameters_by_name_and_value() -> None:
    model = Model()
    model_graph = capture_export(model, {"input_ids": _IDS}, max_length=64)
    assert model_graph.input_names == ("input_ids",)
    assert model_graph.frozen
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert set(model_graph.weight_sources.values()) == set(tensors)
    for name, source in model_graph.weight_sources.items():
        assert model_graph.weights[name] is tensors[source], "an alias would keep the memory of merged weights alive"


def test_dynamo_knows_parameters_by_name_and_value() -> None:
    model = Model()
    model_graph, _ = _dynamo(model, _IDS)
    assert not model_graph.frozen
    by_source = {source: model_graph.weights[name] for name, source in model_graph.weight_sources.items()}
    assert set(by_source) == {"embedding.weight", "linear.weight", "linear.bias"}
    for name, parameter in model.named_parameters():
        assert by_source[name].data_ptr() == parameter.data_ptr()
    assert len(model_graph.input_names) == 2, "the ids, and the buffer, which the user may replace"


def test_weights_stand_first_and_every_node_has_a_value() -> None:
    for model_graph in (captured(Model(), _IDS, dynamic={0: 1}), _dynamo(Model(), _IDS)[0]):
        nodes = list(model_graph.graph.nodes)
        placeholders = [node.name for node in nodes if node.op == "placeholder"]
        assert placeholders == [*model_graph.weights, *model_graph.input_names]
        assert [node.name for node in nodes[: len(placeholders)]] == placeholders
        assert all("val" in node.meta for node in nodes if node.op != "output")
        assert not any(node.op == "get_attr" for node in nodes)


def test_export_is_symbolic_in_length_and_drops_asserts() -> None:
    class Casts(Model):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return super().forward(input_ids).double().to(torch.float32)

    model = Casts()
    model_graph = capture_export(model, {"input_ids": _IDS})
    assert isinstance(shape_of(model_graph.output_node().args[0][0])[1], torch.SymInt)
    assert not any("assert" in target for target in _targets(model_graph))
    for length in (2, 3, 11):
        ids = torch.randint(0, 16, (2, length))
        assert torch.equal(outputs(model_graph, [ids])[0], model(ids))


def test_tensor_constants_become_one_weight_each() -> None:
    table = torch.randn(5)
    function = lambda x: x * table + table  # noqa: E731
    x = torch.randn(2, 5)
    exported = captured(function, x)
    traced, inputs = _dynamo(lambda x: x * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), x)
    assert len(exported.weights) == 1
    assert torch.equal(outputs(exported, [x])[0], function(x))
    assert traced.weights and not traced.weight_sources
    assert torch.equal(outputs(traced, inputs)[0], x * torch.arange(1.0, 6.0))


class WritesCache(nn.Module):
    def forward(self, x: torch.Tensor, cache: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        cache.index_copy_(1, positions, x)
        return cache.sum(1)


def _cache_inputs() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(1, 3, 4), "cache": torch.randn(1, 8, 4), "positions": torch.tensor([1, 4, 6])}


def _check_cache_write(model_graph: ModelGraph, inputs: list[Any], given: dict[str, torch.Tensor]) -> None:
    assert len(model_graph.mutated_inputs) == 1
    place = model_graph.input_names.index(model_graph.mutated_inputs[0])
    assert torch.equal(inputs[place], given["cache"])
    before = given["cache"].clone()
    written, result = outputs(model_graph, inputs)
    assert torch.equal(given["cache"], before), "the graph is functional"
    assert torch.equal(written, before.index_copy(1, given["positions"], given["x"]))
    assert torch.equal(result, written.sum(1))
    assert not any(target.endswith("_.default") for target in _targets(model_graph))


def test_mutated_input_comes_back_as_an_output_from_export() -> None:
    given = _cache_inputs()
    model_graph = captured(WritesCache(), *given.values())
    assert model_graph.mutated_inputs == ("cache",)
    _check_cache_write(model_graph, list(given.values()), given)


def test_mutated_input_comes_back_as_an_output_from_dynamo() -> None:
    given = _cache_inputs()
    model_graph, inputs = _dynamo(WritesCache(), *(each.clone() for each in given.values()))
    shapes = {tuple(value.shape): value for value in given.values()}
    _check_cache_write(model_graph, [shapes[tuple(each.shape)] for each in inputs], given)


def test_model_that_writes_to_its_own_buffer_is_refused() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.add_(1)
            return x + self.seen

    with pytest.raises(CaptureError, match="writes to its buffer seen") as caught:
        capture_export(Counts(), {"x": torch.randn(2, 5)})
    assert caught.value.remedy


class DependsOnData(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:  # the line that is named
            return x + 1
        return x


def test_data_dependent_model_is_refused_with_its_line() -> None:
    with pytest.raises(CaptureError, match="DependsOnData cannot be exported as one graph") as caught:
        capture_export(DependsOnData(), {"x": torch.randn(2, 5)})
    first = DependsOnData.forward.__code__.co_firstlineno
    assert caught.value.where == f"tests/test_capture.py:{first + 1} in forward"
    assert caught.value.__cause__ is not None


def test_model_that_fits_one_length_only_is_refused() -> None:
    class OneLength(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.ones(2, 5)

    with pytest.raises(CaptureError, match="cannot be exported"):
        capture_export(OneLength(), {"x": torch.randn(2, 5)})


def test_graph_without_fake_tensors_is_refused() -> None:
    graph_module = torch.fx.symbolic_trace(lambda x: x + 1)
    for node in graph_module.graph.nodes:
        node.meta["example_value"] = torch.ones(1)
    with pytest.raises(CaptureError, match="no fake tensors"):
        capture_dynamo(graph_module, [torch.ones(1)])


def test_dynamic_dynamo_keeps_its_symbols() -> None:
    found = []

    def backend(graph_module: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        found.append(capture_dynamo(graph_module, example_inputs))
        return graph_module.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x.reshape(-1) * 2, backend=backend, dynamic=True)
    compiled(torch.randn(3, 5))
    (model_graph,) = found
    assert count(model_graph, aten.mul.Tensor) == 1
    assert any(isinstance(extent, torch.SymInt) for extent in shape_of(model_graph.calls(aten.mul.Tensor)[0]))
