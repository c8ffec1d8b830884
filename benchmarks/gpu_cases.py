"""The cases of ``gpu.py``: what is run, what it is compared with, and how its output is checked."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

from infercomp.capture import _from_exported, _functional
from infercomp.codegen.lower import lower
from infercomp.codegen.ops import attention, int8_linear, paged_attention, sparse_weight_linear
from infercomp.codegen.sparse_weights import compress_2_of_4
from infercomp.config import parse_options
from infercomp.passes.pipeline import run_pipeline
from infercomp.runtime.decode_graphs import CudaCapture
from infercomp.runtime.kv_pools import allocate_pools
from infercomp.runtime.step import StepInputs
from infercomp.served_model import ServedModel
from infercomp.serving import compile_for_serving

BLOCK_SIZE = 16
_LLAMA = {"rope_theta": 500000.0, "max_position_embeddings": 8192, "num_key_value_heads": 8, "vocab_size": 128256}
_SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "Llama-3-8B": lambda: LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **_LLAMA
    ),
    "Llama-3.2-1B": lambda: LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, head_dim=64,
        tie_word_embeddings=True, **_LLAMA,
    ),
    "Qwen3-0.6B": lambda: Qwen3Config(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, head_dim=128,
        num_key_value_heads=8, vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=8192,
    ),
}  # fmt: skip
TINY = {
    "tiny": LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=97, max_position_embeddings=256,
    )
}  # fmt: skip
Case = dict[str, Any]
Candidates = dict[str, Callable[[], torch.Tensor]]


def shapes(names: Sequence[str] | None, num_layers: int | None) -> dict[str, PretrainedConfig]:
    found = {name: make() for name, make in _SHAPES.items() if names is None or name in names}
    for config in found.values():
        config.num_hidden_layers = num_layers or config.num_hidden_layers
    return found


def seconds_of(run: Callable[[], Any], device: str, *, is_graphed: bool = True) -> float:
    """The median of 20 runs: on a GPU of a CUDA graph of ten calls, divided by ten."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    num_calls, replay = 1, run
    if is_graphed:
        graph, num_calls = torch.cuda.CUDAGraph(), 10
        with torch.cuda.graph(graph):
            for _ in range(num_calls):
                run()
        replay = graph.replay
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / num_calls)
    return statistics.median(times)


def compiled_call(module: nn.Module, *inputs: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The module through passes and Triton kernels."""
    with torch.no_grad():
        model_graph = _from_exported(_functional(torch.export.export(module, inputs, strict=False)))
    config = parse_options({"codegen": "triton"})
    run_pipeline(model_graph, config.passes)
    program = lower(model_graph, config.codegen)
    elsewhere = [op.op for op in program.ops if op.how != "triton" and op.op != "aten.sym_size"]
    assert not elsewhere, f"no kernel for {elsewhere}"
    bound = program.bind(model_graph.weights)
    return lambda: bound(*inputs)[0]


def compared(
    name: str, candidates: Candidates, exact: torch.Tensor, bound: float, device: str, *, is_graphed: bool = True
) -> Case:
    """Seconds of each candidate, ours first; figures only where the largest error is within ``bound`` of the scale."""
    scale = float(exact.abs().max())
    case: Case = {"case": name, "seconds": {}, "errors": {}, "failures": {}}
    for candidate, run in candidates.items():
        try:
            error = float((run().double() - exact.double()).abs().max()) / scale
            case["errors"][candidate] = error
            if error <= bound:
                case["seconds"][candidate] = seconds_of(run, device, is_graphed=is_graphed)
        except Exception as failure:  # a peer that does not run is told, and the others are still compared
            case["failures"][candidate] = f"{type(failure).__name__}: {str(failure)[:300]}"
    case["is_right"] = "infercomp" in case["seconds"]
    return case


class _Linear(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x0: torch.Tensor) -> torch.Tensor:
        return F.linear(x0, self.weight)


class _SparseLinear(nn.Module):
    def __init__(self, values: torch.Tensor, indices: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values)
        self.register_buffer("indices", indices)

    def forward(self, x0: torch.Tensor) -> torch.Tensor:
        return sparse_weight_linear(x0, self.values, self.indices, None, None)


class _Int8Linear(nn.Module):
    def __init__(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)

    def forward(self, x0: torch.Tensor, x1: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
        return int8_linear(x0, x1, x2, self.weight, self.weight_scale, None, torch.float32)


class _Dense(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x0: torch.Tensor, x1: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
        return attention(x0, x1, x2, scale=self.scale, is_causal=True)


class _Paged(_Dense):
    def forward(  # type: ignore[override]
        self, x0: torch.Tensor, x1: torch.Tensor, x2: torch.Tensor, x3: torch.Tensor, x4: torch.Tensor, x5: torch.Tensor
    ) -> torch.Tensor:
        return paged_attention(x0, x1, x2, x3, x4, x5, scale=self.scale)


def _dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def kernel_cases(name: str, config: PretrainedConfig, device: str, with_inductor: bool) -> Iterator[Case]:
    """Products, int8 products, prefill attention and decoding attention at one model's shapes."""
    torch.manual_seed(0)
    hidden, inner = config.hidden_size, config.intermediate_size
    is_tiny = device == "cpu"
    for num_rows in (1, 70) if is_tiny else (1, 16, 64, 512, 4096):
        for outputs, inputs in ((inner, hidden), (hidden, inner)):
            yield _linear_case(
                f"{name} linear {num_rows}x{inputs}x{outputs}", num_rows, inputs, outputs, device, with_inductor
            )
    for num_rows in (1, 70) if is_tiny else (1, 16, 64, 512, 4096):
        yield _sparse_case(f"{name} 2:4 linear {num_rows}x{hidden}x{inner}", num_rows, hidden, inner, device)
    for num_rows in (20,) if is_tiny else (32, 512, 4096):
        yield _int8_case(f"{name} int8 linear {num_rows}x{hidden}x{inner}", num_rows, hidden, inner, device)
    for length in (20,) if is_tiny else (512, 4096):
        yield _prefill_case(f"{name} attention {length}", config, length, device)
    for batch, length in ((2, 30),) if is_tiny else ((1, 1024), (16, 1024), (16, 8000), (64, 1024)):
        yield _paged_case(f"{name} paged decode {batch}x{length}", config, batch, length, device)


def _linear_case(name: str, rows: int, inputs: int, outputs: int, device: str, with_inductor: bool) -> Case:
    x = torch.randn(rows, inputs, device=device).to(_dtype(device))
    module = _Linear((torch.randn(outputs, inputs, device=device) / inputs**0.5).to(_dtype(device)))
    candidates: Candidates = {
        "infercomp": compiled_call(module, x),
        "cuBLAS" if device == "cuda" else "eager": lambda: F.linear(x, module.weight),
    }
    if with_inductor:
        tuned = torch.compile(module, mode="max-autotune-no-cudagraphs")
        candidates["Inductor max-autotune"] = lambda: tuned(x)
    with torch.no_grad():
        return compared(name, candidates, F.linear(x.double(), module.weight.double()), 1e-2, device)


def _sparse_case(name: str, rows: int, inputs: int, outputs: int, device: str) -> Case:
    """Weights of which two in every four are kept: compressed, dense by the same compiler, and by cuSPARSELt."""
    x = torch.randn(rows, inputs, device=device).to(_dtype(device))
    weight = (torch.randn(outputs, inputs, device=device) / inputs**0.5).to(_dtype(device)).unflatten(1, (-1, 4))
    weight = weight.scatter(2, weight.abs().argsort(2)[..., :2], 0).flatten(1)
    candidates: Candidates = {
        "infercomp": compiled_call(_SparseLinear(*compress_2_of_4(weight)), x),
        "infercomp dense": compiled_call(_Linear(weight), x),
        "cuBLAS dense" if device == "cuda" else "eager": lambda: F.linear(x, weight),
    }
    if device == "cuda":
        semi_structured = torch.sparse.to_sparse_semi_structured(weight)
        candidates["torch semi-structured"] = lambda: F.linear(x, semi_structured)
    with torch.no_grad():
        return compared(name, candidates, F.linear(x.double(), weight.double()), 1e-2, device)


def _int8_case(name: str, rows: int, inputs: int, outputs: int, device: str) -> Case:
    x = torch.randint(-127, 128, (rows, inputs), device=device, dtype=torch.int8)
    weight = torch.randint(-127, 128, (outputs, inputs), device=device, dtype=torch.int8)
    scale, weight_scale = torch.rand(rows, 1, device=device), torch.rand(outputs, device=device)
    module = _Int8Linear(weight, weight_scale)
    sums = x.sum(-1, keepdim=True, dtype=torch.int32)
    exact = (x.double() @ weight.double().T) * scale * weight_scale
    candidates: Candidates = {
        "infercomp": compiled_call(module, x, scale, sums),
        "torch._int_mm": lambda: torch._int_mm(x, weight.T).float() * scale * weight_scale,
    }
    with torch.no_grad():
        return compared(name, candidates, exact, 1e-5, device)


def _prefill_case(name: str, config: PretrainedConfig, length: int, device: str) -> Case:
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    shape = [(1, each, length, dim) for each in (heads, kv_heads, kv_heads)]
    query, key, value = (torch.randn(each, device=device).to(_dtype(device)) for each in shape)
    scale = dim**-0.5
    sdpa = partial(F.scaled_dot_product_attention, is_causal=True, scale=scale, enable_gqa=True)

    def with_backend(backend: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(backend):
            return sdpa(query, key, value)

    candidates: Candidates = {"infercomp": compiled_call(_Dense(scale), query, key, value)}
    peers = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}
    for peer, backend in peers.items() if device == "cuda" else {"SDPA": SDPBackend.MATH}.items():
        candidates[peer] = partial(with_backend, backend)
    exact = attention.definition(query.float(), key.float(), value.float(), scale=scale, is_causal=True)
    with torch.no_grad():
        return compared(name, candidates, exact, 2e-2, device)


def _paged_case(name: str, config: PretrainedConfig, batch: int, length: int, device: str) -> Case:
    """One token of each sequence; SDPA is given its keys in one piece, which no paged cache has."""
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    width, dtype = -(-length // BLOCK_SIZE), _dtype(device)
    tables = torch.randperm(batch * width, device=device).reshape(batch, width)
    caches = [torch.randn(batch * width, BLOCK_SIZE, kv_heads, dim, device=device).to(dtype) for _ in range(2)]
    query = torch.randn(batch, heads, dim, device=device).to(dtype)
    lengths = torch.full((batch,), length, device=device)
    starts = torch.arange(batch + 1, device=device)
    dense = [cache[tables].flatten(1, 2)[:, :length].transpose(1, 2).contiguous() for cache in caches]
    sdpa = partial(F.scaled_dot_product_attention, scale=dim**-0.5, enable_gqa=True)
    exact = attention.definition(query[:, :, None].float(), *(x.float() for x in dense), scale=dim**-0.5)[:, :, 0]
    candidates: Candidates = {
        "infercomp": compiled_call(_Paged(dim**-0.5), query, *caches, tables, lengths, starts),
        "SDPA": lambda: sdpa(query[:, :, None], *dense)[:, :, 0],
    }
    with torch.no_grad():
        return compared(name, candidates, exact, 2e-2, device)


def decode_cases(name: str, config: PretrainedConfig, device: str, with_inductor: bool) -> Iterator[Case]:
    """One decoding step of the whole model at several batch sizes, the host's part included."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=_dtype(device)).eval().requires_grad_(False)
    batches, context = ((1, 3), 20) if device == "cpu" else ((1, 8, 64), 512)
    options = parse_options({"codegen": "triton", "block_size": BLOCK_SIZE, "max_num_seqs": max(batches)})
    served = ServedModel(*compile_for_serving(model, None, options))
    num_blocks = max(batches) * (-(-context // BLOCK_SIZE))
    pools = allocate_pools(served.form.cache_specs, num_blocks + 1, BLOCK_SIZE, device)
    plain = served.with_pools(pools)
    step = served.with_graphs(pools, num_blocks, options.runtime, CudaCapture()) if device == "cuda" else plain
    ids = torch.randint(0, config.vocab_size, (max(batches), context))
    for sequence in range(max(batches)):
        plain(_step_inputs(ids, range(sequence, sequence + 1), 0, context - 1))
    for batch in batches:
        inputs = _step_inputs(ids, range(batch), context - 1, context)
        with torch.inference_mode():
            exact = model(ids[:batch].to(device)).logits[:, -1].float()
        candidates: Candidates = {"infercomp": partial(step, inputs)}
        if with_inductor:
            candidates["Inductor max-autotune"] = _inductor_step(model, ids[:batch].to(device))
        with torch.inference_mode():
            # Graphs are the candidates' own here.
            case = compared(f"{name} decode {batch}x{context}", candidates, exact, 5e-2, device, is_graphed=False)
        yield case | {"tokens_per_second": {who: batch / each for who, each in case["seconds"].items()}}


def _step_inputs(ids: torch.Tensor, sequences: range, start: int, end: int) -> StepInputs:
    """Positions start…end of sequences whose blocks lie one after the other."""
    width, count = -(-ids.shape[1] // BLOCK_SIZE), len(sequences)
    tables = torch.arange(sequences.start * width, sequences.stop * width).reshape(count, width)
    positions = torch.arange(start, end).repeat(count)
    rows = torch.arange(count).repeat_interleave(end - start)
    starts = torch.arange(count + 1) * (end - start)
    return StepInputs(
        input_ids=ids[sequences.start : sequences.stop, start:end].reshape(-1),
        positions=positions,
        slot_mapping=tables[rows, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE,
        block_tables=tables,
        seq_lens=torch.full((count,), end),
        query_start_loc=starts,
        logits_indices=starts[1:] - 1,
    )


def _inductor_step(model: nn.Module, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The same step by Hugging Face's static cache and Inductor with CUDA graphs."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1])
    last = torch.tensor([ids.shape[1] - 1], device=ids.device)
    with torch.inference_mode():
        model(ids[:, :-1], past_key_values=cache, use_cache=True)
    compiled = torch.compile(model, mode="max-autotune", dynamic=False)
    newest, positions = ids[:, -1:].contiguous(), last[None].expand(len(ids), 1)

    def run() -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        logits = compiled(
            input_ids=newest, position_ids=positions, past_key_values=cache, cache_position=last, use_cache=True
        ).logits
        return logits[:, -1].clone()

    return run
