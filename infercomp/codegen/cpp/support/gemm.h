// Matrix products of a few rows with a weight in panels: the formats, and the entry points for any number of rows.
// panel.h says what a panel is.
#pragma once

#include "widening_panels.h"

namespace infercomp {

// ---- dot products of whole words ------------------------------------------------------------------------------------

// Sums of two products of 16-bit integers in each lane. They are exact: no instruction that saturates has a place here.
INFERCOMP_INLINE native_i32 dot_int16(native_u32 left, native_u32 right) {
#if defined(__AVX512BW__)
    return (native_i32)_mm512_madd_epi16((__m512i)left, (__m512i)right);
#elif defined(__AVX2__)
    return (native_i32)_mm256_madd_epi16((__m256i)left, (__m256i)right);
#else
    const native_i32 left_low = reinterpret<native_i32>(left << 16) >> 16;
    const native_i32 right_low = reinterpret<native_i32>(right << 16) >> 16;
    return left_low * right_low + (reinterpret<native_i32>(left) >> 16) * (reinterpret<native_i32>(right) >> 16);
#endif
}

// sum + the four products of unsigned and signed bytes in each lane.
INFERCOMP_INLINE native_i32 add_dot_int8(native_i32 sum, native_u32 unsigned_bytes, native_i32 signed_bytes) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    return (native_i32)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)unsigned_bytes, (__m512i)signed_bytes);
#elif defined(__AVXVNNI__) && defined(__AVX2__)
    return (native_i32)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)unsigned_bytes, (__m256i)signed_bytes);
#else
    const native_i16_pairs pairs = reinterpret<native_i16_pairs>(signed_bytes);
    const native_u32 even = reinterpret<native_u32>((pairs << 8) >> 8);
    const native_u32 odd = reinterpret<native_u32>(pairs >> 8);
    return sum + dot_int16(unsigned_bytes & 0x00ff00ffu, even) + dot_int16((unsigned_bytes >> 8) & 0x00ff00ffu, odd);
#endif
}

// sum + the four products of unsigned weights with signed activations in each lane.
INFERCOMP_INLINE native_i32 add_dot_int8(native_i32 sum, native_u32 weights, int32_t activations) {
    return add_dot_int8(sum, weights, activations - native_i32{});
}

// The same for bytes up to 15, of which two products fit 16 bits.
INFERCOMP_INLINE native_i32 add_dot_nibbles(native_i32 sum, native_u32 nibbles, int32_t activations) {
#if defined(__AVX2__) && !defined(__AVX512BW__) && !defined(__AVXVNNI__)
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)nibbles, (__m256i)(activations - native_i32{}));
    return sum + (native_i32)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    return add_dot_int8(sum, nibbles, activations);
#endif
}

struct INT8Dot {
    using Vector = native_i32;
    INFERCOMP_INLINE static native_i32 add(native_i32 sum, native_u32 weights, int32_t activations) {
        return add_dot_int8(sum, weights, activations);
    }
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
struct BF16Dot {
    using Vector = native_f32;
    INFERCOMP_INLINE static native_f32 add(native_f32 sum, native_u32 weights, int32_t activations) {
        const native_i32 broadcast = activations - native_i32{};
        return (native_f32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)broadcast, (__m512bh)weights);
    }
};
#endif

template <int ROWS, class Dot, int VECTORS>
INFERCOMP_INLINE void add_dot(const char* rows, int64_t row_stride, int64_t num_bytes, const uint32_t* panel,
                              typename Dot::Vector (&sums)[ROWS][VECTORS]) {
    native_u32 words[VECTORS];
    load_words(panel, words);
    INFERCOMP_UNROLL
    for (int row = 0; row < ROWS; ++row) {
        int32_t activations = 0;
        std::memcpy(&activations, rows + row * row_stride, num_bytes);
        INFERCOMP_UNROLL
        for (int v = 0; v < VECTORS; ++v) sums[row][v] = Dot::add(sums[row][v], words[v], activations);
    }
}

// Rows and strides in bytes. The last word of activations may be cut short; what it lacks counts as zeros. `panel` starts
// at the first of the registers of outputs that have sums here.
template <int ROWS, class Dot, int VECTORS>
INFERCOMP_INLINE void add_dots(const void* rows, int64_t row_stride, int64_t row_bytes, const void* panel,
                               typename Dot::Vector (&sums)[ROWS][VECTORS]) {
    const char* bytes = static_cast<const char*>(rows);
    const uint32_t* words = static_cast<const uint32_t*>(panel);
    for (int64_t steps = row_bytes / 4; steps > 0; --steps) {
        prefetch_words<ROWS, VECTORS>(words);
        add_dot<ROWS, Dot>(bytes, row_stride, 4, words, sums);
        bytes += 4;
        words += PANEL;
    }
    if (row_bytes % 4) add_dot<ROWS, Dot>(bytes, row_stride, row_bytes % 4, words, sums);
}

// ---- float and bfloat16 times the same ------------------------------------------------------------------------------

using F32Panels = WideningPanels<FloatWords, float>;

template <class Activation>
using BF16WeightPanels = WideningPanels<BF16Words, Activation>;

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
struct BF16Panels {
    using activation = bf16;
    using accumulator = float;
    using Widened = BF16Panels;
    static constexpr int MAX_ROWS = ROWS_IN_REGISTERS, PANELS_OF_ONE_ROW = 1;
    static constexpr int MAX_UNPACKED_ROWS = UNPACKED_ROWS_IN_REGISTERS;

    static constexpr int64_t panel_bytes(int64_t k) { return (k + 1) / 2 * PANEL * 4; }

    template <int ROWS>
    __attribute__((noinline)) static void multiply(const bf16* rows, int64_t row_stride, const void* panel, int64_t k,
                                                   float (*tile)[PANEL]) {
        Sums<native_f32, ROWS> sums = {};
        add_dots<ROWS, BF16Dot>(rows, row_stride * 2, k * 2, panel, sums);
        store_tile(sums, tile);
    }

    template <int ROWS, class Source>
    __attribute__((noinline)) static void multiply_unpacked(const bf16* rows, int64_t row_stride, const Source& weight,
                                                            int64_t k, float (*tile)[PANEL]) {
        Sums<native_f32, ROWS> sums = {};
        weight.for_each_word(k, [&](native_u32 words, int64_t step, int v, int count) INFERCOMP_INLINE_LAMBDA {
            INFERCOMP_UNROLL
            for (int row = 0; row < ROWS; ++row) {
                int32_t activations = 0;
                std::memcpy(&activations, rows + row * row_stride + step * 2, count * 2);
                sums[row][v] = BF16Dot::add(sums[row][v], words, activations);
            }
        });
        store_tile(sums, tile);
    }
};
#else
using BF16Panels = BF16WeightPanels<bf16>;
#endif

// ---- integers -------------------------------------------------------------------------------------------------------

#if defined(__AVX2__) && !defined(__AVX512VNNI__) && !defined(__AVXVNNI__)
// INT8 times INT8 without an instruction for it: rows come as 16-bit integers, of each four those at even places before
// those at odd places, so that pairs of them meet the even and the odd bytes of a word. One tile of rows meets many
// panels, and is taken apart once. Weights are stored as in INT8Panels.
struct INT16PairPanels {
    using activation = int16_t;
    using accumulator = int32_t;
    static constexpr int MAX_ROWS = ROWS_IN_PASSES, PANELS_OF_ONE_ROW = MAX_PANELS;

    static constexpr int64_t panel_bytes(int64_t k) { return (k + 3) / 4 * PANEL * 4; }

    template <int ROWS, int PANELS = 1>
    __attribute__((noinline)) static void multiply(const int16_t* rows, int64_t row_stride, const void* panel, int64_t k,
                                                   const int32_t* row_sums, int32_t (*tile)[PANEL],
                                                   int64_t bytes_to_second = 0) {
        constexpr int VECTORS = PANELS * vectors_of_pass<ROWS>();
        for (int first = 0; first < PANEL_VECTORS; first += VECTORS) {
            native_i32 sums[ROWS][VECTORS] = {};
            const uint32_t* words = static_cast<const uint32_t*>(panel) + first * NATIVE_LANES;
            const int16_t* pairs = rows;
            for (int64_t steps = (k + 3) / 4; steps > 0; --steps) {
                prefetch_words<ROWS, VECTORS>(words, bytes_to_second / 4);
                add_pairs<ROWS>(pairs, row_stride * 2, words, bytes_to_second / 4, even_bytes, sums);
                add_pairs<ROWS>(pairs + 2, row_stride * 2, words, bytes_to_second / 4, odd_bytes, sums);
                pairs += 4;
                words += PANEL;
            }
            INFERCOMP_UNROLL
            for (int row = 0; row < ROWS; ++row) {
                INFERCOMP_UNROLL
                for (int v = 0; v < VECTORS; ++v) sums[row][v] -= 128 * row_sums[row];
            }
            store_tile(sums, tile, first);
        }
    }

private:
    INFERCOMP_INLINE static native_u32 even_bytes(native_u32 word) { return word & 0x00ff00ffu; }

    INFERCOMP_INLINE static native_u32 odd_bytes(native_u32 word) { return native_u32(native_u16_pairs(word) >> 8); }

    template <int ROWS, class Bytes, int VECTORS>
    INFERCOMP_INLINE static void add_pairs(const int16_t* pairs, int64_t row_bytes, const uint32_t* words,
                                           int64_t second, Bytes bytes_of, native_i32 (&sums)[ROWS][VECTORS]) {
        native_u32 weights[VECTORS];
        load_words(words, weights, second);
        INFERCOMP_UNROLL
        for (int v = 0; v < VECTORS; ++v) weights[v] = bytes_of(weights[v]);
        INFERCOMP_UNROLL
        for (int row = 0; row < ROWS; ++row) {
            const char* source = reinterpret_cast<const char*>(pairs) + row * row_bytes;
            const native_u32 pair = load<uint32_t>(source) - native_u32{};
            INFERCOMP_UNROLL
            for (int v = 0; v < VECTORS; ++v) {
                sums[row][v] += dot_int16(weights[v], pair);
                // Else GCC multiplies for all rows before it adds, and has no room for so many products.
                asm volatile("" : "+v"(sums[row][v]));
            }
        }
    }
};
#endif

// INT8 times INT8. Weights are stored as weight + 128, so 128 · Σ activations (`row_sums`, one a row) is taken off
// again: the tile is the exact sum of products, for k up to 65,793.
struct INT8Panels {
    using activation = int8_t;
    using accumulator = int32_t;
#if defined(__AVX2__) && !defined(__AVX512VNNI__) && !defined(__AVXVNNI__)
    using Widened = INT16PairPanels;
#endif
    static constexpr int MAX_ROWS = ROWS_OF_INTEGERS, PANELS_OF_ONE_ROW = 1;

    static constexpr int64_t panel_bytes(int64_t k) { return (k + 3) / 4 * PANEL * 4; }

    template <int ROWS>
    __attribute__((noinline)) static void multiply(const int8_t* rows, int64_t row_stride, const void* panel, int64_t k,
                                                   const int32_t* row_sums, int32_t (*tile)[PANEL]) {
        constexpr int VECTORS = vectors_of_pass<ROWS>();
        for (int first = 0; first < PANEL_VECTORS; first += VECTORS) {
            native_i32 sums[ROWS][VECTORS] = {};
            add_dots<ROWS, INT8Dot>(rows, row_stride, k, static_cast<const uint32_t*>(panel) + first * NATIVE_LANES, sums);
            INFERCOMP_UNROLL
            for (int row = 0; row < ROWS; ++row) {
                INFERCOMP_UNROLL
                for (int v = 0; v < VECTORS; ++v) sums[row][v] -= 128 * row_sums[row];
            }
            store_tile(sums, tile, first);
        }
    }
};

// Any number of rows from one to Format::MAX_ROWS: the rest of the arguments is what Format::multiply takes after k.
template <class Format, int ROWS = Format::MAX_ROWS, class... Rest>
inline void multiply_rows(int num_rows, const typename Format::activation* rows, int64_t row_stride, const void* panel,
                          int64_t k, Rest... rest) {
    if constexpr (ROWS > 1) {
        if (num_rows < ROWS) return multiply_rows<Format, ROWS - 1>(num_rows, rows, row_stride, panel, k, rest...);
    }
    Format::template multiply<ROWS>(rows, row_stride, panel, k, rest...);
}

// One to Format::MAX_UNPACKED_ROWS rows times a weight that stays in its owner's memory: WeightRows or WeightColumns.
template <class Format, int ROWS = Format::MAX_UNPACKED_ROWS, class Source>
inline void multiply_unpacked_rows(int num_rows, const typename Format::activation* rows, int64_t row_stride,
                                   const Source& weight, int64_t k, float (*tile)[PANEL]) {
    if constexpr (ROWS > 1) {
        if (num_rows < ROWS) {
            return multiply_unpacked_rows<Format, ROWS - 1>(num_rows, rows, row_stride, weight, k, tile);
        }
    }
    Format::template multiply_unpacked<ROWS>(rows, row_stride, weight, k, tile);
}

}  // namespace infercomp
