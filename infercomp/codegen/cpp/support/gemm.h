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

// sum + the four products of unsigned weights with signed activations in each lane.
INFERCOMP_INLINE native_i32 add_dot_int8(native_i32 sum, native_u32 weights, int32_t activations) {
    const native_i32 broadcast = activations - native_i32{};
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    return (native_i32)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, (__m512i)broadcast);
#elif defined(__AVXVNNI__) && defined(__AVX2__)
    return (native_i32)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)weights, (__m256i)broadcast);
#else
    const native_i16_pairs pairs = reinterpret<native_i16_pairs>(broadcast);
    const native_u32 even = reinterpret<native_u32>((pairs << 8) >> 8);
    const native_u32 odd = reinterpret<native_u32>(pairs >> 8);
    return sum + dot_int16(weights & 0x00ff00ffu, even) + dot_int16((weights >> 8) & 0x00ff00ffu, odd);
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

template <int ROWS, class Dot>
INFERCOMP_INLINE void add_dot(const char* rows, int64_t row_stride, int64_t num_bytes, const uint32_t* panel,
                              Sums<typename Dot::Vector, ROWS>& sums) {
    native_u32 words[PANEL_VECTORS];
    load_words(panel, words);
    INFERCOMP_UNROLL
    for (int row = 0; row < ROWS; ++row) {
        int32_t activations = 0;
        std::memcpy(&activations, rows + row * row_stride, num_bytes);
        INFERCOMP_UNROLL
        for (int v = 0; v < PANEL_VECTORS; ++v) sums[row][v] = Dot::add(sums[row][v], words[v], activations);
    }
}

// Rows and strides in bytes. The last word of activations may be cut short; what it lacks counts as zeros.
template <int ROWS, class Dot>
INFERCOMP_INLINE void add_dots(const void* rows, int64_t row_stride, int64_t row_bytes, const void* panel,
                               Sums<typename Dot::Vector, ROWS>& sums) {
    const char* bytes = static_cast<const char*>(rows);
    const uint32_t* words = static_cast<const uint32_t*>(panel);
    for (int64_t steps = row_bytes / 4; steps > 0; --steps) {
        prefetch_words<ROWS>(words);
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
    static constexpr int MAX_ROWS = ROWS_IN_REGISTERS;
    static constexpr int MAX_UNPACKED_ROWS = UNPACKED_ROWS_IN_REGISTERS;

    static constexpr int64_t panel_bytes(int64_t k) { return (k + 1) / 2 * PANEL * 4; }

    template <int ROWS>
    __attribute__((noinline)) static void multiply(const bf16* rows, int64_t row_stride, const void* panel, int64_t k,
                                                   float (*tile)[PANEL]) {
        Sums<native_f32, ROWS> sums = {};
        add_dots<ROWS, BF16Dot>(rows, row_stride * 2, k * 2, panel, sums);
        store_tile<ROWS>(sums, tile);
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
        store_tile<ROWS>(sums, tile);
    }
};
#else
using BF16Panels = BF16WeightPanels<bf16>;
#endif

// ---- integers -------------------------------------------------------------------------------------------------------

// INT8 times INT8. Weights are stored as weight + 128, so 128 · Σ activations (`row_sums`, one a row) is taken off
// again: the tile is the exact sum of products, for k up to 65,793.
struct INT8Panels {
    using activation = int8_t;
    using accumulator = int32_t;
    static constexpr int MAX_ROWS = ROWS_IN_REGISTERS;

    static constexpr int64_t panel_bytes(int64_t k) { return (k + 3) / 4 * PANEL * 4; }

    template <int ROWS>
    __attribute__((noinline)) static void multiply(const int8_t* rows, int64_t row_stride, const void* panel, int64_t k,
                                                   const int32_t* row_sums, int32_t (*tile)[PANEL]) {
        Sums<native_i32, ROWS> sums = {};
        add_dots<ROWS, INT8Dot>(rows, row_stride, k, panel, sums);
        INFERCOMP_UNROLL
        for (int row = 0; row < ROWS; ++row) {
            INFERCOMP_UNROLL
            for (int v = 0; v < PANEL_VECTORS; ++v) sums[row][v] -= 128 * row_sums[row];
        }
        store_tile<ROWS>(sums, tile);
    }
};

// Half-precision numbers that are neither infinite nor NaN, as floats.
INFERCOMP_INLINE native_f32 halves_to_floats(const uint16_t* source) {
#if defined(__AVX512BW__)
    return (native_f32)_mm512_maskz_cvtph_ps(0xffff, load<__m256i>(source));
#else
    const native_u32 bits = load_widened(source);
    const native_f32 magnitude = reinterpret<native_f32>((bits & 0x7fffu) << 13) * 0x1p112f;
    return reinterpret<native_f32>(reinterpret<native_u32>(magnitude) | (bits & 0x8000u) << 16);
#endif
}

// One group of a 4-bit panel: its words, then the 32 scales, then, unless all are 8, the 32 zero points.
template <int GROUP, bool ZERO_POINTS>
struct INT4Group {
    static_assert(GROUP % 32 == 0);
    static constexpr int64_t WORDS = GROUP / 8;
    static constexpr int64_t SCALES_AT = WORDS * PANEL * 4;
    static constexpr int64_t ZEROS_AT = SCALES_AT + PANEL * 2;
    static constexpr int64_t BYTES = ZEROS_AT + (ZERO_POINTS ? PANEL : 0);
    const char* start;

    INFERCOMP_INLINE const uint32_t* words() const { return reinterpret_cast<const uint32_t*>(start); }

    INFERCOMP_INLINE native_f32 scales(int v) const {
        return halves_to_floats(reinterpret_cast<const uint16_t*>(start + SCALES_AT) + v * NATIVE_LANES);
    }

    INFERCOMP_INLINE native_i32 zeros(int v) const {
        if constexpr (!ZERO_POINTS) return 8 - native_i32{};
        const char* source = start + ZEROS_AT + v * NATIVE_LANES;
#if defined(__AVX512BW__)
        return (native_i32)_mm512_maskz_cvtepu8_epi32(0xffff, load<__m128i>(source));
#else
        // In two steps, because GCC 12 would widen fourfold lane by lane.
        return __builtin_convertvector(__builtin_convertvector(load<native_u8>(source), native_u16), native_i32);
#endif
    }

    static constexpr int64_t panel_bytes(int64_t k) { return (k / GROUP * BYTES + 63) / 64 * 64; }
};

// tile[row] += scale · group sum. Whole tiles of both would not fit the registers, so this one lives in memory: without
// the barrier GCC keeps a second copy of it on the stack.
template <int ROWS>
INFERCOMP_INLINE void add_group(const native_f32 (&scales)[PANEL_VECTORS], const Sums<native_f32, ROWS>& sums,
                                float (*tile)[PANEL]) {
    INFERCOMP_UNROLL
    for (int row = 0; row < ROWS; ++row) {
        INFERCOMP_UNROLL
        for (int v = 0; v < PANEL_VECTORS; ++v) {
            float* target = tile[row] + v * NATIVE_LANES;
            store(target, load<native_f32>(target) + scales[v] * sums[row][v]);
        }
    }
    asm volatile("" : : : "memory");
}

// INT4 times INT8: tile = Σ over groups of scale · (Σ a q − zero · Σ a), the inner sums exact. k is a multiple of
// GROUP; `row_sums` holds Σ a of each group, k / GROUP of them a row.
template <int GROUP, bool ZERO_POINTS>
struct INT4Panels {
    using activation = int8_t;
    using accumulator = float;
    using Group = INT4Group<GROUP, ZERO_POINTS>;
    static constexpr int MAX_ROWS = ROWS_IN_REGISTERS;

    static constexpr int64_t panel_bytes(int64_t k) { return Group::panel_bytes(k); }

    template <int ROWS>
    __attribute__((noinline)) static void multiply(const int8_t* rows, int64_t row_stride, const void* panel, int64_t k,
                                                   const int32_t* row_sums, float (*tile)[PANEL]) {
        const int64_t num_groups = k / GROUP;
        std::memset(tile, 0, sizeof(*tile) * ROWS);
        Group group{static_cast<const char*>(panel)};
        for (int64_t index = 0; index < num_groups; ++index) {
            multiply_group<ROWS>(rows + index * GROUP, row_stride, group, row_sums + index, num_groups, tile);
            group.start += Group::BYTES;
        }
    }

private:
    template <int ROWS>
    INFERCOMP_INLINE static void multiply_group(const int8_t* rows, int64_t row_stride, Group group,
                                                const int32_t* row_sums, int64_t num_groups, float (*tile)[PANEL]) {
        Sums<native_i32, ROWS> sums;
        start_sums<ROWS>(group, row_sums, num_groups, sums);
        const uint32_t* panel = group.words();
        for (int64_t step = 0; step < Group::WORDS; ++step) {
            prefetch_words<ROWS>(panel);
            add_word<ROWS>(rows, row_stride, panel, sums);
            rows += 8;
            panel += PANEL;
        }
        prefetch<ROWS>(panel, Group::BYTES - Group::SCALES_AT);
        native_f32 scales[PANEL_VECTORS];
        Sums<native_f32, ROWS> floats;
        INFERCOMP_UNROLL
        for (int v = 0; v < PANEL_VECTORS; ++v) scales[v] = group.scales(v);
        INFERCOMP_UNROLL
        for (int row = 0; row < ROWS; ++row) {
            INFERCOMP_UNROLL
            for (int v = 0; v < PANEL_VECTORS; ++v) floats[row][v] = to_floats(sums[row][v]);
        }
        add_group<ROWS>(scales, floats, tile);
    }

    // −zero · Σ activations.
    template <int ROWS>
    INFERCOMP_INLINE static void start_sums(Group group, const int32_t* row_sums, int64_t num_groups,
                                            Sums<native_i32, ROWS>& sums) {
        native_i32 negative_zeros[PANEL_VECTORS];
        INFERCOMP_UNROLL
        for (int v = 0; v < PANEL_VECTORS; ++v) negative_zeros[v] = -group.zeros(v);
        INFERCOMP_UNROLL
        for (int row = 0; row < ROWS; ++row) {
            const native_i32 sum = row_sums[row * num_groups] - native_i32{};
            INFERCOMP_UNROLL
            for (int v = 0; v < PANEL_VECTORS; ++v) {
                if constexpr (GROUP * 128 < 32768) {
                    // Both fit 16 bits, and one instruction does it where a product of 32 bits takes two.
                    const native_u32 low_half = reinterpret<native_u32>(negative_zeros[v]) & 0xffffu;
                    sums[row][v] = dot_int16(low_half, reinterpret<native_u32>(sum));
                } else {
                    sums[row][v] = negative_zeros[v] * sum;
                }
            }
        }
    }

    template <int ROWS>
    INFERCOMP_INLINE static void add_word(const int8_t* rows, int64_t row_stride, const uint32_t* panel,
                                          Sums<native_i32, ROWS>& sums) {
        native_u32 words[PANEL_VECTORS];
        load_words(panel, words);
        INFERCOMP_UNROLL
        for (int half = 0; half < 2; ++half) {
            INFERCOMP_UNROLL
            for (int row = 0; row < ROWS; ++row) {
                const int32_t activations = load<int32_t>(rows + row * row_stride + half * 4);
                INFERCOMP_UNROLL
                for (int v = 0; v < PANEL_VECTORS; ++v) {
                    sums[row][v] = add_dot_int8(sums[row][v], (words[v] >> (half * 4)) & 0x0f0f0f0fu, activations);
                }
            }
        }
    }
};

// INT4 times float or bfloat16: tile = Σ over groups of scale · Σ a (q − zero). k is a multiple of GROUP.
template <int GROUP, bool ZERO_POINTS, class Activation>
struct INT4WeightPanels {
    using activation = Activation;
    using accumulator = float;
    using Widened = INT4WeightPanels<GROUP, ZERO_POINTS, float>;
    using Group = INT4Group<GROUP, ZERO_POINTS>;
    static constexpr int MAX_ROWS = ROWS_IN_REGISTERS;

    static constexpr int64_t panel_bytes(int64_t k) { return Group::panel_bytes(k); }

    template <int ROWS>
    __attribute__((noinline)) static void multiply(const Activation* rows, int64_t row_stride, const void* panel,
                                                   int64_t k, float (*tile)[PANEL]) {
        std::memset(tile, 0, sizeof(*tile) * ROWS);
        // The sums of one row wait for themselves: those of two groups do not wait for each other.
        constexpr int AT_ONCE = ROWS == 1 ? 2 : 1;
        const char* groups = static_cast<const char*>(panel);
        int64_t first = 0;
        for (; first + AT_ONCE * GROUP <= k; first += AT_ONCE * GROUP, groups += AT_ONCE * Group::BYTES) {
            multiply_groups<ROWS, AT_ONCE>(rows + first, row_stride, groups, tile);
        }
        if (first < k) multiply_groups<ROWS, 1>(rows + first, row_stride, groups, tile);
    }

private:
    template <int ROWS, int GROUPS>
    INFERCOMP_INLINE static void multiply_groups(const bf16* rows, int64_t row_stride, const char* groups,
                                                 float (*tile)[PANEL]) {
        constexpr int64_t STRIDE = GROUPS * GROUP + 16;
        alignas(64) float widened[ROWS * STRIDE];
        for (int row = 0; row < ROWS; ++row) {
            INFERCOMP_UNROLL
            for (int first = 0; first < GROUPS * GROUP; first += GROUP) {
                EvenThenOdd<GROUP>::widen(rows + row * row_stride + first, widened + row * STRIDE + first);
            }
        }
        multiply_groups<ROWS, GROUPS, EvenThenOdd<GROUP>>(widened, STRIDE, groups, tile);
    }

    template <int ROWS, int GROUPS, class Order = InOrder>
    INFERCOMP_INLINE static void multiply_groups(const float* rows, int64_t row_stride, const char* groups,
                                                 float (*tile)[PANEL]) {
        INT4Words decoders[GROUPS];
        Sums<native_f32, ROWS> sums[GROUPS] = {};
        INFERCOMP_UNROLL
        for (int g = 0; g < GROUPS; ++g) {
            INFERCOMP_UNROLL
            for (int v = 0; v < PANEL_VECTORS; ++v) {
                decoders[g].set_zeros(to_floats(Group{groups + g * Group::BYTES}.zeros(v)), v);
            }
        }
        const uint32_t* words = Group{groups}.words();
        for (int64_t steps = Group::WORDS; steps > 0; --steps) {
            INFERCOMP_UNROLL
            for (int g = 0; g < GROUPS; ++g) {
                const uint32_t* group_words = words + g * (Group::BYTES / 4);
                prefetch_words<ROWS>(group_words);
                add_words<ROWS, Order>(decoders[g], rows + g * GROUP, row_stride * 4, group_words, sums[g]);
            }
            rows += Order::advance(8);
            words += PANEL;
        }
        INFERCOMP_UNROLL
        for (int g = 0; g < GROUPS; ++g) {
            native_f32 scales[PANEL_VECTORS];
            INFERCOMP_UNROLL
            for (int v = 0; v < PANEL_VECTORS; ++v) scales[v] = Group{groups + g * Group::BYTES}.scales(v);
            add_group<ROWS>(scales, sums[g], tile);
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
