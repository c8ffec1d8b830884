// Products with weights whose groups of inputs share a scale: codes of 3, 4 or 8 bits (group_linear,
// group_weight_linear). infercomp/codegen/group_panels.py says how they lie.
#pragma once

#include "gemm.h"

namespace infercomp {

// What the zero of a group is: the middle code, a code, or the value of code 0.
enum class Zeros { MIDDLE, POINTS, VALUES };

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

// A step along k: STORED words an output, which become WORDS words of PER_WORD unsigned fields, one a code.
template <int BITS>
struct Codes {
    static constexpr int STORED = 1, WORDS = 1, FIELD = BITS, PER_WORD = 32 / BITS;

    INFERCOMP_INLINE static native_u32 word(const uint32_t* step, int, int v, int64_t second) {
        return load<native_u32>(step + place_of(v, second));
    }
};

template <>
struct Codes<3> {
    static constexpr int STORED = 3, WORDS = 4, FIELD = 4, PER_WORD = 8;

    INFERCOMP_INLINE static native_u32 word(const uint32_t* step, int index, int v, int64_t second) {
        const uint32_t* words = step + place_of(v, second);
        const native_u32 low = load<native_u32>(words + index / 2 * PANEL) >> (index % 2 * 2);
        const native_u32 bits = load<native_u32>(words + 2 * PANEL);
        const native_u32 high = index < 2 ? bits << (2 - index) : bits >> (index - 2);
        return (low & 0x33333333u) | (high & 0x44444444u);
    }
};

// Where in its word field i is.
template <int FIELD>
constexpr int field_position(int i) {
    return FIELD == 4 ? nibble_position(i) : i * FIELD;
}

// Fields as floats, less a zero.
template <int FIELD, int VECTORS>
struct FieldWords {
    // Zeros, each plus the power of a field that begins at such a bit.
    native_f32 zeros_plus_power[16 / FIELD][VECTORS];

    INFERCOMP_INLINE void set_zeros(native_f32 zeros, int v) {
        INFERCOMP_UNROLL
        for (int field = 0; field < 16 / FIELD; ++field) {
            zeros_plus_power[field][v] = zeros + field_power(field * FIELD);
        }
    }

    INFERCOMP_INLINE native_f32 weight(native_u32 words, int i, int v) const {
        const int at = field_position<FIELD>(i) % 16;
        const native_u32 shifted = field_position<FIELD>(i) < 16 ? words : words >> 16;
        return field_plus_power<FIELD>(shifted, at) - zeros_plus_power[at / FIELD][v];
    }
};

// Bytes of the codes of one group of a panel.
template <int BITS, int GROUP>
constexpr int64_t CODE_BYTES = GROUP / (Codes<BITS>::WORDS * Codes<BITS>::PER_WORD) * Codes<BITS>::STORED * PANEL * 4;

// One group of a panel: its codes, then the 32 scales, then the 32 zeros, if it has any. Registers of outputs count from
// `first` on, and go on `to_second` bytes further in a second panel.
template <int BITS, int GROUP, Zeros ZEROS, int64_t SCALES = CODE_BYTES<BITS, GROUP>>
struct CodeGroup {
    static_assert(GROUP % 32 == 0);
    using Code = Codes<BITS>;
    static constexpr int PER_STEP = Code::WORDS * Code::PER_WORD;
    static constexpr int64_t STEPS = GROUP / PER_STEP;
    static constexpr int64_t SCALES_AT = SCALES;
    static constexpr int64_t ZEROS_AT = SCALES_AT + PANEL * 2;
    static constexpr int64_t BYTES = ZEROS_AT + PANEL * (ZEROS == Zeros::VALUES ? 2 : ZEROS == Zeros::POINTS ? 1 : 0);
    const char* start;
    int64_t to_second = 0;
    int first = 0;

    INFERCOMP_INLINE const uint32_t* words() const {
        return reinterpret_cast<const uint32_t*>(start) + first * NATIVE_LANES;
    }

    INFERCOMP_INLINE native_f32 scales(int v) const { return halves(SCALES_AT, v); }

    // Of code 0.
    INFERCOMP_INLINE native_f32 values(int v) const { return halves(ZEROS_AT, v); }

    // What is taken off a code.
    INFERCOMP_INLINE native_i32 points(int v) const {
        if constexpr (ZEROS == Zeros::MIDDLE) return (1 << (BITS - 1)) - native_i32{};
        if constexpr (ZEROS == Zeros::VALUES) return native_i32{};
        const char* source = start + ZEROS_AT + first * NATIVE_LANES + place_of(v, to_second);
#if defined(__AVX512BW__)
        return (native_i32)_mm512_maskz_cvtepu8_epi32(0xffff, load<__m128i>(source));
#else
        // In two steps, because GCC 12 would widen fourfold lane by lane.
        return __builtin_convertvector(__builtin_convertvector(load<native_u8>(source), native_u16), native_i32);
#endif
    }

    // In a tile from the first of its rows on, `num_rows` of each panel.
    INFERCOMP_INLINE float* place_in(float (*tile)[PANEL], int num_rows, int v) const {
        return tile[v / PANEL_VECTORS * num_rows] + first * NATIVE_LANES + place_of(v, 0);
    }

    static constexpr int64_t panel_bytes(int64_t k) { return (k / GROUP * BYTES + 63) / 64 * 64; }

private:
    INFERCOMP_INLINE native_f32 halves(int64_t at, int v) const {
        const auto* source = reinterpret_cast<const uint16_t*>(start + at) + first * NATIVE_LANES;
        return halves_to_floats(source + place_of(v, to_second / 2));
    }
};

// tile[row] += scale · group sum. Whole tiles of both would not fit the registers, so this one lives in memory: without
// the barrier GCC keeps a second copy of it on the stack.
template <int ROWS, int VECTORS, class Group>
INFERCOMP_INLINE void add_group(const Group& group, const native_f32 (&sums)[ROWS][VECTORS], float (*tile)[PANEL]) {
    native_f32 scales[VECTORS];
    INFERCOMP_UNROLL
    for (int v = 0; v < VECTORS; ++v) scales[v] = group.scales(v);
    INFERCOMP_UNROLL
    for (int row = 0; row < ROWS; ++row) {
        INFERCOMP_UNROLL
        for (int v = 0; v < VECTORS; ++v) {
            float* target = group.place_in(tile + row, ROWS, v);
            store(target, load<native_f32>(target) + scales[v] * sums[row][v]);
        }
    }
    asm volatile("" : : : "memory");
}

// tile[row] += zero · Σ activations of the row.
template <int ROWS, int VECTORS, class Group>
INFERCOMP_INLINE void add_zeros(const Group& group, const float* row_sums, float (*tile)[PANEL]) {
    INFERCOMP_UNROLL
    for (int row = 0; row < ROWS; ++row) {
        INFERCOMP_UNROLL
        for (int v = 0; v < VECTORS; ++v) {
            float* target = group.place_in(tile + row, ROWS, v);
            store(target, load<native_f32>(target) + group.values(v) * row_sums[row]);
        }
    }
}

// Codes times INT8: tile = Σ over groups of scale · (Σ a q − zero · Σ a), the inner sums exact. k is a multiple of
// GROUP; `row_sums` holds Σ a of each group, k / GROUP of them a row.
template <int BITS, int GROUP, Zeros ZEROS>
struct GroupPanels {
    using activation = int8_t;
    using accumulator = float;
    using Group = CodeGroup<BITS, GROUP, ZEROS>;
    using Code = typename Group::Code;
    static constexpr int MAX_ROWS = ROWS_OF_INTEGERS, PANELS_OF_ONE_ROW = MAX_PANELS;

    static constexpr int64_t panel_bytes(int64_t k) { return Group::panel_bytes(k); }

    template <int ROWS, int PANELS = 1>
    __attribute__((noinline)) static void multiply(const int8_t* rows, int64_t row_stride, const void* panel, int64_t k,
                                                   const int32_t* row_sums, float (*tile)[PANEL],
                                                   int64_t bytes_to_second = 0) {
        constexpr int VECTORS = PANELS * vectors_of_pass<ROWS>();
        const int64_t num_groups = k / GROUP;
        std::memset(tile, 0, sizeof(*tile) * PANELS * ROWS);
        Group group{static_cast<const char*>(panel), bytes_to_second};
        for (int64_t index = 0; index < num_groups; ++index) {
            for (group.first = 0; group.first < PANEL_VECTORS; group.first += VECTORS) {
                const int32_t* group_sums = row_sums + index;
                multiply_group<ROWS, VECTORS>(rows + index * GROUP, row_stride, group, group_sums, num_groups, tile);
            }
            group.start += Group::BYTES;
        }
    }

private:
    template <int ROWS, int VECTORS>
    INFERCOMP_INLINE static void multiply_group(const int8_t* rows, int64_t row_stride, Group group,
                                                const int32_t* row_sums, int64_t num_groups, float (*tile)[PANEL]) {
        native_i32 sums[ROWS][VECTORS] = {};
        if constexpr (ZEROS != Zeros::VALUES) start_sums(group, row_sums, num_groups, sums);
        const uint32_t* panel = group.words();
        const int64_t second = group.to_second / 4;
        for (int64_t step = 0; step < Group::STEPS; ++step) {
            prefetch<ROWS, VECTORS>(panel, Code::STORED * PANEL * 4, group.to_second);
            INFERCOMP_UNROLL
            for (int word = 0; word < Code::WORDS; ++word) {
                add_word(rows + word * Code::PER_WORD, row_stride, panel, second, word, sums);
            }
            rows += Group::PER_STEP;
            panel += Code::STORED * PANEL;
        }
        prefetch<ROWS, VECTORS>(panel, Group::BYTES - Group::SCALES_AT, group.to_second);
        native_f32 floats[ROWS][VECTORS];
        INFERCOMP_UNROLL
        for (int row = 0; row < ROWS; ++row) {
            INFERCOMP_UNROLL
            for (int v = 0; v < VECTORS; ++v) floats[row][v] = to_floats(sums[row][v]);
        }
        add_group(group, floats, tile);
        if constexpr (ZEROS == Zeros::VALUES) {
            float float_sums[ROWS];
            for (int row = 0; row < ROWS; ++row) float_sums[row] = float(row_sums[row * num_groups]);
            add_zeros<ROWS, VECTORS>(group, float_sums, tile);
        }
    }

    // −zero · Σ activations.
    template <int ROWS, int VECTORS>
    INFERCOMP_INLINE static void start_sums(Group group, const int32_t* row_sums, int64_t num_groups,
                                            native_i32 (&sums)[ROWS][VECTORS]) {
        native_i32 negative_zeros[VECTORS];
        INFERCOMP_UNROLL
        for (int v = 0; v < VECTORS; ++v) negative_zeros[v] = -group.points(v);
        INFERCOMP_UNROLL
        for (int row = 0; row < ROWS; ++row) {
            const native_i32 sum = row_sums[row * num_groups] - native_i32{};
            INFERCOMP_UNROLL
            for (int v = 0; v < VECTORS; ++v) {
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

    template <int ROWS, int VECTORS>
    INFERCOMP_INLINE static void add_word(const int8_t* rows, int64_t row_stride, const uint32_t* step, int64_t second,
                                          int word, native_i32 (&sums)[ROWS][VECTORS]) {
        native_u32 words[VECTORS];
        INFERCOMP_UNROLL
        for (int v = 0; v < VECTORS; ++v) words[v] = Code::word(step, word, v, second);
        INFERCOMP_UNROLL
        for (int part = 0; part < Code::PER_WORD / 4; ++part) {
            INFERCOMP_UNROLL
            for (int row = 0; row < ROWS; ++row) {
                const int32_t activations = load<int32_t>(rows + row * row_stride + part * 4);
                INFERCOMP_UNROLL
                for (int v = 0; v < VECTORS; ++v) {
                    if constexpr (Code::FIELD == 8) {
                        sums[row][v] = add_dot_int8(sums[row][v], words[v], activations);
                    } else {
                        const native_u32 nibbles = (words[v] >> (part * 4)) & 0x0f0f0f0fu;
                        sums[row][v] = add_dot_nibbles(sums[row][v], nibbles, activations);
                    }
                }
            }
        }
    }
};

// Σ of so many floats, in an order that their number decides.
template <int COUNT>
INFERCOMP_INLINE float sum_of(const float* values) {
    native_f32 sums = {};
    INFERCOMP_UNROLL
    for (int first = 0; first < COUNT; first += NATIVE_LANES) sums += load<native_f32>(values + first);
    float parts[NATIVE_LANES];
    store(parts, sums);
    INFERCOMP_UNROLL
    for (int width = NATIVE_LANES / 2; width > 0; width /= 2) {
        for (int lane = 0; lane < width; ++lane) parts[lane] += parts[lane + width];
    }
    return parts[0];
}

// Codes times float or bfloat16: tile = Σ over groups of scale · Σ a (q − zero), and of zero · Σ a where zeros are
// values. k is a multiple of GROUP.
template <int BITS, int GROUP, Zeros ZEROS, class Activation>
struct GroupWeightPanels {
    using activation = Activation;
    using accumulator = float;
    using Widened = GroupWeightPanels<BITS, GROUP, ZEROS, float>;
    using Group = CodeGroup<BITS, GROUP, ZEROS>;
    using Code = typename Group::Code;
    static constexpr int MAX_ROWS = ROWS_IN_PASSES, PANELS_OF_ONE_ROW = 1;

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
        for (int first = 0; first < PANEL_VECTORS; first += vectors_of_pass<ROWS>()) {
            multiply_outputs<ROWS, GROUPS, Order>(rows, row_stride, groups, first, tile);
        }
    }

    template <int ROWS, int GROUPS, class Order>
    INFERCOMP_INLINE static void multiply_outputs(const float* rows, int64_t row_stride, const char* groups, int first,
                                                  float (*tile)[PANEL]) {
        constexpr int VECTORS = vectors_of_pass<ROWS>();
        FieldWords<Code::FIELD, VECTORS> decoders[GROUPS];
        Sums<native_f32, ROWS, VECTORS> sums[GROUPS] = {};
        INFERCOMP_UNROLL
        for (int g = 0; g < GROUPS; ++g) {
            const Group group{groups + g * Group::BYTES, 0, first};
            INFERCOMP_UNROLL
            for (int v = 0; v < VECTORS; ++v) decoders[g].set_zeros(to_floats(group.points(v)), v);
        }
        const uint32_t* codes = Group{groups, 0, first}.words();
        const float* activations = rows;
        for (int64_t steps = Group::STEPS; steps > 0; --steps) {
            INFERCOMP_UNROLL
            for (int g = 0; g < GROUPS; ++g) {
                const uint32_t* step = codes + g * (Group::BYTES / 4);
                prefetch<ROWS>(step, Code::STORED * PANEL * 4);
                INFERCOMP_UNROLL
                for (int word = 0; word < Code::WORDS; ++word) {
                    const float* of_word = activations + g * GROUP + word * Order::advance(Code::PER_WORD);
                    add_word<ROWS, Order>(decoders[g], of_word, row_stride * 4, step, word, sums[g]);
                }
            }
            activations += Order::advance(Group::PER_STEP);
            codes += Code::STORED * PANEL;
        }
        INFERCOMP_UNROLL
        for (int g = 0; g < GROUPS; ++g) {
            const Group group{groups + g * Group::BYTES, 0, first};
            add_group(group, sums[g], tile);
            if constexpr (ZEROS == Zeros::VALUES) {
                float row_sums[ROWS];
                for (int row = 0; row < ROWS; ++row) row_sums[row] = sum_of<GROUP>(rows + row * row_stride + g * GROUP);
                add_zeros<ROWS, VECTORS>(group, row_sums, tile);
            }
        }
    }

    template <int ROWS, class Order, int VECTORS>
    INFERCOMP_INLINE static void add_word(const FieldWords<Code::FIELD, VECTORS>& decoder, const float* rows,
                                          int64_t row_bytes, const uint32_t* step, int word,
                                          native_f32 (&sums)[ROWS][VECTORS]) {
        native_u32 words[VECTORS];
        INFERCOMP_UNROLL
        for (int v = 0; v < VECTORS; ++v) words[v] = Code::word(step, word, v, 0);
        INFERCOMP_UNROLL
        for (int i = 0; i < Code::PER_WORD; ++i) add_weights<ROWS, Order>(decoder, rows, row_bytes, words, i, sums);
    }
};

}  // namespace infercomp
