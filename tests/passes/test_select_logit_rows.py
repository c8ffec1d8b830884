"""Only the sampled rows reach the LM head, and they are the rows of the full logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from infercomp.codegen.model_graph import ModelGraph, aten
from infercomp.codegen.ops import linear
from tests.graph_testing import captured, count, run_passes

PASSES = ("normalize", "recognize_linear", "select_logit_rows")
WIDTH, VOCABULARY = 6, 9
ROWS = ([4], [0, 4], [3, 1], [2, 2, 0], list(range(5)))
After = Callable[[torch.Tensor], torch.Tensor]


class Head(torch.nn.Module):
    """Token ids to logits, with something after the last linear."""

    def __init__(self, after: After) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.after = after
        self.embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.head = torch.nn.Linear(WIDTH, VOCABULARY)
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.bias = torch.nn.Parameter(torch.linspace(-1, 1, VOCABULARY))
        self.double()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.norm(self.embedding(input_ids)))
        return self.after(self, logits)  # type: ignore[call-arg, arg-type]


def ids() -> torch.Tensor:
    return torch.tensor([[1, 7, 3, 3, 5]])


def selected(after: After, *disable: str) -> tuple[torch.nn.Module, ModelGraph]:
    model = Head(after)
    model_graph = captured(model, ids(), dynamic={0: 1})
    run_passes(model_graph, *PASSES, inputs=[ids()], disable=disable)
    return model, model_graph


def logits_of(model_graph: ModelGraph, rows: list[int]) -> torch.Tensor:
    step = {"input_ids": ids(), "logits_indices": torch.tensor(rows), **model_graph.weights}
    names = [node.name for node in model_graph.graph.nodes if node.op == "placeholder"]
    with torch.no_grad():
        (found,) = fx.Interpreter(model_graph.graph_module).run(*(step[name] for name in names))
    return found


def assert_rows_are_equal(model: torch.nn.Module, model_graph: ModelGraph) -> None:
    with torch.no_grad():
        full = model(ids())
    for rows in ROWS:
        torch.testing.assert_close(logits_of(model_graph, rows), full[:, rows], rtol=0, atol=1e-12)


ROW_WISE: dict[str, Callable[..., torch.Tensor]] = {
    "nothing": lambda model, logits: logits,
    "cast": lambda model, logits: logits.float().double(),
    "softcap": lambda model, logits: torch.tanh(logits / 3.0) * 3.0,
    "scaled": lambda model, logits: logits * 0.5,
    "squared": lambda model, logits: logits * logits,
}

NOT_ROW_WISE: dict[str, Callable[..., torch.Tensor]] = {
    "softmax": lambda model, logits: logits.softmax(-1),
    "another_operand": lambda model, logits: logits + model.bias,
    "used_twice": lambda model, logits: logits - logits.amax(-1, keepdim=True),
    "reversed_channels": lambda model, logits: logits.flip(-1),
    "mixed_tokens": lambda model, logits: logits.cumsum(1),
}


@pytest.mark.parametrize("name", ROW_WISE)
def test_the_selection_stands_above_the_last_linear(name: str) -> None:
    model, model_graph = selected(ROW_WISE[name])
    (selection,) = model_graph.calls(aten.index_select.default)
    assert [user.target for user in selection.users] == [linear.overload]
    (head,) = model_graph.calls(linear.overload)
    assert head.args[0] is selection
    # The number of rows is a symbol of its own, which is not the number of tokens.
    assert head.meta["val"].shape[1] is not selection.args[0].meta["val"].shape[1]
    if name != "cast":
        assert_rows_are_equal(model, model_graph)


@pytest.mark.parametrize("name", NOT_ROW_WISE)
def test_the_selection_stays_at_the_output_behind_anything_else(name: str) -> None:
    model, model_graph = selected(NOT_ROW_WISE[name])
    (selection,) = model_graph.calls(aten.index_select.default)
    assert list(selection.users) == [model_graph.output_node()]
    assert_rows_are_equal(model, model_graph)


def test_without_the_pass_the_step_still_selects() -> None:
    model, model_graph = selected(ROW_WISE["nothing"], "select_logit_rows")
    (selection,) = model_graph.calls(aten.index_select.default)
    assert list(selection.users) == [model_graph.output_node()]
    assert_rows_are_equal(model, model_graph)


def test_a_model_whose_output_is_no_linear_is_selected_at_the_output() -> None:
    class Embedded(Head):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return F.silu(self.embedding(input_ids))

    model = Embedded(ROW_WISE["nothing"])
    model_graph = captured(model, ids(), dynamic={0: 1})
    run_passes(model_graph, *PASSES)
    assert count(model_graph, linear) == 0
    assert_rows_are_equal(model, model_graph)


def test_a_planted_wrong_row_is_caught() -> None:
    model, model_graph = selected(ROW_WISE["nothing"])
    (selection,) = model_graph.calls(aten.index_select.default)
    with model_graph.inserting_before(selection) as emit:
        selection.replace_input_with(selection.args[2], emit(aten.flip.default, selection.args[2], [0]))
    model_graph.graph_module.recompile()
    with pytest.raises(AssertionError):
        assert_rows_are_equal(model, model_graph)
