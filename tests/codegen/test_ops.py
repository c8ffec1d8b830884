"""The vocabulary: schema, fake and definition agree, and definitions equal references written out by hand."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from graph_testing import captured, count, outputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from infercomp.codegen.ops import (
    ACTIVATIONS,
    VOCABULARY,
    attention,
    definition_of,
    gated_activation,
    layer_norm,
    linear,
    merge_weights,
    op,
    paged_attention,
    quantize_per_token,
    quantize_weight_groups,
    quantize_weight_int8,
    rms_norm,
    rotary_embedding,
    write_kv,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
Case = tuple[tuple[Any, ...], dict[str, Any]]


def _random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def _cases(dtype: torch.dtype, rows: int, heads: int, groups: int, dim: int) -> dict[str, Case]:
    """Arguments for every op of the vocabulary, drawn from a few sizes."""

    def random(*shape: int) -> torch.Tensor:
        return _random(*shape, dtype=dtype)

    query, key = random(2, heads * groups, rows, 2 * dim), random(2, heads, rows + 3, 2 * dim)
    table = torch.tensor([[1, 0, 2, 3]], dtype=torch.int32)
    lengths, starts = torch.tensor([rows + 2], dtype=torch.int32), torch.tensor([0, rows], dtype=torch.int32)
    caches = random(4, 4, heads, 2 * dim), random(4, 4, heads, dim)
    quantized = quantize_per_token(random(2, rows, 8 * dim), 4 * dim)
    int8_weight = quantize_weight_int8(random(5, 8 * dim))
    int4_weight = quantize_weight_groups(random(5, 8 * dim), 4, 4 * dim, False)
    outliers = torch.tensor([1] + [0] * 30 + [1]).int(), torch.tensor([2, 0]).int(), torch.randn(2)
    clustered = torch.randint(0, 256, (32, 4 * dim)).to(torch.uint8), torch.randn(2, 16), *outliers
    indices = torch.tensor([[0b11011000], [0b01001110], [0b11100100]], dtype=torch.uint8).expand(3, dim)
    int8_values = torch.randint(-128, 128, (3, 4 * dim), dtype=torch.int8), indices, torch.rand(3)
    constants = torch.rand(3, 2).half(), torch.randint(0, 16, (3, 2)).to(torch.uint8)
    sparse_codes = torch.randint(0, 256, (3, 2 * dim)).to(torch.uint8), indices, *constants
    sparse_rows = quantize_per_token(random(2, rows, 8 * dim), 8 * dim)
    ids = torch.tensor([[4, 0, 0]])
    return {
        "attention": (
            (query, key, random(2, heads, rows + 3, dim), None, random(heads * groups).float(), random(heads * groups)),
            {"scale": 0.3, "is_causal": True, "sliding_window": 2, "logit_softcap": 5.0},
        ),
        "paged_attention": ((random(rows, heads * groups, 2 * dim), *caches, table, lengths, starts), {"scale": 0.3}),
        "write_kv": ((random(rows, heads, 2 * dim), random(rows, heads, dim), *caches, torch.arange(rows)), {}),
        "linear": ((random(2, rows, dim), random(5, dim), random(5)), {}),
        "gated_activation": ((random(rows, dim), random(rows, dim), "silu"), {}),
        "merge_weights": (([random(3, dim), random(rows, dim)],), {}),
        "rms_norm": ((random(2, rows, dim), random(dim), 1e-5, True), {}),
        "layer_norm": ((random(2, rows, dim), random(dim), None, 1e-5), {}),
        "rotary_embedding": ((random(2, rows, 4 * dim), random(rows, 2 * dim), random(rows, 2 * dim), True), {}),
        "quantize_per_token": ((random(2, rows, 8 * dim), 4 * dim), {}),
        "quantize_per_tensor": ((random(2, rows, 8 * dim), torch.tensor([0.02]), 4 * dim), {}),
        "quantize_weight_int8": ((random(rows, dim),), {}),
        "quantize_weight_groups": ((random(rows, 8 * dim), 3, 4 * dim, True), {}),
        "int8_linear": ((*quantized, *int8_weight, random(5), dtype), {}),
        "group_linear": ((*quantized, *int4_weight, random(5), 4, 4 * dim, dtype), {}),
        "int8_weight_linear": ((random(2, rows, 8 * dim), *int8_weight, random(5)), {}),
        "group_weight_linear": ((random(2, rows, 8 * dim), *int4_weight, None, 4, 4 * dim), {}),
        "clustered_weight_linear": ((random(2, rows, 8 * dim), *clustered, random(32), 4), {}),
        "group_embedding": ((*int4_weight, ids, 4, dtype), {}),
        "sparse_weight_linear": ((random(2, rows, 8 * dim), random(3, 4 * dim), indices, None, random(3)), {}),
        "sparse_group_weight_linear": ((random(2, rows, 8 * dim), *sparse_codes, random(3), 4, 4 * dim), {}),
        "sparse_int8_linear": ((*sparse_rows, *int8_values, random(3), dtype), {}),
        "int8_embedding": ((*int8_weight, ids, dtype), {}),
    }


def _copied(case: Case) -> Case:
    args, kwargs = case
    return torch.utils._pytree.tree_map(
        lambda value: value.clone() if torch.is_tensor(value) else value, (args, kwargs)
    )


def _tensors(arguments: Any) -> list[torch.Tensor]:
    return [value for value in torch.utils._pytree.tree_leaves(arguments) if torch.is_tensor(value)]


def _kind(value: torch.Tensor) -> tuple[object, ...]:
    return value.dtype, value.shape, value.stride()


def test_every_op_has_a_case() -> None:
    assert set(_cases(torch.float32, 3, 2, 2, 4)) == set(VOCABULARY)


@pytest.mark.parametrize("name", VOCABULARY)
def test_schema_fake_and_definition_agree(name: str) -> None:
    args, kwargs = _cases(torch.float32, 3, 2, 2, 4)[name]
    torch.library.opcheck(VOCABULARY[name].overload, args, kwargs, test_utils=("test_schema", "test_faketensor"))


@settings(max_examples=25)
@given(st.sampled_from(DTYPES), *(st.integers(1, 4) for _ in range(4)))
def test_fake_values_have_the_real_shape_and_dtype(
    dtype: torch.dtype, rows: int, heads: int, groups: int, dim: int
) -> None:
    for name, case in _cases(dtype, rows, heads, groups, dim).items():
        args, kwargs = _copied(case)
        real = VOCABULARY[name](*args, **kwargs)
        mode = FakeTensorMode()
        fake_args = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, case[0])
        with mode:
            fake = VOCABULARY[name](*fake_args, **kwargs)
        assert [_kind(value) for value in _tensors(fake)] == [_kind(value) for value in _tensors(real)], name


@pytest.mark.parametrize("name", VOCABULARY)
def test_op_and_definition_give_the_same(name: str) -> None:
    case = _cases(torch.float32, 3, 2, 2, 4)[name]
    (args, kwargs), (other_args, other_kwargs) = _copied(case), _copied(case)
    found, expected = VOCABULARY[name](*args, **kwargs), VOCABULARY[name].definition(*other_args, **other_kwargs)
    torch.testing.assert_close((found, *_tensors(args)), (expected, *_tensors(other_args)), rtol=0, atol=0)
    changed = [
        i for i, (old, new) in enumerate(zip(case[0], args, strict=True)) if torch.is_tensor(old) and not old.equal(new)
    ]
    assert changed == ([2, 3] if name == "write_kv" else [])
    assert definition_of(VOCABULARY[name].overload) is VOCABULARY[name]


def test_targets_that_are_not_ours_have_no_definition() -> None:
    assert definition_of(torch.ops.aten.linear.default) is None
    assert definition_of(min) is None


def test_ops_survive_saving_a_program() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return gated_activation(rms_norm(x, w, 1e-5, True), linear(x, w[None] * x[0]), "gelu_tanh")

    x, w = _random(4, 4), _random(4)
    module = torch.nn.Module()
    module.forward = function  # type: ignore[method-assign]
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(module, (x, w), strict=False), buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    assert [str(n.target) for n in loaded.graph.nodes].count("infercomp.rms_norm.default") == 1
    torch.testing.assert_close(loaded.module()(x, w), function(x, w), rtol=0, atol=0)


def test_ops_are_captured_whole() -> None:
    x = torch.randn(1, 5, 4)
    model_graph = captured(lambda x: rms_norm(x, None, 1e-5), x, dynamic={0: 1})
    assert count(model_graph, rms_norm) == 1
    assert torch.equal(outputs(model_graph, [x])[0], rms_norm(x, None, 1e-5))


def test_op_is_declared_from_its_schema() -> None:
    try:

        @op("test_only_double(Tensor input) -> Tensor")
        def double(input: torch.Tensor) -> torch.Tensor:
            return input * 2

        assert double.overload is torch.ops.infercomp.test_only_double.default
        assert torch.equal(double(torch.ones(2)), torch.full((2,), 2.0))
    finally:
        del VOCABULARY["test_only_double"]


@pytest.mark.parametrize("unit_offset", [False, True])
def test_rms_norm_against_loops(unit_offset: bool) -> None:
    x, weight = _random(3, 6), _random(6)
    expected = np.empty((3, 6))
    for row in range(3):
        scale = 1 / math.sqrt(sum(float(value) ** 2 for value in x[row]) / 6 + 1e-3)
        for i in range(6):
            expected[row, i] = float(x[row, i]) * scale * (float(weight[i]) + unit_offset)
    np.testing.assert_allclose(rms_norm(x, weight, 1e-3, unit_offset).numpy(), expected, rtol=1e-13)
    np.testing.assert_allclose(rms_norm(x, torch.ones(6), 1e-3), rms_norm(x, None, 1e-3, unit_offset), rtol=1e-13)


def test_rms_norm_rounds_once() -> None:
    x, weight = _random(64, 32, dtype=torch.bfloat16), _random(32, dtype=torch.bfloat16)
    exact = rms_norm(x.double(), weight.double(), 1e-5)
    found = rms_norm(x, weight, 1e-5)
    assert ((found.double() - exact).abs() <= exact.abs() * 2**-8 * 1.01).all()


def test_layer_norm_against_numpy() -> None:
    x, weight, bias = (each.numpy() for each in (_random(3, 6), _random(6), _random(6)))
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3)
    tensors = [torch.from_numpy(each) for each in (x, weight, bias)]
    np.testing.assert_allclose(layer_norm(*tensors, 1e-3), expected * weight + bias, rtol=1e-12)
    np.testing.assert_allclose(layer_norm(tensors[0], None, None, 1e-3), expected, rtol=1e-12)


@pytest.mark.parametrize("transposed", [False, True])
def test_linear_against_numpy(transposed: bool) -> None:
    x, weight, bias = _random(2, 3, 4), _random(5, 4), _random(5)
    stored = weight.t().contiguous() if transposed else weight
    expected = np.einsum("abk,nk->abn", x.numpy(), weight.numpy())
    # A sum of four terms that cancel errs by roundings of the terms, whatever is left of it.
    bound = {"rtol": 1e-12, "atol": 4 * np.finfo(np.float64).eps * float((x.abs() @ weight.abs().t()).max())}
    np.testing.assert_allclose(linear(x, stored, transposed=transposed), expected, **bound)
    np.testing.assert_allclose(linear(x, stored, bias, transposed=transposed), expected + bias.numpy(), **bound)


SCALAR_ACTIVATIONS = {
    "silu": lambda v: v / (1 + math.exp(-v)),
    "gelu": lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))),
    "gelu_tanh": lambda v: 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    "relu": lambda v: max(v, 0.0),
    "sigmoid": lambda v: 1 / (1 + math.exp(-v)),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_activation_against_scalars(activation: str) -> None:
    gate, up = 3 * _random(20), _random(20)
    expected = [SCALAR_ACTIVATIONS[activation](float(g)) * float(u) for g, u in zip(gate, up, strict=True)]
    np.testing.assert_allclose(gated_activation(gate, up, activation), expected, rtol=1e-12, atol=1e-15)


def test_merge_weights_lays_end_to_end() -> None:
    first, second = _random(2, 3), _random(4, 3)
    assert torch.equal(merge_weights([first, second]), torch.cat([first, second]))
    assert torch.equal(merge_weights([first.t(), second.t()], 1), torch.cat([first, second]).t())


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [8, 4, 2])
def test_rotary_embedding_turns_pairs(interleaved: bool, rotary_dim: int) -> None:
    """Each pair, as a complex number, is multiplied by e^(i angle); other channels pass."""
    x, angles = _random(2, 3, 8), _random(3, rotary_dim // 2)
    repeated = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
    expected = x.clone().numpy()
    for pair in range(rotary_dim // 2):
        i, j = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + rotary_dim // 2)
        turned = (x[..., i] + 1j * x[..., j]).numpy() * np.exp(1j * angles[:, pair].numpy())
        expected[..., i], expected[..., j] = turned.real, turned.imag
    found = rotary_embedding(x, repeated.cos(), repeated.sin(), interleaved)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(found[..., rotary_dim:], x[..., rotary_dim:])


def test_write_kv_writes_the_slots_and_nothing_else() -> None:
    key, value = _random(3, 2, 4), _random(3, 2, 5)
    key_cache, value_cache = torch.full((4, 4, 2, 4), torch.nan).double(), torch.full((4, 4, 2, 5), torch.nan).double()
    slots = [13, 2, 7]
    write_kv(key, value, key_cache, value_cache, torch.tensor(slots))
    for token, slot in enumerate(slots):
        assert torch.equal(key_cache[slot // 4, slot % 4], key[token])
        assert torch.equal(value_cache[slot // 4, slot % 4], value[token])
    assert key_cache.isnan().sum() == (16 - 3) * 2 * 4
    assert value_cache.isnan().sum() == (16 - 3) * 2 * 5


def test_names_are_those_of_the_schemas() -> None:
    for name, each in VOCABULARY.items():
        assert name == each.name == each.schema.partition("(")[0]
    assert {attention.name, paged_attention.name} <= set(VOCABULARY)
