"""The matrix kernels of gemm.h against float64 and int64, built for this machine and for instruction sets with less."""

from __future__ import annotations

import ctypes
import platform
import subprocess
from pathlib import Path

import pytest
import torch
from codegen.cpp.gemm_cases import FORMATS, SEEDS, SHAPES, Case, draw_case, pointer, poisoned
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import infercomp.codegen.cpp
from infercomp.codegen import sparse_group_panels, sparse_panels, weight_panels
from infercomp.codegen.cpp.toolchain import BITS_OF_SUMS
from infercomp.codegen.group_panels import pack_group_panels
from infercomp.codegen.sparse_panels import pack_sparse_panels
from infercomp.codegen.sparse_weights import kept_channels
from infercomp.codegen.weight_panels import PANEL, grouped, plain_row_order

SUPPORT = Path(infercomp.codegen.cpp.__file__).parent / "support"

# A product in blocks of at most `block` rows, each panel's tile copied to its place in the output.
HARNESS = """
#include "product.h"
using namespace infercomp;

template <class Format, class... RowSums>
void product(int num_rows, const void* rows, int64_t row_stride, const char* panels, int num_panels, int64_t k,
             int block, void* output, RowSums... row_sums) {
    using Accumulator = typename Format::accumulator;
    const auto* activations = static_cast<const typename Format::activation*>(rows);
    for (int panel = 0; panel < num_panels; ++panel) {
        for (int first = 0; first < num_rows; first += block) {
            const int count = num_rows - first < block ? num_rows - first : block;
            Accumulator tile[Format::MAX_ROWS][PANEL];
            multiply_rows<Format>(count, activations + first * row_stride, row_stride,
                                  panels + panel * Format::panel_bytes(k), k, row_sums(first)..., tile);
            for (int row = 0; row < count; ++row) {
                std::memcpy(static_cast<Accumulator*>(output) + ((first + row) * num_panels + panel) * PANEL, tile[row],
                            sizeof(tile[row]));
            }
        }
    }
}

// The same with the rows as a task prepares them.
template <class Format, class... RowSums>
void prepared_product(int num_rows, const void* rows, int64_t row_stride, const char* panels, int num_panels, int64_t k,
                      int block, void* output, RowSums... row_sums) {
    using From = typename Format::activation;
    using Multiplied = typename WidenedOf<Format>::type;
    const Product shape{num_rows, num_panels, k, row_stride, 1};
    const auto* prepared = prepared_rows<From, typename Multiplied::activation>(
        static_cast<const From*>(rows), num_rows, shape, row_stride);
    product<Multiplied>(num_rows, prepared, row_stride, panels, num_panels, k, block, output, row_sums...);
}

// The same cut into tasks.
template <class Format>
void product_in_tasks(int num_rows, const void* rows, int64_t row_stride, const uint8_t* panels, int num_panels,
                      int64_t k, char* output, const int32_t* sums, int64_t sums_stride) {
    const Product shape{num_rows, num_panels, k, row_stride, sums_stride};
    const auto* activations = static_cast<const typename Format::activation*>(rows);
    for (int64_t task = 0; task < num_product_tasks<Format, Panels>(shape); ++task) {
        run_product_task<Format>(shape, task, activations, sums, Panels{panels},
            [=](int64_t row, int64_t panel, const auto* products) {
                std::memcpy(output + (row * num_panels + panel) * PANEL * 4, products, PANEL * 4);
            });
    }
}

#define EXPORT(name, ...) \\
    extern "C" int name##_max_rows() { return __VA_ARGS__::MAX_ROWS; } \\
    extern "C" int64_t name##_panel_bytes(int64_t k) { return __VA_ARGS__::panel_bytes(k); } \\
    extern "C" void name(int num_rows, const void* rows, int64_t row_stride, const char* panels, int num_panels, \\
                         int64_t k, int block, void* output, const int32_t* sums, int64_t sums_stride)
#define EXPORT_FLOAT(name, ...) \\
    EXPORT(name, __VA_ARGS__) { \\
        (void)sums, (void)sums_stride; \\
        product<__VA_ARGS__>(num_rows, rows, row_stride, panels, num_panels, k, block, output); \\
    }
#define EXPORT_INT(name, ...) \\
    EXPORT(name, __VA_ARGS__) { \\
        const auto sums_from = [=](int row) { return sums + row * sums_stride; }; \\
        product<__VA_ARGS__>(num_rows, rows, row_stride, panels, num_panels, k, block, output, sums_from); \\
    }

#define EXPORT_PREPARED_FLOAT(name, ...) \\
    EXPORT(name, __VA_ARGS__) { \\
        (void)sums, (void)sums_stride; \\
        prepared_product<__VA_ARGS__>(num_rows, rows, row_stride, panels, num_panels, k, block, output); \\
    }
#define EXPORT_PREPARED_INT(name, ...) \\
    EXPORT(name, __VA_ARGS__) { \\
        const auto sums_from = [=](int row) { return sums + row * sums_stride; }; \\
        prepared_product<__VA_ARGS__>(num_rows, rows, row_stride, panels, num_panels, k, block, output, sums_from); \\
    }

EXPORT_FLOAT(f32, F32Panels)
EXPORT_FLOAT(bf16_panels, BF16Panels)
EXPORT_INT(int8, INT8Panels)
EXPORT_PREPARED_INT(int8_prepared, INT8Panels)
EXPORT_FLOAT(int8_weights_bf16, INT8WeightPanels<bf16>)
EXPORT_INT(int3_g64, GroupPanels<3, 64, Zeros::MIDDLE>)
EXPORT_INT(int4_g32_zp, GroupPanels<4, 32, Zeros::POINTS>)
EXPORT_INT(int4_g32_zv, GroupPanels<4, 32, Zeros::VALUES>)
EXPORT_INT(int4_g64, GroupPanels<4, 64, Zeros::MIDDLE>)
EXPORT_INT(int8_g32, GroupPanels<8, 32, Zeros::MIDDLE>)
EXPORT_FLOAT(int3_weights_g64, GroupWeightPanels<3, 64, Zeros::MIDDLE, float>)
EXPORT_FLOAT(int3_weights_g32_zp_bf16, GroupWeightPanels<3, 32, Zeros::POINTS, bf16>)
EXPORT_FLOAT(int4_weights_g32_zp, GroupWeightPanels<4, 32, Zeros::POINTS, float>)
EXPORT_FLOAT(int4_weights_g32_zv_bf16, GroupWeightPanels<4, 32, Zeros::VALUES, bf16>)
EXPORT_FLOAT(int4_weights_g128_bf16, GroupWeightPanels<4, 128, Zeros::MIDDLE, bf16>)
EXPORT_FLOAT(int8_weights_g32, GroupWeightPanels<8, 32, Zeros::MIDDLE, float>)
EXPORT_FLOAT(sparse_f32, SparseWeightPanels<FloatWords, float>)
EXPORT_PREPARED_FLOAT(sparse_bf16, SparseWeightPanels<BF16Words, bf16>)
EXPORT_FLOAT(sparse_int8_weights, SparseWeightPanels<SignedINT8Words, float>)
EXPORT_PREPARED_INT(sparse_int8, SparseINT8Panels)
EXPORT_FLOAT(sparse_int4_g32_zp, SparseGroupWeightPanels<4, 32, Zeros::POINTS, float>)
EXPORT_PREPARED_FLOAT(sparse_int4_g64_bf16, SparseGroupWeightPanels<4, 64, Zeros::MIDDLE, bf16>)
EXPORT_FLOAT(sparse_int8_g96, SparseGroupWeightPanels<8, 96, Zeros::MIDDLE, float>)

#define EXPORT_IN_TASKS(name, ...) \\
    extern "C" void name##_in_tasks(int num_rows, const void* rows, int64_t row_stride, const uint8_t* panels, \\
                                    int num_panels, int64_t k, int, char* output, const int32_t* sums, \\
                                    int64_t sums_stride) { \\
        product_in_tasks<__VA_ARGS__>(num_rows, rows, row_stride, panels, num_panels, k, output, sums, sums_stride); \\
    }

EXPORT_IN_TASKS(f32, F32Panels)
EXPORT_IN_TASKS(bf16_panels, BF16Panels)
EXPORT_IN_TASKS(int8, INT8Panels)
EXPORT_IN_TASKS(int3_g64, GroupPanels<3, 64, Zeros::MIDDLE>)
EXPORT_IN_TASKS(int4_g32_zp, GroupPanels<4, 32, Zeros::POINTS>)
EXPORT_IN_TASKS(int4_g32_zv, GroupPanels<4, 32, Zeros::VALUES>)

template <class Format, class Source>
void unpacked(int num_rows, const void* rows, int64_t row_stride, const Source& weight, int64_t k, float* panel,
              float (*tile)[PANEL]) {
    pack_panel(weight, k, panel);
    const auto* activations = static_cast<const typename Format::activation*>(rows);
    for (int first = 0; first < num_rows; first += Format::MAX_UNPACKED_ROWS) {
        const int count = num_rows - first < Format::MAX_UNPACKED_ROWS ? num_rows - first : Format::MAX_UNPACKED_ROWS;
        multiply_unpacked_rows<Format>(count, activations + first * row_stride, row_stride, weight, k, tile + first);
    }
}

#define EXPORT_UNPACKED(name, T, ...) \\
    extern "C" void rows_##name(int num_rows, const void* rows, int64_t row_stride, const T* const* weight, \\
                                int64_t k, float* panel, float (*tile)[PANEL]) { \\
        unpacked<__VA_ARGS__>(num_rows, rows, row_stride, WeightRows<T>{weight}, k, panel, tile); \\
    } \\
    extern "C" void columns_##name(int num_rows, const void* rows, int64_t row_stride, const T* first, \\
                                   int first_count, const T* second, int second_count, int64_t weight_stride, \\
                                   int64_t k, float* panel, float (*tile)[PANEL]) { \\
        const WeightColumns<T> weight{{{first, first_count}, {second, second_count}}, weight_stride}; \\
        unpacked<__VA_ARGS__>(num_rows, rows, row_stride, weight, k, panel, tile); \\
    }

EXPORT_UNPACKED(f32, float, F32Panels)
EXPORT_UNPACKED(bf16_panels, bf16, BF16Panels)
"""

COMPILE = ["c++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-fPIC", BITS_OF_SUMS, f"-I{SUPPORT}"]
VARIANTS = {"native": ["-O2", "-march=native"], "portable": ["-O1"]}
if platform.machine() == "x86_64" and " avx2 " in Path("/proc/cpuinfo").read_text():
    # Tuned for a processor that GCC avoids chains of fused sums on.
    VARIANTS["avx2"] = ["-O2", "-mavx2", "-mfma", "-mtune=znver3"]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ctypes.CDLL]:
    """The harness for each variant, compiled side by side."""
    folder = tmp_path_factory.mktemp("gemm")
    (folder / "harness.cpp").write_text(HARNESS)
    builds = {
        name: subprocess.Popen([*COMPILE, *flags, "-shared", "harness.cpp", "-o", f"{name}.so"], cwd=folder)
        for name, flags in VARIANTS.items()
    }
    assert [build.wait() for build in builds.values()] == [0] * len(builds)
    return {name: ctypes.CDLL(str(folder / f"{name}.so")) for name in VARIANTS}


@pytest.fixture(params=list(VARIANTS))
def library(request: pytest.FixtureRequest, libraries: dict[str, ctypes.CDLL]) -> ctypes.CDLL:
    return libraries[request.param]


@pytest.mark.parametrize("kernel", FORMATS)
@settings(max_examples=12)
@given(shape=SHAPES, block=st.integers(1, 30))
def test_product_and_its_bits(
    kernel: str, libraries: dict[str, ctypes.CDLL], shape: tuple[int, int, int, bool, int], block: int
) -> None:
    """Right for every build, and the same bits for every number of rows multiplied together."""
    case = draw_case(kernel, shape)
    for name, library in libraries.items():
        max_rows = getattr(library, kernel + "_max_rows")()
        whole = case.product(library, kernel)
        assert case.is_right(whole), name
        assert torch.equal(whole, case.product(library, kernel, block=min(block, max_rows))), name
        last = slice(len(case.rows) - 1, None)
        assert torch.equal(whole[last], case.product(library, kernel, rows=last)), name


@pytest.mark.parametrize("kernel", ["f32", "bf16_panels", "int8", "int3_g64", "int4_g32_zp", "int4_g32_zv"])
@settings(max_examples=12)
@given(shape=st.tuples(st.sampled_from([1, 1, 2, 9]), st.integers(1, 400), st.integers(1, 150), st.just(False), SEEDS))
def test_tasks_make_every_panel(
    kernel: str, libraries: dict[str, ctypes.CDLL], shape: tuple[int, int, int, bool, int]
) -> None:
    """A row has the same bits whether its panels are read one by one or two side by side."""
    case = draw_case(kernel, shape)
    for name, library in libraries.items():
        assert torch.equal(case.product(library, kernel), case.product(library, kernel, entry="_in_tasks")), name


@pytest.mark.parametrize("kernel", ["int8", "int4_g64", "int8_g32"])
def test_long_sums_of_the_largest_values(kernel: str, library: ctypes.CDLL) -> None:
    """What would saturate or wrap, does so here: 4,096 products of -128 with the weight furthest from zero."""
    k, n = 4096, 32
    rows = torch.full((3, k), -128, dtype=torch.int8)
    order = plain_row_order(n)
    if kernel == "int8":
        weight = torch.full((n, k), 127, dtype=torch.int8)
        panels, groups = weight_panels.pack_int8_panels(weight, order), 1
    else:
        panel_format = FORMATS[kernel]
        bits, groups, middle = panel_format.bits, k // panel_format.group, 1 << (panel_format.bits - 1)
        weight = torch.full((n, k), middle - 1)
        scales = torch.ones(n, groups, dtype=torch.float16)
        panels = pack_group_panels(bits, (weight + middle).to(torch.uint8), scales, None, order)
    row_sums = rows.unflatten(1, (groups, -1)).sum(2, dtype=torch.int32)
    case = Case(rows, panels, order, row_sums, weight.double(), 0.0)
    assert case.is_right(case.product(library, kernel))


@pytest.mark.parametrize("kernel", FORMATS)
def test_swapped_inputs_are_caught(kernel: str, library: ctypes.CDLL) -> None:
    """A kernel that takes two neighbouring activations for each other fails the check that the others pass."""
    case = draw_case(kernel, (7, 40, 128, False, 3))
    k = case.rows.shape[1]
    swapped = torch.arange(k).view(-1, 2).flip(1).flatten()
    case.rows.copy_(case.rows[:, swapped].clone())
    wrong = case.product(library, kernel)
    case.rows.copy_(case.rows[:, swapped].clone())
    assert case.is_right(case.product(library, kernel))
    assert not case.is_right(wrong)


@pytest.mark.parametrize("kernel", [name for name in FORMATS if name.startswith("sparse")])
def test_a_place_off_by_one_is_caught(
    kernel: str, libraries: dict[str, ctypes.CDLL], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: each value is packed as if it were one input further in its group of four."""
    case = draw_case(kernel, (3, 40, 72, False, 1))
    assert case.is_right(case.product(libraries["native"], kernel))
    for module in (sparse_panels, sparse_group_panels):
        monkeypatch.setattr(module, "kept_channels", lambda indices: kept_channels(indices) + 1 & 3)
    case = draw_case(kernel, (3, 40, 72, False, 1))
    assert not case.is_right(case.product(libraries["native"], kernel))


@pytest.mark.parametrize("kernel", FORMATS)
def test_panel_bytes(kernel: str, library: ctypes.CDLL) -> None:
    """Python and C++ agree on them, packing makes as many, and every panel starts on a cache line."""
    for k in (128, 131, 384):
        case = draw_case(kernel, (1, 33, k, False, 0))
        k = case.rows.shape[1]
        num_bytes = FORMATS[kernel].panel_bytes(k)
        counted = getattr(library, kernel + "_panel_bytes")
        counted.restype = ctypes.c_int64
        assert counted(ctypes.c_int64(k)) == num_bytes == case.panels[0].numel() * case.panels.element_size()
        assert num_bytes % 64 == 0 and case.panels.data_ptr() % 64 == 0


UNPACKED = {"f32": torch.float32, "bf16_panels": torch.bfloat16}


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


def draw_unpacked(kernel: str, shape: tuple[int, int, int, bool, int]) -> tuple[Case, Tensor]:
    """A case, and its weight [N, K] in the dtype of the kernel."""
    case = draw_case(kernel, shape)
    return case, case.weight.to(UNPACKED[kernel])


def int64s(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]


@pytest.mark.parametrize("kernel", UNPACKED)
@settings(max_examples=15)
@given(shape=SHAPES)
def test_rows_in_their_owners_memory(
    kernel: str, libraries: dict[str, ctypes.CDLL], shape: tuple[int, int, int, bool, int]
) -> None:
    """Packed on the fly: the bytes packed ahead of time. Multiplied without packing: the bits of the packed product."""
    case, weight = draw_unpacked(kernel, shape)
    weight = poisoned(weight, float("nan"))
    num_rows, k = case.rows.shape
    row_bytes = weight.stride(0) * weight.element_size()
    for name, library in libraries.items():
        expected = case.product(library, kernel)
        packed = torch.full_like(case.panels, float("nan"))
        for index, lanes in enumerate(case.row_order.view(-1, PANEL)):
            pointers = (ctypes.c_void_p * PANEL)(
                *[weight.data_ptr() + row * row_bytes if row >= 0 else None for row in lanes.tolist()]
            )
            tile = torch.empty(num_rows, PANEL)
            activations = num_rows, pointer(case.rows), *int64s(case.rows.stride(0))
            target = pointer(packed[index]), pointer(tile)
            getattr(library, f"rows_{kernel}")(*activations, pointers, *int64s(k), *target)
            assert torch.equal(tile, expected[:, index * PANEL : (index + 1) * PANEL]), name
        assert torch.equal(bits(packed), bits(case.panels)), name


@pytest.mark.parametrize("kernel", UNPACKED)
@settings(max_examples=15)
@given(shape=SHAPES)
def test_columns_in_their_owners_memory(
    kernel: str, libraries: dict[str, ctypes.CDLL], shape: tuple[int, int, int, bool, int]
) -> None:
    """A weight stored [K, N] gives what its transpose gives that is packed ahead of time."""
    case, weight = draw_unpacked(kernel, shape)
    weight = poisoned(weight.T.contiguous(), float("nan"))
    num_rows, k = case.rows.shape
    for name, library in libraries.items():
        expected = case.product(library, kernel)
        packed = torch.full_like(case.panels, float("nan"))
        for index, lanes in enumerate(case.row_order.view(-1, 2, PANEL // 2)):
            halves: list[ctypes.c_void_p | int] = []
            for half in lanes:
                first = max(int(half[0]), 0)
                halves += [ctypes.c_void_p(weight[:, first:].data_ptr()), int((half >= 0).sum())]
            tile = torch.empty(num_rows, PANEL)
            activations = num_rows, pointer(case.rows), *int64s(case.rows.stride(0))
            target = pointer(packed[index]), pointer(tile)
            getattr(library, f"columns_{kernel}")(*activations, *halves, *int64s(weight.stride(0), k), *target)
            assert torch.equal(tile, expected[:, index * PANEL : (index + 1) * PANEL]), name
        assert torch.equal(bits(packed), bits(case.panels)), name


def test_sets_this_machine_may_lack_compile(tmp_path: Path) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("the instruction sets of x86-64")
    (tmp_path / "harness.cpp").write_text(HARNESS)
    for flags in (["-march=cooperlake"], ["-mavx2", "-mfma", "-mavxvnni"], ["-mavx512f", "-mavx512bw"]):
        subprocess.run([*COMPILE, *flags, "-fsyntax-only", "harness.cpp"], cwd=tmp_path, check=True)


def test_bad_operands_are_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        weight_panels.pack_float_panels(torch.zeros(4, 4, dtype=torch.float64), plain_row_order(4))
    with pytest.raises(ValueError, match="uint8"):
        weight_panels.pack_int8_panels(torch.zeros(4, 4, dtype=torch.uint8), plain_row_order(4))
    with pytest.raises(ValueError, match="does not fill panels"):
        weight_panels.pack_float_panels(torch.zeros(4, 4), torch.arange(4))
    with pytest.raises(ValueError, match="groups of 64"):
        grouped(4, 64, "middle").panel_bytes(96)
    with pytest.raises(ValueError, match="multiple of 32"):
        grouped(4, 48, "middle")
    with pytest.raises(ValueError, match="multiples of 8"):
        weight_panels.sparse(weight_panels.F32).panel_bytes(12)
    with pytest.raises(ValueError, match="hold torch"):
        pack_sparse_panels(torch.zeros(4, 4), torch.zeros(4, 1), FORMATS["sparse_int8"], plain_row_order(4))
