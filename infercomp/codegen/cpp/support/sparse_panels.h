// Products with weights of which two in every four consecutive inputs are kept (sparse_weight_linear, sparse_int8_linear).
//
// A panel is a sequence of blocks of 32 inputs, of which each of its 32 outputs has 16 values: 32 words of places, one an
// output, and up to four steps of 8 inputs, each the 4 values of every output in words as in panel.h. The place of value
// i of step s, which input of its four it is, lies in bits 8 i + 2 s of the word. The last block may have fewer steps.
// One register holds the four activations of a group again and again, and each lane picks its own.
#pragma once

#include "gemm.h"

namespace infercomp {

constexpr int SPARSE_VALUES = 4, SPARSE_STEP = 8, SPARSE_BLOCK = 32;

// Each lane its own of four activations, which its lowest two bits name.
INFERCOMP_INLINE native_f32 pick(const float* activations, native_u32 places) {
#if defined(__AVX512BW__)
    const __m512 group = _mm512_maskz_broadcast_f32x4(0xffff, load<__m128>(activations));
    return (native_f32)_mm512_maskz_permutevar_ps(0xffff, group, (__m512i)places);
#elif defined(__AVX2__)
    const __m128 group = load<__m128>(activations);
    return (native_f32)_mm256_permutevar_ps(_mm256_set_m128(group, group), (__m256i)places);
#else
    native_f32 picked;
    for (int lane = 0; lane < NATIVE_LANES; ++lane) picked[lane] = activations[places[lane] & 3];
    return picked;
#endif
}

// Byte i of each lane is the one of eight activations that bits 8 i and 8 i + 1 name: of the first four for i < 2, of the
// others else.
INFERCOMP_INLINE native_u32 pick_bytes(const uint8_t* activations, native_u32 places) {
    const uint64_t group = load<uint64_t>(activations);
#if defined(__AVX512BW__) || defined(__AVX2__)
    const native_u32 control = (places & 0x03030303u) | 0x04040000u;
#if defined(__AVX512BW__)
    return (native_u32)_mm512_shuffle_epi8(_mm512_set1_epi64(int64_t(group)), (__m512i)control);
#else
    return (native_u32)_mm256_shuffle_epi8(_mm256_set1_epi64x(int64_t(group)), (__m256i)control);
#endif
#else
    native_u32 picked = {};
    for (int lane = 0; lane < NATIVE_LANES; ++lane) {
        for (int i = 0; i < SPARSE_VALUES; ++i) {
            const int place = int(places[lane] >> 8 * i & 3) + i / 2 * 4;
            picked[lane] |= uint32_t(group >> 8 * place & 0xff) << 8 * i;
        }
    }
    return picked;
#endif
}

// Bytes as they are, where INT8Words wants weight + 128.
struct SignedINT8Words {
    static constexpr int PER_WORD = 4;
    INFERCOMP_INLINE native_f32 weight(native_u32 words, int i, int v) const {
        return INT8Words{}.weight(words ^ 0x80808080u, i, v);
    }
};

// Beside the sums, weights and their places take registers, so that fewer rows share them than of dense weights.
constexpr int SPARSE_ROWS = NATIVE_REGISTERS > 16 ? ROWS_IN_PASSES : 4;

// add_step(first input, words of values, places) for each step, the places shifted to their lowest bits. `words` starts
// at the first of the registers of outputs that are taken.
template <int ROWS, int VECTORS, int WORDS, class AddStep>
INFERCOMP_INLINE void for_each_step(const uint32_t* words, int64_t k, AddStep add_step) {
    for (int64_t block = 0; block < k; block += SPARSE_BLOCK) {
        native_u32 places[VECTORS];
        prefetch_words<ROWS, VECTORS>(words);
        load_words(words, places);
        words += PANEL;
        const int64_t end = k - block < SPARSE_BLOCK ? k : block + SPARSE_BLOCK;
        for (int64_t first = block; first < end; first += SPARSE_STEP) {
            INFERCOMP_UNROLL
            for (int word = 0; word < WORDS; ++word) prefetch_words<ROWS, VECTORS>(words + word * PANEL);
            add_step(first, words, places);
            words += WORDS * PANEL;
            INFERCOMP_UNROLL
            for (int v = 0; v < VECTORS; ++v) places[v] >>= 2;
        }
    }
}

constexpr int64_t sparse_panel_bytes(int64_t k, int64_t value_bytes) {
    return (k + SPARSE_BLOCK - 1) / SPARSE_BLOCK * PANEL * 4 + k / 2 * PANEL * value_bytes;
}

// Values of any width times floats; k is a multiple of 8. Scales of whole outputs are the caller's to apply.
template <class Words, class Activation>
struct SparseWeightPanels {
    using activation = Activation;
    using accumulator = float;
    using Widened = SparseWeightPanels<Words, float>;
    static constexpr int MAX_ROWS = SPARSE_ROWS, PANELS_OF_ONE_ROW = 1;
    static constexpr int STEP_WORDS = SPARSE_VALUES / Words::PER_WORD;

    static constexpr int64_t panel_bytes(int64_t k) { return sparse_panel_bytes(k, 4 / Words::PER_WORD); }

    template <int ROWS>
    __attribute__((noinline)) static void multiply(const float* rows, int64_t row_stride, const void* panel, int64_t k,
                                                   float (*tile)[PANEL]) {
        constexpr int VECTORS = vectors_of_pass<ROWS>();
        for (int first = 0; first < PANEL_VECTORS; first += VECTORS) {
            const uint32_t* words = static_cast<const uint32_t*>(panel) + first * NATIVE_LANES;
            native_f32 sums[ROWS][VECTORS] = {};
            add_products<ROWS>(rows, row_stride, words, k, sums);
            store_tile(sums, tile, first);
        }
    }

private:
    template <int ROWS, int VECTORS>
    INFERCOMP_INLINE static void add_products(const float* rows, int64_t row_stride, const uint32_t* panel, int64_t k,
                                              native_f32 (&sums)[ROWS][VECTORS]) {
        for_each_step<ROWS, VECTORS, STEP_WORDS>(
            panel, k,
            [&](int64_t first, const uint32_t* words, const native_u32(&places)[VECTORS]) INFERCOMP_INLINE_LAMBDA {
                const char* activations = reinterpret_cast<const char*>(rows + first);
                INFERCOMP_UNROLL
                for (int i = 0; i < SPARSE_VALUES; ++i) {
                    INFERCOMP_UNROLL
                    for (int v = 0; v < VECTORS; ++v) {
                        const uint32_t* source = words + i / Words::PER_WORD * PANEL + v * NATIVE_LANES;
                        const native_f32 weights = Words{}.weight(load<native_u32>(source), i % Words::PER_WORD, v);
                        const native_u32 shifted = places[v] >> 8 * i;
                        INFERCOMP_UNROLL
                        for (int row = 0; row < ROWS; ++row) {
                            const char* group = activations + row * row_stride * 4 + i / 2 * 16;
                            sums[row][v] += weights * pick(reinterpret_cast<const float*>(group), shifted);
                        }
                        // Else GCC keeps each group for the next register of outputs, and has no room for so many.
                        if constexpr (ROWS > 2) asm volatile("" : : : "memory");
                    }
                }
            });
    }
};

// INT8 times INT8, exactly. Activations are stored as activation + 128, so 128 · Σ values is taken off again.
struct SparseUINT8Panels {
    using activation = uint8_t;
    using accumulator = int32_t;
    static constexpr int MAX_ROWS = ROWS_IN_PASSES, PANELS_OF_ONE_ROW = 1;

    static constexpr int64_t panel_bytes(int64_t k) { return sparse_panel_bytes(k, 1); }

    template <int ROWS>
    __attribute__((noinline)) static void multiply(const uint8_t* rows, int64_t row_stride, const void* panel, int64_t k,
                                                   const int32_t*, int32_t (*tile)[PANEL]) {
        constexpr int VECTORS = vectors_of_pass<ROWS>();
        for (int first = 0; first < PANEL_VECTORS; first += VECTORS) {
            const uint32_t* words = static_cast<const uint32_t*>(panel) + first * NATIVE_LANES;
            native_i32 sums[ROWS][VECTORS] = {}, excess[VECTORS] = {};
            add_products<ROWS>(rows, row_stride, words, k, sums, excess);
            INFERCOMP_UNROLL
            for (int row = 0; row < ROWS; ++row) {
                INFERCOMP_UNROLL
                for (int v = 0; v < VECTORS; ++v) sums[row][v] -= excess[v];
            }
            store_tile(sums, tile, first);
        }
    }

private:
    template <int ROWS, int VECTORS>
    INFERCOMP_INLINE static void add_products(const uint8_t* rows, int64_t row_stride, const uint32_t* panel, int64_t k,
                                              native_i32 (&sums)[ROWS][VECTORS], native_i32 (&excess)[VECTORS]) {
        for_each_step<ROWS, VECTORS, 1>(
            panel, k,
            [&](int64_t first, const uint32_t* words, const native_u32(&places)[VECTORS]) INFERCOMP_INLINE_LAMBDA {
                native_u32 values[VECTORS];
                load_words(words, values);
                INFERCOMP_UNROLL
                for (int v = 0; v < VECTORS; ++v) {
                    excess[v] = add_dot_int8(excess[v], 0x80808080u - native_u32{}, reinterpret<native_i32>(values[v]));
                }
                INFERCOMP_UNROLL
                for (int row = 0; row < ROWS; ++row) {
                    INFERCOMP_UNROLL
                    for (int v = 0; v < VECTORS; ++v) {
                        const native_u32 picked = pick_bytes(rows + row * row_stride + first, places[v]);
                        sums[row][v] = add_dot_int8(sums[row][v], picked, reinterpret<native_i32>(values[v]));
                    }
                }
            });
    }
};

struct SparseINT8Panels : SparseUINT8Panels {
    using activation = int8_t;
    using Widened = SparseUINT8Panels;
};

}  // namespace infercomp
