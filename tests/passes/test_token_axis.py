"""Graphs that treat their tokens one by one pass the proof; whatever mixes them is refused with its source line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from infercomp.codegen.model_graph import ModelGraph, aten, source_line, value_of
from infercomp.passes import token_axis
from infercomp.passes.token_axis import MixesTokens, token_axes
from tests.graph_testing import captured, outputs, run_passes

WIDTH = 6
Function = Callable[[torch.Tensor], torch.Tensor]


def tokens(length: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, length, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weight(*shape: int) -> torch.Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)


class Model(torch.nn.Module):
    """A module of its own, as its lines are what a refusal names."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def proved_axis(function: Function) -> tuple[int | None, ModelGraph]:
    """The token axis of the output; raises MixesTokens."""
    model_graph = captured(Model(function), tokens(), dynamic={0: 1})
    run_passes(model_graph, "normalize")
    (name,) = model_graph.input_names
    length = value_of(model_graph.placeholder(name)).shape[1]
    axes = token_axes(model_graph, {name: 1}, length, frozenset())
    return axes[model_graph.output_node().args[0][0]], model_graph


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(1, -1, 2, 3).transpose(1, 2)


TOKEN_WISE: dict[str, tuple[Function, int]] = {
    "pointwise": (lambda x: torch.sin(x) * x + 1, 1),
    "linear": (lambda x: F.linear(x, weight(4, WIDTH), weight(4)), 1),
    "matmul": (lambda x: x @ weight(WIDTH, 4), 1),
    "matmul_on_the_right": (lambda x: weight(4, WIDTH) @ x.transpose(1, 2), 2),
    "softmax_of_channels": (lambda x: x.softmax(-1), 1),
    "mean_of_channels": (lambda x: x.mean(-1, keepdim=True), 1),
    "mean_of_the_batch": (lambda x: x.mean(0), 0),
    "layer_norm": (lambda x: F.layer_norm(x, (WIDTH,)), 1),
    "heads": (heads, 2),
    "heads_and_back": (lambda x: heads(x).transpose(1, 2).reshape(1, -1, WIDTH), 1),
    "halves_of_channels": (lambda x: torch.cat((-x[..., 3:], x[..., :3]), -1), 1),
    "stacked": (lambda x: torch.stack((x, -x), 0), 2),
    "embedded": (lambda x: F.embedding((x[..., 0] > 0).long(), weight(2, 3)), 1),
    "table_by_index": (lambda x: weight(2, 3)[(x[..., 0] > 0).long()], 1),
    "channels_by_index": (lambda x: x[..., torch.tensor([2, 0])], 1),
    "repeated_heads": (lambda x: heads(x).repeat_interleave(2, dim=1), 2),
    "constant_fill": (lambda x: x * torch.ones(x.shape[1], 1), 1),
    "cumsum_of_channels": (lambda x: x.cumsum(-1), 1),
    "where": (lambda x: torch.where(x > 0, x, 0.0), 1),
}


@pytest.mark.parametrize("name", TOKEN_WISE)
def test_a_token_wise_graph_passes(name: str) -> None:
    function, expected = TOKEN_WISE[name]
    axis, model_graph = proved_axis(function)
    assert axis == expected
    assert_changes_one_token_only(model_graph, axis)


def assert_changes_one_token_only(model_graph: ModelGraph, axis: int) -> None:
    """Another value of one token changes nothing else, and neither does a longer sequence."""
    first = tokens(5)
    second = torch.cat((first[:, :2], tokens(1, seed=1), first[:, 3:]), 1)
    longer = torch.cat((first, tokens(4, seed=2)), 1)
    before, after, beyond = (outputs(model_graph, [each])[0] for each in (first, second, longer))
    for token in range(5):
        same = torch.allclose(before.select(axis, token), after.select(axis, token), rtol=0, atol=1e-12)
        assert same or token == 2
        torch.testing.assert_close(before.select(axis, token), beyond.select(axis, token), rtol=0, atol=1e-12)


MIXING: dict[str, tuple[Function, str]] = {
    "mean": (lambda x: x - x.mean(1, keepdim=True), "reduces over the tokens"),
    "maximum": (lambda x: x - x.amax(1, keepdim=True), "reduces over the tokens"),
    "sum_of_all": (lambda x: x / x.sum(), "no rule says"),
    "cumsum": (lambda x: x.cumsum(1), "works along the tokens"),
    "softmax": (lambda x: x.softmax(1), "works along the tokens"),
    "transposed_softmax": (lambda x: x.transpose(1, 2).softmax(-1), "works along the tokens"),
    "flip": (lambda x: x.flip(1), "no rule says"),
    "roll": (lambda x: x.roll(1, 1), "no rule says"),
    "convolution": (lambda x: F.conv1d(x.transpose(1, 2), weight(WIDTH, WIDTH, 3), padding=1), "no rule says"),
    "merged_with_heads": (lambda x: heads(x).reshape(1, -1, 3), "mixes the tokens with another dimension"),
    "merged_with_channels": (lambda x: x.reshape(1, -1), "mixes the tokens with another dimension"),
    "slice": (lambda x: x[:, :2], "some of the tokens"),
    "last": (lambda x: x + x[:, -1:], "some of the tokens"),
    "selected": (lambda x: x + x[:, 0], "one of the tokens"),
    "product_of_tokens": (lambda x: x @ x.transpose(1, 2), "both depend on the tokens"),
    "length_as_a_number": (lambda x: x / x.shape[1], "as a number"),
    "length_in_a_fill": (lambda x: x / torch.full((1,), x.shape[1]), "as a number"),
    "length_in_a_scalar": (lambda x: x * torch.scalar_tensor(x.shape[1]), "as a number"),
    "length_as_a_place": (lambda x: x + weight(4096, WIDTH)[x.shape[1] - 1], "as a number"),
    "length_as_a_start": (lambda x: x + weight(4097, WIDTH)[x.shape[1] : x.shape[1] + 1], "as a number"),
    "length_by_expansion": (lambda x: x[..., None].expand(-1, -1, -1, x.shape[1]).sum(-1), "in more than its tokens"),
    "batch_statistics": (lambda x: F.batch_norm(x.transpose(1, 2), None, None, training=True), "no rule says"),
    "shifted": (lambda x: torch.cat((torch.zeros_like(x)[:, :1], x), 1), "some of the tokens"),
    "padded": (lambda x: x + F.pad(x, (0, 0, 1, 0))[:, :-1], "no rule says"),
    "repeated": (lambda x: x.repeat(1, 2, 1), "repeats the sequence"),
    "joined": (lambda x: torch.cat((x, x), 1), "joins sequences"),
    "sorted": (lambda x: x.sort(1).values, "no rule says"),
    "gathered": (lambda x: x.gather(1, (x > 0).long()), "depends on the tokens"),
    "indexed": (lambda x: x[:, torch.tensor([1, 0])], "looks tokens up"),
    "position_table": (lambda x: x + weight(4096, WIDTH)[: x.shape[1]], "number"),
    "along_other_dimensions": (lambda x: x[..., :1] * x[..., :1].transpose(1, 2), "along different dimensions"),
    "norm_of_all": (lambda x: F.layer_norm(x.transpose(1, 2), (x.shape[1],)), "as a number"),
}


@pytest.mark.parametrize("name", MIXING)
def test_a_graph_that_mixes_tokens_is_refused_with_its_line(name: str) -> None:
    function, reason = MIXING[name]
    with pytest.raises(MixesTokens, match=reason) as caught:
        proved_axis(function)
    line = source_line(caught.value.node)
    assert line is not None
    assert "test_token_axis.py" in line


STEPS: tuple[Function, ...] = (
    lambda x: x.transpose(-1, -2) if x.dim() > 1 else x,
    lambda x: x.transpose(0, 1) if x.dim() > 1 else x,
    lambda x: x.softmax(-1),
    lambda x: x.mean(-1, keepdim=True),
    lambda x: x.sum(0, keepdim=True),
    lambda x: x.unsqueeze(0),
    lambda x: x.reshape(1, -1, 2, 3) if x.shape[-1] == WIDTH else x * 2,
    lambda x: x.flatten(-2) if x.dim() > 1 else x,
    lambda x: x * weight(WIDTH) if x.shape[-1] == WIDTH else x + 1,
    lambda x: x[..., :1] + x,
    lambda x: x.cumsum(-1),
    lambda x: x.cumsum(1) if x.dim() > 1 else x,
    lambda x: x + x.amax(-2, keepdim=True) if x.dim() > 1 else x,
    lambda x: torch.cat((x, -x), -1),
    lambda x: torch.stack((x, x * 2), -1),
    lambda x: x.select(-1, 0).unsqueeze(-1) * x,
    lambda x: x.repeat_interleave(2, -1),
)


def check_that_tokens_stay_apart(steps: list[Function]) -> bool:
    """Whether the proof passed; if it did, the tokens do not see each other."""

    def function(x: torch.Tensor) -> torch.Tensor:
        for step in steps:
            x = step(x)
        return x

    try:
        axis, model_graph = proved_axis(function)
    except MixesTokens:
        return False
    assert axis is not None
    assert_changes_one_token_only(model_graph, axis)
    return True


def number_that_passes() -> tuple[int, int]:
    """How many drawn graphs pass the proof, of how many; each that does is checked."""
    passed = []

    @settings(max_examples=30, derandomize=True, database=None, phases=[Phase.generate])
    @given(st.lists(st.sampled_from(STEPS), min_size=1, max_size=4))
    def check(steps: list[Function]) -> None:
        passed.append(check_that_tokens_stay_apart(steps))

    check()
    return sum(passed), len(passed)


def test_whatever_passes_keeps_tokens_apart() -> None:
    passed, drawn = number_that_passes()
    assert 5 < passed < drawn


def test_a_planted_hole_in_the_proof_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    for target in (aten.softmax.int, aten.cumsum.default):
        monkeypatch.setitem(token_axis._RULES, target, token_axis._same_axis)
    with pytest.raises(AssertionError):
        number_that_passes()
