"""compress_weights: 2:4 weights are found by themselves, computed on kernels, and saved; others stay dense."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_testing import captured, count, outputs, run_passes
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import infercomp
from infercomp.account import size_of
from infercomp.codegen import sparse_panels
from infercomp.codegen.config import CodegenConfig
from infercomp.codegen.lower import lower
from infercomp.codegen.model_graph import ModelGraph
from infercomp.codegen.ops import (
    linear,
    merge_weights,
    sparse_group_weight_linear,
    sparse_int8_linear,
    sparse_weight_linear,
)
from infercomp.codegen.sparse_weights import kept_channels
from infercomp.passes.config import PassConfig
from infercomp.passes.pipeline import run_pipeline
from infercomp.passes.record import PassRecord

PASSES = ("normalize", "recognize_linear", "merge_linears", "quantize_linears", "compress_weights")
TOKENS = list(range(3, 40))


def masked(weight: torch.Tensor) -> torch.Tensor:
    """The two of every four consecutive inputs of largest magnitude, the others zeros of any sign."""
    groups = weight.unflatten(1, (-1, 4))
    smallest = groups.abs().float().argsort(-1)[..., :2]
    return groups.mul(torch.ones_like(groups).scatter(-1, smallest, 0.0)).flatten(1)


class Layer(nn.Module):
    """Two linears of one input, which become one, and a linear with a bias; ``other`` may use the weights too."""

    def __init__(self, channels: int = 32, outputs: int = 24, other: Callable[[Layer], Any] | None = None) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(channels, outputs, bias=False), nn.Linear(channels, 8, bias=False)
        self.down = nn.Linear(outputs, channels)
        self.other = other
        for each in (self.q, self.k, self.down):
            each.weight.data = masked(torch.randn(each.weight.shape))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q = F.silu(self.q(x))
        parts = q, self.k(x), self.down(q)
        return parts if self.other is None else (*parts, self.other(self))


def compressed(layer: nn.Module, x: torch.Tensor, **options: Any) -> tuple[ModelGraph, PassRecord]:
    model_graph = captured(layer, x)
    return model_graph, run_passes(model_graph, *PASSES, **options)[-1]


def test_fires() -> None:
    layer, x = Layer().double(), torch.randn(2, 5, 32, dtype=torch.float64)
    expected = layer(x)
    model_graph, record = compressed(layer.float(), x.float(), inputs=[x.float()])
    assert (record.matches, record.near_misses) == (2, ()) and record.max_error < 1e-9
    assert (count(model_graph, sparse_weight_linear), count(model_graph, linear)) == (2, 0)
    assert count(model_graph, merge_weights) == 2
    assert {tuple(each.shape) for each in model_graph.weights.values()} == {
        (24, 16), (24, 4), (8, 16), (8, 4), (32, 12), (32, 3), (32,),
    }  # fmt: skip
    for found, wanted in zip(outputs(model_graph, [x.float()]), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def with_three_of_four(layer: Layer) -> Layer:
    layer.q.weight.data[3, 4:7] = 1.0
    return layer


NEAR_MISSES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "three nonzeros": (lambda: with_three_of_four(Layer()), ["1 of the 256 groups of four"]),
    "not in eights": (lambda: Layer(outputs=20), ["its 20 inputs are not in eights"]),
    "read by another": (lambda: Layer(other=lambda layer: layer.down.weight.sum(0)), ["its weight is also used"]),
    "float64": (lambda: Layer().double(), ["no kernel reads 2:4 weights of torch.float64"] * 2),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name: str) -> None:
    make, reasons = NEAR_MISSES[name]
    layer = make()
    x = torch.randn(3, 32, dtype=next(layer.parameters()).dtype)
    model_graph, record = compressed(layer, x)
    assert len(record.near_misses) == len(reasons) and record.matches == 2 - len(reasons)
    assert all(found.reason.startswith(reason) for found, reason in zip(record.near_misses, reasons, strict=True))
    assert count(model_graph, linear) == len(reasons)


def test_three_bits_stay_dense() -> None:
    model_graph = captured(Layer(outputs=32), torch.randn(3, 32))
    records = run_pipeline(model_graph, PassConfig(quantization="w3a16-g32", quantize_lm_head=True))
    (record,) = [each for each in records if each.name == "compress_weights"]
    reason = "no kernel reads 2:4 codes of 3 bits in groups of 32"
    assert reason in [found.reason for found in record.near_misses]


def test_ordinary_weights_are_no_near_misses() -> None:
    layer = Layer()
    for each in (layer.q, layer.k, layer.down):
        each.weight.data.normal_()
    model_graph, record = compressed(layer, torch.randn(3, 32))
    assert (record.matches, record.near_misses, count(model_graph, linear)) == (0, (), 2)


def test_weights_of_the_user_stay() -> None:
    model_graph = captured(Layer(), torch.randn(3, 32))
    model_graph.frozen = False
    assert run_passes(model_graph, *PASSES)[-1].matches == 0 and count(model_graph, linear) == 2


def test_one_match_can_be_left_out() -> None:
    model_graph, record = compressed(Layer(), torch.randn(3, 32), disable=("compress_weights#1",))
    assert (record.matches, record.skipped) == (1, 1)
    assert (count(model_graph, sparse_weight_linear), count(model_graph, linear)) == (1, 1)


class Products(nn.Module):
    """Linears of one input, masked, of several sizes."""

    def __init__(self, channels: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(channels, outputs + 13 * i, bias=i == 1, dtype=dtype) for i in range(2))
        for each in self.layers:
            each.weight.data = masked(torch.randn(each.weight.shape)).to(dtype)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.layers[0](x) * 2.0, F.relu(self.layers[1](x))]


def kernel_outputs(products: Products, x: torch.Tensor, quantization: str | None) -> list[list[torch.Tensor]]:
    """What kernels compute of all rows, and of the first and the last row alone; all linears are sparse."""
    model_graph = captured(products, x, dynamic={0: 0})
    run_pipeline(model_graph, PassConfig(quantization=quantization, quantize_lm_head=True))
    ops = (sparse_weight_linear, sparse_int8_linear, sparse_group_weight_linear)
    sparse = sum(count(model_graph, op) for op in ops)
    assert (sparse, count(model_graph, linear)) == (2, 0)
    program = lower(model_graph, CodegenConfig(codegen="cpp"))
    assert not [each for each in program.ops if each.how in ("aten", "definition") and "linear" in each.op]
    step = program.bind(model_graph.weights)
    with torch.no_grad():
        return [list(step(rows)) for rows in (x, x[:1], x[-1:])]


def assert_right(products: Products, x: torch.Tensor, found: list[torch.Tensor]) -> None:
    """The error against float64 is at most twice that of eager with the dense weight."""
    with torch.no_grad():
        eager = products(x)
        exact = products.double()(x.double())
    products.to(x.dtype)
    for mine, theirs, wanted in zip(found, eager, exact, strict=True):
        error, allowed = (mine.double() - wanted).abs().max(), (theirs.double() - wanted).abs().max()
        assert error <= 2 * allowed + 8 * torch.finfo(x.dtype).eps * wanted.abs().max()


SHAPES = st.tuples(st.integers(2, 30), st.integers(1, 20), st.integers(1, 70), st.integers(0, 999))


# A compiler call an example: a failure is shown as it is found, not shrunk.
@settings(max_examples=2, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(SHAPES, st.sampled_from([torch.float32, torch.bfloat16]))
def test_kernels_are_the_dense_product(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """As close to float64 as eager with the dense weight, and the same bits for every batch."""
    num_rows, eights, num_outputs, seed = shape
    torch.manual_seed(seed)
    products, x = Products(8 * eights, num_outputs, dtype), torch.randn(num_rows, 8 * eights).to(dtype)
    found, first, last = kernel_outputs(products, x, None)
    assert_right(products, x, found)
    for every, one, other in zip(found, first, last, strict=True):
        assert torch.equal(every[:1], one) and torch.equal(every[-1:], other)


@pytest.mark.parametrize("recipe", ["w8a8", "w8a16", "w8a16-g32-sym", "w4a16-g32", "w4a16-g32-sym"])
def test_codes_of_masked_weights_are_compressed(recipe: str) -> None:
    """Rounding keeps zeros: what is compressed gives the numbers of the dense kernels of the same codes."""
    torch.manual_seed(0)
    products, x = Products(96, 40, torch.float32), torch.randn(9, 96)
    found, first, last = kernel_outputs(products, x, recipe)
    model_graph = captured(products, x)
    run_pipeline(model_graph, PassConfig(quantization=recipe, disable=("compress_weights",)))
    dense = outputs(model_graph, [x])
    for every, one, other, wanted in zip(found, first, last, dense, strict=True):
        torch.testing.assert_close(every, wanted, rtol=2e-6, atol=2e-6)
        assert torch.equal(every[:1], one) and torch.equal(every[-1:], other)


def test_places_off_by_one_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: panels with each value one input further in its group of four."""
    torch.manual_seed(0)
    products, x = Products(40, 33, torch.float32), torch.randn(3, 40)
    monkeypatch.setattr(sparse_panels, "kept_channels", lambda indices: kept_channels(indices) + 1 & 3)
    with pytest.raises(AssertionError):
        assert_right(products, x, kernel_outputs(products, x, None)[0])


def small_llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=130, max_position_embeddings=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            parameter.data = masked(parameter.data)
    return model


@pytest.mark.parametrize("quantization", [None, "w8a8", "w4a16-g32"])
def test_a_masked_model_is_served_and_saved(quantization: str | None, tmp_path: Path) -> None:
    """From a folder, with no option; saved compressed and loaded to the same bits."""
    small_llama(torch.bfloat16).save_pretrained(tmp_path / "masked")
    options: Any = {"num_blocks": 16, "quantization": quantization}
    llm = infercomp.LLM(tmp_path / "masked", codegen="cpp", **options)
    ops = {None: "sparse_weight_linear", "w8a8": "sparse_int8_linear", "w4a16-g32": "sparse_group_weight_linear"}
    assert llm.report.ops[f"infercomp.{ops[quantization]}"] == "cpp"
    record = next(each for each in llm.report.passes if each.name == "compress_weights")
    assert record.matches == 2 * 4 and not record.near_misses
    # Of each weight half of its bits, and one for its place; a group of 32 has a float16 scale and a byte for its zero.
    if quantization != "w8a8":
        assert size_of(llm._served).bits_per_weight == {None: 9.0, "w4a16-g32": 2 + 1 + 24 / 32}[quantization]
    logits = llm.logits(TOKENS)
    dense = infercomp.LLM(tmp_path / "masked", codegen="reference", disable=("compress_weights",), **options)
    assert float((logits - dense.logits(TOKENS)).abs().max()) < 0.02 * float(logits.abs().max())
    llm.save(tmp_path / "saved")
    dense.save(tmp_path / "dense")
    assert torch.equal(infercomp.LLM(tmp_path / "saved", codegen="cpp", num_blocks=16).logits(TOKENS), logits)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("saved", "dense")]
    assert sizes[0] < sizes[1] and not (tmp_path / "saved" / "config.json").exists()
