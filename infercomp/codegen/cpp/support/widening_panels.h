// Products with float activations: weights of any format are widened to float in registers.
#pragma once

#include <vector>

#include "unpacked_weights.h"

namespace infercomp {

// How a word of a panel becomes floats: `weight(words, i, v)` is the i-th weight along k of the v-th register of
// outputs.
struct FloatWords {
    static constexpr int PER_WORD = 1;
    INFERCOMP_INLINE native_f32 weight(native_u32 words, int, int) const { return reinterpret<native_f32>(words); }
};

struct BF16Words {
    static constexpr int PER_WORD = 2;
    INFERCOMP_INLINE native_f32 weight(native_u32 words, int i, int) const {
        return reinterpret<native_f32>(i == 0 ? words << 16 : words & 0xffff0000u);
    }
};

// An unsigned field of BITS bits from bit `at` of each word on, plus 2^(23 − at): set into the mantissa of a float with
// that exponent, bit `at` is worth one. Taking the power off again is exact, and cheaper than to shift and convert.
template <int BITS>
INFERCOMP_INLINE native_f32 field_plus_power(native_u32 words, int at) {
    return reinterpret<native_f32>((words & (((1u << BITS) - 1) << at)) | uint32_t(127 + 23 - at) << 23);
}

constexpr float field_power(int at) { return float(1 << (23 - at)); }

// Bytes are stored as weight + 128.
struct INT8Words {
    static constexpr int PER_WORD = 4;
    INFERCOMP_INLINE native_f32 weight(native_u32 words, int i, int) const {
        const int at = i % 2 * 8;
        return field_plus_power<8>(i < 2 ? words : words >> 16, at) - (field_power(at) + 128);
    }
};

// Byte b of a word holds weight b in its low and weight b + 4 in its high nibble.
constexpr int nibble_position(int i) { return i % 4 * 8 + i / 4 * 4; }

// Where the activations of a word are in their row, and how far it is to the next word's.
struct InOrder {
    static constexpr int offset(int i) { return i; }
    static constexpr int advance(int per_word) { return per_word; }
};

// Of each COUNT activations those at even places first, then those at odd places: so bfloat16 is widened in place,
// without moving a lane.
template <int COUNT>
struct EvenThenOdd {
    static constexpr int offset(int i) { return i % 2 * (COUNT / 2) + i / 2; }
    static constexpr int advance(int per_word) { return per_word / 2; }

    INFERCOMP_INLINE static void widen(const bf16* source, float* target) {
        static_assert(COUNT % (2 * NATIVE_LANES) == 0);
        INFERCOMP_UNROLL
        for (int i = 0; i < COUNT; i += 2 * NATIVE_LANES) {
            const native_u32 pairs = load<native_u32>(source + i);
            store(target + i / 2, pairs << 16);
            store(target + COUNT / 2 + i / 2, pairs & 0xffff0000u);
        }
    }

    INFERCOMP_INLINE static void widen_first(const bf16* source, int64_t count, float* target) {
        for (int64_t i = 0; i < count; ++i) target[offset(i)] = to_float(source[i]);
    }
};

template <int ROWS, class Order, class Words, int VECTORS>
INFERCOMP_INLINE void add_weights(const Words& decoder, const float* rows, int64_t row_bytes,
                                  const native_u32 (&words)[VECTORS], int i, native_f32 (&sums)[ROWS][VECTORS]) {
    native_f32 weights[VECTORS];
    INFERCOMP_UNROLL
    for (int v = 0; v < VECTORS; ++v) weights[v] = decoder.weight(words[v], i, v);
    INFERCOMP_UNROLL
    for (int row = 0; row < ROWS; ++row) {
        // Addressed in bytes: of indices GCC makes a pointer for each row and i.
        const float activation = load<float>(reinterpret_cast<const char*>(rows + Order::offset(i)) + row * row_bytes);
        INFERCOMP_UNROLL
        for (int v = 0; v < VECTORS; ++v) sums[row][v] += weights[v] * activation;
    }
}

template <int VECTORS>
INFERCOMP_INLINE void load_words(const uint32_t* source, native_u32 (&words)[VECTORS], int64_t second = 0) {
    INFERCOMP_UNROLL
    for (int v = 0; v < VECTORS; ++v) words[v] = load<native_u32>(source + place_of(v, second));
}

// The products of one word of each output.
template <int ROWS, class Order, class Words, int VECTORS>
INFERCOMP_INLINE void add_words(const Words& decoder, const float* rows, int64_t row_bytes, const uint32_t* panel,
                                int64_t second, native_f32 (&sums)[ROWS][VECTORS]) {
    native_u32 words[VECTORS];
    load_words(panel, words, second);
    INFERCOMP_UNROLL
    for (int i = 0; i < Words::PER_WORD; ++i) add_weights<ROWS, Order>(decoder, rows, row_bytes, words, i, sums);
}

// `panel` starts at the first of the registers of outputs that have sums here.
template <int ROWS, class Order = InOrder, class Words, int VECTORS>
INFERCOMP_INLINE void add_products(const Words& decoder, const float* rows, int64_t row_bytes, const uint32_t* panel,
                                   int64_t k, native_f32 (&sums)[ROWS][VECTORS], int64_t second = 0) {
    for (int64_t steps = k / Words::PER_WORD; steps > 0; --steps) {
        prefetch_words<ROWS, VECTORS>(panel, second);
        add_words<ROWS, Order>(decoder, rows, row_bytes, panel, second, sums);
        panel += PANEL;
        rows += Order::advance(Words::PER_WORD);
    }
    if (const int rest = int(k % Words::PER_WORD)) {
        native_u32 words[VECTORS];
        load_words(panel, words, second);
        for (int i = 0; i < rest; ++i) add_weights<ROWS, Order>(decoder, rows, row_bytes, words, i, sums);
    }
}

// So many activations of a row are widened at a time that those of all rows stay in the first-level cache.
constexpr int WIDENED = 64;
// Rows are an odd number of cache lines apart, or they would share few sets of the cache.
constexpr int WIDENED_STRIDE = WIDENED + 16;

template <int ROWS, class Words, int VECTORS>
INFERCOMP_INLINE void add_products(const Words& decoder, const bf16* rows, int64_t row_bytes, const uint32_t* panel,
                                   int64_t k, native_f32 (&sums)[ROWS][VECTORS], int64_t second = 0) {
    using Order = EvenThenOdd<WIDENED>;
    alignas(64) float widened[ROWS * WIDENED_STRIDE];
    for (int64_t first = 0; first < k; first += WIDENED) {
        const int64_t count = k - first < WIDENED ? k - first : WIDENED;
        for (int row = 0; row < ROWS; ++row) {
            const bf16* source = rows + first + row * (row_bytes / 2);
            float* target = widened + row * WIDENED_STRIDE;
            count == WIDENED ? Order::widen(source, target) : Order::widen_first(source, count, target);
        }
        add_products<ROWS, Order>(decoder, widened, WIDENED_STRIDE * 4, panel, count, sums, second);
        panel += WIDENED / Words::PER_WORD * PANEL;
    }
}

INFERCOMP_INLINE native_f32 broadcast_activation(const float* activations, int i, int) {
    return activations[i] - native_f32{};
}

// Of a pair, or of its first alone.
INFERCOMP_INLINE native_f32 broadcast_activation(const bf16* activations, int i, int count) {
    uint32_t pair = 0;
    std::memcpy(&pair, activations, count * 2);
    return BF16Words{}.weight(pair - native_u32{}, i, 0);
}

// Weights of any width times floats (or bfloat16, widened first). Scales of whole outputs are the caller's to apply.
template <class Words, class Activation>
struct WideningPanels {
    using activation = Activation;
    using accumulator = float;
    // What to use instead where the caller has the rows as floats, as when one tile of rows meets many panels.
    using Widened = WideningPanels<Words, float>;
    static constexpr int MAX_ROWS = ROWS_IN_PASSES, PANELS_OF_ONE_ROW = MAX_PANELS;
    static constexpr int MAX_UNPACKED_ROWS = UNPACKED_ROWS_IN_REGISTERS;

    static constexpr int64_t panel_bytes(int64_t k) { return (k + Words::PER_WORD - 1) / Words::PER_WORD * PANEL * 4; }

    template <int ROWS, int PANELS = 1>
    __attribute__((noinline)) static void multiply(const Activation* rows, int64_t row_stride, const void* panel,
                                                   int64_t k, float (*tile)[PANEL], int64_t bytes_to_second = 0) {
        constexpr int VECTORS = PANELS * vectors_of_pass<ROWS>();
        const int64_t row_bytes = row_stride * sizeof(Activation);
        for (int first = 0; first < PANEL_VECTORS; first += VECTORS) {
            native_f32 sums[ROWS][VECTORS] = {};
            const uint32_t* words = static_cast<const uint32_t*>(panel) + first * NATIVE_LANES;
            add_products<ROWS>(Words{}, rows, row_bytes, words, k, sums, bytes_to_second / 4);
            store_tile(sums, tile, first);
        }
    }

    // The same bits as packing the panel first, and less work for so few rows.
    template <int ROWS, class Source>
    __attribute__((noinline)) static void multiply_unpacked(const Activation* rows, int64_t row_stride,
                                                            const Source& weight, int64_t k, float (*tile)[PANEL]) {
        Sums<native_f32, ROWS> sums = {};
        weight.for_each_word(k, [&](native_u32 words, int64_t step, int v, int count) INFERCOMP_INLINE_LAMBDA {
            INFERCOMP_UNROLL
            for (int i = 0; i < Words::PER_WORD; ++i) {
                if (i >= count) break;
                const native_f32 weights = Words{}.weight(words, i, v);
                INFERCOMP_UNROLL
                for (int row = 0; row < ROWS; ++row) {
                    const Activation* activations = rows + row * row_stride + step * Words::PER_WORD;
                    sums[row][v] += weights * broadcast_activation(activations, i, count);
                }
            }
        });
        store_tile(sums, tile);
    }
};

template <class Activation>
using INT8WeightPanels = WideningPanels<INT8Words, Activation>;

}  // namespace infercomp
