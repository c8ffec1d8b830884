"""``infercomp.explain``: what each pass did and why not, for modules and functions."""

from __future__ import annotations

import json
from unittest import mock

import pytest
import torch
from families import FAMILIES
from torch import nn
from torch.nn import functional

import infercomp
from infercomp import ConfigError, backend
from infercomp.report import Report


@pytest.fixture(scope="module")
def llama_report() -> Report:
    family = FAMILIES["llama"]
    return infercomp.explain(family.build("eager"), **family.example_inputs())


def record_of(report: Report, name: str):  # type: ignore[no-untyped-def]
    return next(record for record in report.passes if record.name == name)


def test_fields_of_a_pass(llama_report: Report) -> None:
    attention = record_of(llama_report, "recognize_attention")
    assert attention.matches == 2 and attention.near_misses == ()
    assert 0 < attention.milliseconds < 60_000
    assert attention.max_error is not None and 0 <= attention.max_error <= 1e-9
    assert all("modeling_llama.py:" in site.where for site in attention.sites)
    assert record_of(llama_report, "merge_linears").matches == 4


def test_ops_say_how_each_is_executed(llama_report: Report) -> None:
    assert llama_report.ops["infercomp.attention"] == "definition"
    assert llama_report.ops["aten.embedding"] == "aten"
    assert "aten.softmax.int" not in llama_report.ops


def test_text_and_json(llama_report: Report) -> None:
    text = str(llama_report)
    assert all(record.name in text for record in llama_report.passes)
    assert "infercomp.attention" in text
    assert json.loads(llama_report.to_json())["passes"][0]["name"] == llama_report.passes[0].name


def test_near_misses_carry_reason_and_source_line() -> None:
    family = FAMILIES["t5"]
    masks = record_of(infercomp.explain(family.build("eager"), **family.example_inputs()), "recognize_masks")
    assert masks.matches == 0 and len(masks.near_misses) == 2
    assert all(miss.reason and "modeling_t5.py:" in miss.where for miss in masks.near_misses)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return functional.softmax(query @ key.transpose(-1, -2) * 0.5, dim=-1) @ value


def test_a_plain_function() -> None:
    report = infercomp.explain(attend, *(torch.randn(1, 2, 5, 4) for _ in range(3)))
    assert report.matches_of("recognize_attention") == 1
    assert report.num_graphs == 1


def test_options_are_those_of_compile() -> None:
    inputs = [torch.randn(1, 2, 5, 4) for _ in range(3)]
    report = infercomp.explain(attend, *inputs, options={"disable": ["recognize_attention"], "verify": False})
    attention = record_of(report, "recognize_attention")
    assert attention.matches == 0 and attention.skipped == 1
    assert all(record.max_error is None for record in report.passes)
    with pytest.raises(ConfigError, match="verify"):
        infercomp.explain(attend, *inputs, options={"verfy": True})


class Broken(nn.Module):
    """Attention, a graph break, attention."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = attend(hidden, hidden, hidden)
        torch._dynamo.graph_break()
        return attend(hidden, hidden, hidden) + 1


def test_graph_breaks_are_counted_and_reports_joined() -> None:
    report = infercomp.explain(Broken(), torch.randn(1, 2, 5, 4))
    assert report.num_graphs == 2
    assert report.matches_of("recognize_attention") == 2


def test_the_target_is_left_as_it_was() -> None:
    module = Broken()
    hidden = torch.randn(1, 2, 5, 4)
    expected = module(hidden)
    infercomp.explain(module, hidden, options={"dump": None})
    assert module._compiled_call_impl is None
    with mock.patch.object(backend, "compile_dynamo", side_effect=AssertionError("still compiled")):
        assert torch.equal(module(hidden), expected)
