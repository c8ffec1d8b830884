"""Every generated C++ kernel against what it stands for: drawn modules, compiled and run next to eager in float64.

Many cases are built into one library, as a compiler call costs more than all of them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_testing import captured
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from infercomp.codegen.config import CodegenConfig
from infercomp.codegen.lower import lower
from infercomp.codegen.ops import (
    attention,
    gated_activation,
    group_linear,
    int8_embedding,
    int8_linear,
    layer_norm,
    quantize_per_tensor,
    quantize_per_token,
    quantize_weight_groups,
    quantize_weight_int8,
    rms_norm,
    rotary_embedding,
)
from infercomp.passes.config import PassConfig
from infercomp.passes.pipeline import run_pipeline

# A compiler call an example: a failure is shown as it is found, not shrunk.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)


def _kernel_outputs(module: nn.Module, *inputs: torch.Tensor, fuses: bool = True) -> tuple[list[torch.Tensor], Any]:
    """The module through generated kernels, with every fusion or with none, and how its ops were executed."""
    model_graph = captured(module, *inputs)
    disable = () if fuses else tuple(name for name in _pass_names() if name.startswith("fuse_"))
    run_pipeline(model_graph, PassConfig(disable=disable))
    program = lower(model_graph, CodegenConfig(codegen="cpp"))
    with torch.no_grad():
        return list(program.bind(model_graph.weights)(*inputs)), program.ops


def _pass_names() -> tuple[str, ...]:
    from infercomp.passes.pipeline import pass_names

    return pass_names()


def _assert_close(got: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, what: object) -> None:
    """The error against float64 is at most twice that of eager in the same dtype, or a few units in the last place."""
    assert got.shape == eager.shape and got.dtype == eager.dtype, what
    if not got.dtype.is_floating_point:
        assert torch.equal(got, eager), what
        return
    scale = exact.abs().max().clamp(min=1e-6)
    error, allowed = (got.double() - exact).abs().max(), (eager.double() - exact).abs().max()
    assert error <= 2 * allowed + 8 * torch.finfo(got.dtype).eps * scale, (what, float(error), float(allowed))


class Drawn(nn.Module):
    """A few calls of every kind, of drawn sizes, over one input [rows, tokens, channels]."""

    def __init__(self, channels: int, outputs: int, heads: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.heads = heads
        self.weight, self.bias = nn.Parameter(torch.randn(channels)), nn.Parameter(torch.randn(channels))
        self.linear, self.back = nn.Linear(channels, outputs), nn.Linear(outputs, channels, bias=False)
        self.gate_up = nn.Linear(channels, 2 * outputs, bias=False)
        self.table = nn.Embedding(13, channels)
        self.query_key_value = nn.Linear(channels, 3 * channels)
        self.register_buffer("frequencies", torch.linspace(0.1, 1.0, channels // heads))

    def forward(self, x: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        gate, up = self.gate_up(x).chunk(2, -1)
        normed = rms_norm(x, self.weight, 1e-6, False)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.query_key_value(x).chunk(3, -1)
        )
        angles = torch.arange(x.shape[1])[:, None] * self.frequencies
        turned = rotary_embedding(q, torch.cos(angles).to(x.dtype), torch.sin(angles).to(x.dtype), False)
        return (
            x * 2.5 - torch.exp(-x.abs()) / 3,
            torch.where(x > 0, torch.tanh(x), torch.sigmoid(x) * x),
            torch.cat([x[..., 1:], x[..., :1] + 1], -1),
            x.transpose(0, 1).contiguous(),
            F.softmax(x, -1),
            x.mean(-1, keepdim=True) + x.amax(-1, keepdim=True),
            torch.min(x, x * 2) - torch.max(x, x * x),
            normed,
            layer_norm(x, self.weight, self.bias, 1e-5),
            F.gelu(x),
            F.gelu(x, approximate="tanh"),
            self.table(ids),
            rms_norm(self.table(ids), self.weight, 1e-6, True),
            self.table.weight.gather(0, ids[0][:, None].expand(-1, x.shape[-1])),
            x.repeat(2, 1, 3, 1),
            x.repeat_interleave(3, 1),
            self.linear(x),
            x + self.back(F.relu(self.linear(normed))),
            gated_activation(gate, up, "silu"),
            turned,
            attention(q, k, v, scale=0.3, is_causal=True),
            attention(turned, k, v, mask, scale=0.3),
            attention(q, k[:, :1], v[:, :1], scale=0.3, is_causal=True, sliding_window=3, logit_softcap=2.0),
        )


@settings(max_examples=4, phases=PHASES)
@given(
    st.integers(1, 3),
    st.integers(2, 40),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([8, 16, 24]),
    st.sampled_from([5, 32, 70]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
)
def test_kernels_agree_with_definitions(
    rows: int, tokens: int, heads: int, head_dim: int, outputs: int, dtype: torch.dtype, fuses: bool
) -> None:
    module = Drawn(heads * head_dim, outputs, heads, tokens).to(dtype).eval()
    x = torch.randn(rows, tokens, heads * head_dim).to(dtype)
    ids, mask = torch.randint(0, 13, (rows, tokens)), torch.rand(tokens, tokens) > 0.3
    with torch.no_grad():
        eager = module(x, ids, mask)
        exact = module.double()(x.double(), ids, mask)
    got, ops = _kernel_outputs(module.to(dtype), x, ids, mask, fuses=fuses)
    for position, parts in enumerate(zip(got, eager, exact, strict=True)):
        _assert_close(*parts, what=position)
    assert {op.op for op in ops if op.how in ("aten", "definition")} <= {"aten.arange", "aten.sym_size"}


class Quantized(nn.Module):
    """Integer products on quantised rows; all of it must agree bit for bit with the definitions."""

    def __init__(self, channels: int, outputs: int, group: int) -> None:
        super().__init__()
        weight = torch.randn(outputs, channels)
        self.group = group
        self.register_buffer("step", torch.tensor([0.0173]))  # of a grid that clips what is above 2.2
        for name, value in zip(("int8", "scale8"), quantize_weight_int8(weight), strict=True):
            self.register_buffer(name, value)
        for name, value in zip(
            ("int4", "scale4", "zero4"), quantize_weight_groups(weight, 4, group, False), strict=True
        ):
            self.register_buffer(name, value)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, scale, sums = quantize_per_token(x, x.shape[-1])
        grouped = quantize_per_token(x * 3, self.group)
        static = quantize_per_tensor(x, self.step, x.shape[-1])
        return (
            q,
            scale,
            sums,
            grouped[2],
            int8_linear(q, scale, sums, self.int8, self.scale8, None, torch.float32),
            group_linear(*grouped, self.int4, self.scale4, self.zero4, None, 4, self.group, torch.float32),
            int8_embedding(self.int8, self.scale8, ids, torch.float32),
            *static,
            int8_linear(*static, self.int8, self.scale8, None, torch.float32),
        )


@settings(max_examples=3, phases=PHASES)
@given(st.integers(1, 30), st.sampled_from([32, 64]), st.integers(1, 3), st.sampled_from([7, 32, 50]))
def test_integer_kernels_are_exact(rows: int, group: int, num_groups: int, outputs: int) -> None:
    module, x = Quantized(group * num_groups, outputs, group), torch.randn(rows, group * num_groups)
    x[0] = 0.0
    x[-1, 3] = x[-1, 3] if rows == 1 else torch.inf
    ids = torch.randint(0, outputs, (rows,))
    got, ops = _kernel_outputs(module, x, ids)
    assert not [op for op in ops if op.how in ("aten", "definition")]
    for position, (mine, expected) in enumerate(zip(got, module(x, ids), strict=True)):
        if position in (5,):  # sums of groups in float32: the kernel may use fused multiply-adds
            torch.testing.assert_close(mine, expected, rtol=2e-6, atol=2e-6, equal_nan=True)
        else:
            torch.testing.assert_close(mine, expected, rtol=0, atol=0, equal_nan=True, msg=str(position))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_channels", [1024, 2048])
def test_rows_a_multiple_of_4_kib_apart(dtype: torch.dtype, num_channels: int) -> None:
    """They share sets of the cache, and tiles are smaller then."""
    torch.manual_seed(0)
    module, x = nn.Linear(num_channels, 40).to(dtype).eval(), torch.randn(50, num_channels).to(dtype)
    (got,), ops = _kernel_outputs(module, x)
    assert {op.how for op in ops} == {"cpp"}
    _assert_close(got, module(x), module.double()(x.double()), num_channels)


def test_a_planted_bug_is_caught() -> None:
    """The comparison sees an error of one part in a hundred in one element."""
    exact = torch.randn(4, 8, dtype=torch.float64)
    wrong = exact.float()
    wrong[2, 3] *= 1.01
    with pytest.raises(AssertionError):
        _assert_close(wrong, exact.float(), exact, "planted")


def test_an_index_out_of_range_is_an_error() -> None:
    from infercomp.runtime.errors import InputError

    module = nn.Embedding(5, 16)
    with pytest.raises(InputError, match="out of range"):
        _kernel_outputs(module, torch.tensor([[1, 5]]))
