"""Run by ``test_interpreted.py`` in a process where Triton interprets kernels instead of compiling them.

Graphs through lowering and generated kernels, next to eager in float64. The interpreter has no bfloat16: it
truncates where a chip rounds, and multiplies the bits.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from codegen.cpp.test_kernels import PHASES, Drawn, Quantized, _assert_close
from graph_testing import captured
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from infercomp.codegen.config import CodegenConfig
from infercomp.codegen.lower import lower
from infercomp.codegen.ops import (
    group_weight_linear,
    int8_weight_linear,
    quantize_per_token,
    quantize_weight_groups,
    sparse_group_weight_linear,
    sparse_int8_linear,
    sparse_weight_linear,
)
from infercomp.codegen.ops.group_codes import CODE_BITS, nearest_grid, packed_codes
from infercomp.codegen.sparse_weights import compress_2_of_4
from infercomp.passes.config import PassConfig
from infercomp.passes.pipeline import pass_names, run_pipeline
from infercomp.runtime.errors import BuildError, InputError

GROUP = 64
ELSEWHERE = {"aten.arange", "aten.sym_size"}


def outputs_of(module: nn.Module, *inputs: torch.Tensor, fuses: bool = True) -> tuple[list[torch.Tensor], Any]:
    """The module through Triton kernels, with every fusion or with none, and how its ops were executed."""
    model_graph = captured(module, *inputs)
    disable = () if fuses else tuple(name for name in pass_names() if name.startswith("fuse_"))
    run_pipeline(model_graph, PassConfig(disable=disable))
    program = lower(model_graph, CodegenConfig(codegen="triton"))
    with torch.no_grad():
        return list(program.bind(model_graph.weights)(*inputs)), program.ops


@settings(max_examples=3, deadline=None, phases=PHASES)
@given(
    st.integers(1, 3),
    st.integers(2, 20),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([8, 16, 24]),
    st.sampled_from([5, 32, 70]),
    st.booleans(),
)
def test_kernels_agree_with_definitions(
    rows: int, tokens: int, heads: int, head_dim: int, outputs: int, fuses: bool
) -> None:
    module = Drawn(heads * head_dim, outputs, heads, tokens).eval()
    x = torch.randn(rows, tokens, heads * head_dim)
    ids, mask = torch.randint(0, 13, (rows, tokens)), torch.rand(tokens, tokens) > 0.3
    with torch.no_grad():
        eager = module(x, ids, mask)
        exact = module.double()(x.double(), ids, mask)
    got, ops = outputs_of(module.float(), x, ids, mask, fuses=fuses)
    for position, parts in enumerate(zip(got, eager, exact, strict=True)):
        _assert_close(*parts, what=position)
    assert {op.op for op in ops if op.how in ("aten", "definition")} <= ELSEWHERE


class WeightOnly(nn.Module):
    """Float rows times integer weights: a scale a row, and groups of each number of bits."""

    def __init__(self, channels: int, outputs: int, group: int) -> None:
        super().__init__()
        self.source, self.group = Quantized(channels, outputs, group), group
        weight = torch.randn(outputs, channels)
        for bits in CODE_BITS:
            for name, value in zip(
                ("codes", "scale", "zero"), quantize_weight_groups(weight, bits, group, False), strict=True
            ):
                self.register_buffer(f"{name}{bits}", value)
            self.register_buffer(f"value{bits}", torch.randn(outputs, channels // group).half())

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = [int8_weight_linear(x, self.source.int8, self.source.scale8, None)]
        for bits in CODE_BITS:
            codes, scale, zero = (getattr(self, f"{name}{bits}") for name in ("codes", "scale", "zero"))
            for each in (zero, None, getattr(self, f"value{bits}")):
                results.append(group_weight_linear(x, codes, scale, each, None, bits, self.group))
        return tuple(results)


class TwoOfFour(nn.Module):
    """Rows in floats and in INT8, times weights of which two in every four are kept."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        weight = torch.randn(outputs, channels).unflatten(1, (-1, 4))
        masked = weight.scatter(2, weight.abs().argsort(2)[..., :2], 0).flatten(1)
        masked[:, :4] = 0
        scale = masked.abs().amax(1) / 127
        codes = (masked / scale[:, None]).round().to(torch.int8)
        for name, tensor in (("float", masked), ("int8", codes)):
            values, indices = compress_2_of_4(tensor)
            self.register_buffer(f"{name}_values", values)
            self.register_buffer(f"{name}_indices", indices)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", torch.randn(outputs))
        self.bits = (4, 8) if channels % GROUP == 0 else ()
        for bits in self.bits:
            codes, group_scale, zero = nearest_grid(masked, bits, GROUP, symmetric=False)
            steps, indices = compress_2_of_4((codes - zero.repeat_interleave(GROUP, 1)).to(torch.int16))
            kept = steps + zero.repeat_interleave(GROUP // 2, 1).to(torch.int16)
            self.register_buffer(f"codes{bits}", packed_codes(kept, bits))
            self.register_buffer(f"scale{bits}", group_scale.half())
            self.register_buffer(f"zero{bits}", zero.to(torch.uint8))
            self.register_buffer(f"indices{bits}", indices)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, scale, sums = quantize_per_token(x, x.shape[-1])
        codes = (self.int8_values, self.int8_indices, self.scale)
        in_groups = []
        for bits in self.bits:
            parts = [getattr(self, f"{name}{bits}") for name in ("codes", "indices", "scale")]
            for zero in (None, getattr(self, f"zero{bits}")):
                in_groups.append(sparse_group_weight_linear(x, *parts, zero, None, bits, GROUP))
        return (
            *in_groups,
            sparse_weight_linear(x, self.float_values, self.float_indices, None, self.bias),
            sparse_weight_linear(x, *codes, None),
            sparse_int8_linear(q, scale, sums, *codes, self.bias, x.dtype),
        )


@settings(max_examples=4, deadline=None, phases=PHASES)
@given(st.integers(1, 80), st.sampled_from([8, 24, 64, 128, 136]), st.sampled_from([7, 32, 70]))
def test_weights_of_which_two_in_every_four_are_kept(rows: int, channels: int, outputs: int) -> None:
    module, x = TwoOfFour(channels, outputs), torch.randn(rows, channels)
    got, ops = outputs_of(module, x)
    assert not [op for op in ops if op.how in ("aten", "definition")]
    expected, exact = module(x), module.double()(x.double())
    for position in range(len(got) - 1):
        _assert_close(got[position], expected[position], exact[position], position)
    assert torch.equal(got[-1], expected[-1])


@settings(max_examples=3, deadline=None, phases=PHASES)
@given(st.integers(1, 80), st.sampled_from([32, 64]), st.integers(1, 3), st.sampled_from([7, 32, 50]))
def test_integer_kernels(rows: int, group: int, num_groups: int, outputs: int) -> None:
    """Quantised rows give the definitions' bits; only the sums of 4-bit groups run as their definition."""
    module, x = Quantized(group * num_groups, outputs, group), torch.randn(rows, group * num_groups)
    x[0] = 0.0
    ids = torch.randint(0, outputs, (rows,))
    got, ops = outputs_of(module, x, ids)
    assert {op.op for op in ops if op.how in ("aten", "definition")} == {"infercomp.group_linear"}
    for position, (mine, expected) in enumerate(zip(got, module(x, ids), strict=True)):
        assert torch.equal(mine, expected), position


@settings(max_examples=3, deadline=None, phases=PHASES)
@given(st.integers(1, 80), st.sampled_from([32, 64, 128]), st.integers(1, 3), st.sampled_from([7, 50]))
def test_integer_weights(rows: int, group: int, num_groups: int, outputs: int) -> None:
    module, x = WeightOnly(group * num_groups, outputs, group), torch.randn(rows, group * num_groups)
    got, ops = outputs_of(module, x)
    assert not [op for op in ops if op.how in ("aten", "definition")]
    for mine, eager, exact in zip(got, module(x), module(x.double()), strict=True):
        _assert_close(mine, eager, exact, "weights")


def test_an_index_out_of_range_is_an_error_and_the_next_step_works() -> None:
    model_graph = captured(nn.Embedding(5, 16), torch.tensor([[1, 4]]))
    program = lower(model_graph, CodegenConfig(codegen="triton")).bind(model_graph.weights)
    with pytest.raises(InputError, match="out of range"):
        program(torch.tensor([[1, 5]]))
    assert torch.equal(program(torch.tensor([[1, 4]]))[0][0], next(iter(model_graph.weights.values()))[[1, 4]])


def test_the_interpreter_has_no_bfloat16() -> None:
    with pytest.raises(BuildError, match="bfloat16"):
        outputs_of(nn.ReLU(), torch.ones(2, 3, dtype=torch.bfloat16))
