"""fuse_rope: half-split, interleaved and partial rotary embeddings, and nothing that turns another way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graph_testing import (
    FileCheck,
    assert_graph_agrees,
    assert_rounds_like_eager,
    captured,
    count,
    run_passes,
    text,
)

from infercomp.codegen.ops import rotary_embedding

Rotate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
PASSES = ("normalize", "fuse_rope")


def _turned(x: torch.Tensor) -> torch.Tensor:
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-second, first), dim=-1)


def _turned_pairs(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def _llama(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + _turned(x) * sin


def _chunked(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return sin * torch.cat((second.neg(), first), -1) + cos * x


def _in_float32(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return (h * cos.float() + _turned(h) * sin.float()).type_as(x)


def _unsqueezed(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    cos, sin = cos.squeeze(1).unsqueeze(1), sin.squeeze(1).unsqueeze(1)
    return (x * cos) + (_turned(x) * sin)


def _gptj(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + _turned_pairs(x) * sin


def _partial(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    rotated, passed = x[..., :4], x[..., 4:]
    return torch.cat((_llama(rotated, cos[..., :4], sin[..., :4]), passed), dim=-1)


def _partial_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    rotated, passed = x.split([4, 4], dim=-1)
    return torch.cat([_gptj(rotated, cos[..., :4], sin[..., :4]), passed], -1)


SPELLINGS = {
    "llama": (_llama, "(%x, %cos, %sin, False)"),
    "chunked": (_chunked, "(%x, %cos, %sin, False)"),
    "in float32": (_in_float32, "(%x, %cos, %sin, False)"),
    "unsqueezed": (_unsqueezed, "(%x, %"),
    "gptj": (_gptj, "(%x, %cos, %sin, True)"),
    "partial": (_partial, "(%x, %slice"),
    "partial pairs": (_partial_pairs, "(%x, %slice"),
}


def _inputs(dtype: torch.dtype = torch.float64, length: int = 5) -> list[torch.Tensor]:
    angles = torch.randn(1, 1, length, 8, dtype=dtype) * 10
    return [torch.randn(2, 3, length, 8, dtype=dtype), angles.cos(), angles.sin()]


@pytest.mark.parametrize(("spelling", "arguments"), SPELLINGS.values(), ids=SPELLINGS)
def test_fires(spelling: Rotate, arguments: str) -> None:
    inputs = _inputs()
    model_graph = captured(spelling, *inputs, dynamic=dict.fromkeys(range(3), 2))
    records = run_passes(model_graph, *PASSES, inputs=inputs)
    assert records[1].matches >= 1
    assert records[1].max_error < 1e-9
    FileCheck().check_count("rotary_embedding.default", 1, exactly=True).run(text(model_graph))
    FileCheck().check(f"(args = {arguments}").check_not("neg").check_not("cat").run(text(model_graph))
    bound = 1e-6 if spelling is _in_float32 else 1e-9
    for length in (2, 5, 9):
        assert_graph_agrees(model_graph, spelling, _inputs(length=length), bound)


@pytest.mark.parametrize("spelling", [each for each, _ in SPELLINGS.values()], ids=SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounds_like_eager(spelling: Rotate, dtype: torch.dtype) -> None:
    assert_rounds_like_eager(spelling, _inputs(length=16), dtype, *PASSES)


def test_swapped_cos_and_sin_stay_swapped() -> None:
    """The op has no idea which table holds cosines; it must keep the operands where the model has them."""

    def swapped(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return x * sin + _turned(x) * cos

    inputs = _inputs()
    model_graph = captured(swapped, *inputs)
    run_passes(model_graph, *PASSES, inputs=inputs)
    FileCheck().check("rotary_embedding.default](args = (%x, %sin, %cos, False)").run(text(model_graph))
    assert_graph_agrees(model_graph, swapped, inputs)


def _halves_swapped(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + torch.cat((-x[..., :4], x[..., 4:]), -1) * sin


def _other_half_negated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + torch.cat((x[..., 4:], -x[..., :4]), -1) * sin


def _nothing_negated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + torch.cat((x[..., 4:], x[..., :4]), -1) * sin


def _uneven(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + torch.cat((-x[..., 2:], x[..., :2]), -1) * sin


def _of_something_else(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x.exp() * cos + _turned(x) * sin


def _other_axis(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + torch.cat((-x[:, :, 2:], x[:, :, :2]), 2) * sin


def _pairs_negated_wrong(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + torch.stack((-x[..., ::2], x[..., 1::2]), dim=-1).flatten(-2) * sin


def _pairs_stacked_along_rows(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), dim=-2).flatten(-2) * sin


def _one_angle(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos[..., :1] + _turned(x) * sin[..., :1]


def _broadcast(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return _llama(x[:1], cos.expand(2, -1, -1, -1), sin)


NEAR_MISSES = {
    "halves swapped": (_halves_swapped, "in one place and"),
    "other half negated": (_other_half_negated, "expected neg"),
    "nothing negated": (_nothing_negated, "expected neg"),
    "uneven": (_uneven, "expected the middle of 8 channels"),
    "of something else": (_of_something_else, "in another"),
    "other axis": (_other_axis, "expected 3"),
    "pairs negated wrong": (_pairs_negated_wrong, "expected 1, found 0"),
    "pairs stacked along rows": (_pairs_stacked_along_rows, "expected -1, found -2"),
    "one angle": (_one_angle, "cos has 1 channels, x has 8"),
    "broadcast": (_broadcast, "broadcast x to another shape"),
}


@pytest.mark.parametrize(("spelling", "reason"), NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_miss_is_left_and_recorded(spelling: Rotate, reason: str) -> None:
    inputs = _inputs(length=4)
    model_graph = captured(spelling, *inputs)
    records = run_passes(model_graph, *PASSES, inputs=inputs)
    assert records[1].matches == count(model_graph, rotary_embedding) == 0
    assert any(reason in miss.reason for miss in records[1].near_misses), records[1].near_misses
    assert_graph_agrees(model_graph, spelling, inputs)


def test_other_channels_that_are_appended_are_no_partial_rotary() -> None:
    def appended(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return torch.cat((_llama(x[..., :4], cos[..., :4], sin[..., :4]), x[..., 4:6]), dim=-1)

    inputs = _inputs()
    model_graph = captured(appended, *inputs)
    records = run_passes(model_graph, *PASSES, inputs=inputs)
    FileCheck().check("rotary_embedding.default](args = (%slice").check("cat").run(text(model_graph))
    assert any("are not the last ones" in miss.reason for miss in records[1].near_misses)
    assert_graph_agrees(model_graph, appended, inputs)


def test_turned_channels_that_are_used_again_stay() -> None:
    def again(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        turned = _turned(x)
        return (x * cos + turned * sin) / turned

    inputs = _inputs()
    model_graph = captured(again, *inputs)
    run_passes(model_graph, *PASSES, inputs=inputs)
    FileCheck().check("cat").check("rotary_embedding").check("div").run(text(model_graph))
    assert_graph_agrees(model_graph, again, inputs)
