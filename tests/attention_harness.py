"""A library with the attention kernels for tests to call, and how results are compared."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import infercomp.codegen.cpp
from infercomp.codegen.cpp.toolchain import BITS_OF_SUMS
from infercomp.codegen.ops import attention

SUPPORT = Path(infercomp.codegen.cpp.__file__).parent / "support"

HARNESS = """
#include <cstdint>
#include <cstdlib>
#if defined(PRETEND_BFLOAT16_PRODUCTS)
#include <immintrin.h>
#define __AVX512BF16__ 1
static __m512 pretended_products(__m512 sums, __m512bh left, __m512bh right) {
    uint32_t a[16], b[16];
    __builtin_memcpy(a, &left, 64);
    __builtin_memcpy(b, &right, 64);
    for (int lane = 0; lane < 16; ++lane) {
        float x[4];
        const uint32_t words[4] = {a[lane] << 16, a[lane] & 0xffff0000u, b[lane] << 16, b[lane] & 0xffff0000u};
        __builtin_memcpy(x, words, 16);
        sums[lane] += x[0] * x[2] + x[1] * x[3];
    }
    return sums;
}
#define _mm512_dpbf16_ps pretended_products
#endif

#include "attention.h"

using namespace infercomp;

// Each task gets scratch full of NaN. Tasks run last to first if asked: no order may matter.
template <class Problem>
void run_all(const Problem& problem, bool backwards) {
    const size_t bytes = (scratch_bytes(problem) + 63) / 64 * 64;
    char* scratch = static_cast<char*>(std::aligned_alloc(64, bytes + 64));
    const int64_t count = num_tasks(problem);
    for (int64_t i = 0; i < count; ++i) {
        std::memset(scratch, 0xff, bytes);
        std::memset(scratch + bytes, 0x5a, 64);
        run_task(problem, backwards ? count - 1 - i : i, scratch);
        for (int j = 0; j < 64; ++j) if (scratch[bytes + j] != 0x5a) std::abort();
    }
    std::free(scratch);
}

template <class T, class C = T>
void paged(void* const* p, const int64_t* n, const float* f) {
    PagedAttention<T, C> a;
    a.query = static_cast<const T*>(p[0]);
    a.key_cache = static_cast<const C*>(p[1]);
    a.value_cache = static_cast<const C*>(p[2]);
    a.output = static_cast<T*>(p[3]);
    a.block_tables = static_cast<const int64_t*>(p[4]);
    a.seq_lens = static_cast<const int64_t*>(p[5]);
    a.query_start_loc = static_cast<const int64_t*>(p[6]);
    a.alibi_slopes = static_cast<const float*>(p[7]);
    a.sinks = static_cast<const float*>(p[8]);
    a.key_scale = static_cast<const float*>(p[9]);
    a.value_scale = static_cast<const float*>(p[10]);
    a.query_token_stride = n[0];
    a.query_head_stride = n[1];
    a.output_token_stride = n[2];
    a.block_table_stride = n[3];
    a.tokens = n[4];
    a.sequences = n[5];
    a.query_heads = n[6];
    a.kv_heads = n[7];
    a.head_dim = n[8];
    a.value_dim = n[9];
    a.block_size = n[10];
    a.sliding_window = n[11];
    a.scale = f[0];
    a.logit_softcap = f[1];
    run_all(a, n[12]);
}

template <class T>
void dense(void* const* p, const int64_t* n, const float* f) {
    DenseAttention<T> a;
    a.query = static_cast<const T*>(p[0]);
    a.key = static_cast<const T*>(p[1]);
    a.value = static_cast<const T*>(p[2]);
    a.output = static_cast<T*>(p[3]);
    a.bias = p[4];
    a.alibi_slopes = static_cast<const float*>(p[5]);
    a.sinks = static_cast<const float*>(p[6]);
    std::copy(n, n + 3, a.query_strides);
    std::copy(n + 3, n + 6, a.key_strides);
    std::copy(n + 6, n + 9, a.value_strides);
    std::copy(n + 9, n + 12, a.output_strides);
    std::copy(n + 12, n + 16, a.bias_strides);
    a.batch = n[16];
    a.query_heads = n[17];
    a.kv_heads = n[18];
    a.queries = n[19];
    a.keys = n[20];
    a.head_dim = n[21];
    a.value_dim = n[22];
    a.is_causal = n[23];
    a.bias_kind = BiasKind(n[24]);
    a.sliding_window = n[25];
    a.scale = f[0];
    a.logit_softcap = f[1];
    run_all(a, n[26]);
}

template <class T>
void write_kv(void* const* p, const int64_t* n) {
    WriteKV<T> w;
    w.key = static_cast<const T*>(p[0]);
    w.value = static_cast<const T*>(p[1]);
    w.key_cache = static_cast<T*>(p[2]);
    w.value_cache = static_cast<T*>(p[3]);
    w.slot_mapping = static_cast<const int64_t*>(p[4]);
    w.tokens = n[0];
    w.key_token_stride = n[1];
    w.key_head_stride = n[2];
    w.value_token_stride = n[3];
    w.value_head_stride = n[4];
    w.kv_heads = n[5];
    w.head_dim = n[6];
    w.value_dim = n[7];
    w.block_size = n[8];
    for (int64_t task = num_tasks(w); task-- > 0;) run_task(w, task);
}

extern "C" {
void paged_float32(void* const* p, const int64_t* n, const float* f) { paged<float>(p, n, f); }
void paged_bfloat16(void* const* p, const int64_t* n, const float* f) { paged<bf16>(p, n, f); }
void paged_float32_int8(void* const* p, const int64_t* n, const float* f) { paged<float, int8_t>(p, n, f); }
void paged_bfloat16_int8(void* const* p, const int64_t* n, const float* f) { paged<bf16, int8_t>(p, n, f); }
void dense_float32(void* const* p, const int64_t* n, const float* f) { dense<float>(p, n, f); }
void dense_bfloat16(void* const* p, const int64_t* n, const float* f) { dense<bf16>(p, n, f); }
void write_kv_float32(void* const* p, const int64_t* n) { write_kv<float>(p, n); }
void write_kv_bfloat16(void* const* p, const int64_t* n) { write_kv<bf16>(p, n); }
}
"""

COMPILE = ["g++", "-std=c++17", "-fPIC", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", BITS_OF_SUMS]
COMPILE += ["-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-iquote", str(SUPPORT)]
# Less than this machine has is built with less effort: only its results matter here.
VARIANTS = {"native": ["-O3", "-march=native", "-mprefer-vector-width=512"]}
if platform.machine() == "x86_64":
    VARIANTS |= {"avx2": ["-O2", "-mavx2", "-mfma", "-mtune=znver3"], "portable": ["-O1"]}
# The code for machines that multiply pairs of bfloat16, where the machine has all of AVX-512 but these instructions.
PRETENDING = ["-O1", "-march=native", "-DPRETEND_BFLOAT16_PRODUCTS"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def call(function: Callable[..., None], tensors: list[Tensor | None], numbers: list[int], *floats: float) -> None:
    pointers = (ctypes.c_void_p * len(tensors))(*[None if t is None else t.data_ptr() for t in tensors])
    arguments = [pointers, (ctypes.c_int64 * len(numbers))(*numbers)]
    if floats:
        arguments.append((ctypes.c_float * len(floats))(*floats))
    function(*arguments)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def pair(dtype: torch.dtype) -> int:
    return 4 // dtype.itemsize


@dataclass(frozen=True)
class Options:
    scale: float = 0.3
    sliding_window: int | None = None
    logit_softcap: float | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None

    def definition(self, *operands: Tensor, dtype: torch.dtype, bias: Tensor | None = None, is_causal: bool) -> Tensor:
        """The op itself in another dtype; keys and values that are restored from codes are float32 at least."""
        convert = lambda t: t if t is None or t.dtype == torch.bool else t.to(dtype)  # noqa: E731
        query, key, value = (
            t if t.dtype == torch.float32 and dtype == torch.bfloat16 else t.to(dtype) for t in operands
        )
        return attention.definition(
            query, key, value, convert(bias), convert(self.alibi_slopes), convert(self.sinks),
            scale=self.scale, sliding_window=self.sliding_window, logit_softcap=self.logit_softcap, is_causal=is_causal,
        )  # fmt: skip


def is_right(output: Tensor, operands: list[Tensor], options: Options, **kwargs: object) -> bool:
    """At most twice as far from float64 as the definition in the same dtype, plus what any right kernel may be off:
    scores by some roundings of their products, probabilities by a few ulp or by rounding to bfloat16."""
    if not output.numel():
        return True
    exact = options.definition(*operands, dtype=torch.float64, **kwargs)
    same = options.definition(*operands, dtype=operands[0].dtype, **kwargs)
    query, key, value = operands
    size = options.definition(query, key, value.abs(), dtype=torch.float64, **kwargs)
    products = query.double().norm(dim=-1).max() * key.double().norm(dim=-1).max() * abs(options.scale)
    extra = 2.0**-22 * (8 + 2 * products) + (2.0**-8 if query.dtype == torch.bfloat16 else 0)
    miss = (output.double() - exact).abs()
    allowed = 2 * (same.double() - exact).abs().max() + extra * size + 1e-30
    return bool((miss <= allowed).all())
