"""Repeated heads are taken before they were repeated, and only where each head was repeated in a row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from infercomp.codegen.model_graph import ModelGraph
from infercomp.passes.head_layout import as_heads, permuted, unrepeated_heads
from tests.graph_testing import assert_graph_agrees, captured, outputs, run_passes


def keys() -> torch.Tensor:
    return torch.arange(2 * 2 * 5 * 3, dtype=torch.float64).reshape(2, 2, 5, 3)


def graph_of(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> ModelGraph:
    """The graph of ``function``, which is read off by a last op that the tests then drop."""
    model_graph = captured(lambda x: function(x).sin(), x)
    run_passes(model_graph, "normalize")
    return model_graph


def last_value(model_graph: ModelGraph) -> fx.Node:
    return model_graph.output_node().args[0][0].args[0]


def _expanded(x: torch.Tensor) -> torch.Tensor:
    return x[:, :, None].expand(2, 2, 3, 5, 3).reshape(2, 6, 5, 3)


def _expanded_before_transposing(x: torch.Tensor) -> torch.Tensor:
    rows = x.transpose(1, 2)
    return rows[:, :, :, None].expand(2, 5, 2, 3, 3).reshape(2, 5, 6, 3).transpose(1, 2)


REPEATED = {
    "interleaved": lambda x: x.repeat_interleave(3, dim=1),
    "interleaved_from_the_right": lambda x: x.repeat_interleave(3, dim=-3),
    "expanded": _expanded,
    "expanded_before_transposing": _expanded_before_transposing,
    "one_head": lambda x: x[:, :1].expand(2, 6, 5, 3),
}

OTHER = {
    "tiled": lambda x: x.repeat(1, 3, 1, 1),
    "tiled_by_expanding": lambda x: x[:, None].expand(2, 3, 2, 5, 3).reshape(2, 6, 5, 3),
    "positions_interleaved": lambda x: x.repeat_interleave(3, dim=2),
    "flattened_interleaving": lambda x: x.reshape(-1).repeat_interleave(3).reshape(2, 6, 5, 3),
    "batch_expanded": lambda x: x[:1, :1].expand(2, 6, 5, 3),
    "merged_with_positions": lambda x: x[:, :, None].expand(2, 2, 3, 5, 3).reshape(2, 2, 15, 3),
    "untouched": lambda x: x * 2,
}


@pytest.mark.parametrize("name", [*REPEATED, *OTHER])
def test_only_heads_repeated_in_a_row_are_taken_before(name: str) -> None:
    function = {**REPEATED, **OTHER}[name]
    model_graph = graph_of(function, keys())
    output = model_graph.output_node()
    node = last_value(model_graph)
    with model_graph.inserting_before(output) as emit:
        fewer = unrepeated_heads(emit, node)
    assert (fewer is not node) == (name in REPEATED)
    output.args = ((fewer,),)
    (found,) = outputs(model_graph, [keys()])
    expected = function(keys())
    assert torch.equal(found.repeat_interleave(expected.shape[1] // found.shape[1], dim=1), expected)


def test_permutations_are_composed_and_cancelled() -> None:
    model_graph = graph_of(lambda x: x.permute(0, 2, 3, 1), keys())
    output = model_graph.output_node()
    node = last_value(model_graph)
    with model_graph.inserting_before(output) as emit:
        assert permuted(emit, node, [0, 3, 1, 2]).op == "placeholder"
        again = permuted(emit, node, [3, 0, 1, 2])
    assert again.args[0].op == "placeholder"
    output.args = ((again,),)
    assert_graph_agrees(model_graph, lambda x: x.permute(0, 2, 3, 1).permute(3, 0, 1, 2), [keys()])


@pytest.mark.parametrize("shape", [(4, 5, 3), (4, 3, 5)])
def test_heads_are_split_from_the_batch_as_the_model_merged_them(shape: tuple[int, ...]) -> None:
    """A reshape that mixed rows with channels as well is no merge of heads, and is not taken for one."""
    model_graph = graph_of(lambda x: x.reshape(*shape), keys())
    output = model_graph.output_node()
    with model_graph.inserting_before(output) as emit:
        split = as_heads(emit, last_value(model_graph), [2, 2])
    assert (split.op == "placeholder") == (shape == (4, 5, 3))
    output.args = ((split,),)
    assert_graph_agrees(model_graph, lambda x: x.reshape(2, 2, *shape[1:]), [keys()])
