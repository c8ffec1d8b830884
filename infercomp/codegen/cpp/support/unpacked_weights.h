// Weights that stay where their owner keeps them: their words are put together as they are read.
#pragma once

#include "panel.h"

namespace infercomp {

// Their words are made in registers, to be stored as a panel or multiplied at once. A source calls
// `use(words, step, v, count)` with the step-th words along k of the v-th register of outputs, in ascending steps for
// each v; `count` weights of each word are there, the others zeros.

template <class T>
constexpr int WEIGHTS_PER_WORD = 4 / sizeof(T);

template <int DISTANCE, int... LANE>
INFERCOMP_INLINE void exchange_lanes(native_u32& first, native_u32& second, std::integer_sequence<int, LANE...>) {
    const native_u32 low = __builtin_shufflevector(
        first, second, (LANE & DISTANCE ? NATIVE_LANES + LANE - DISTANCE : LANE)...);
    second = __builtin_shufflevector(first, second, (LANE & DISTANCE ? NATIVE_LANES + LANE : LANE + DISTANCE)...);
    first = low;
}

// Lane j of register i becomes lane i of register j, in one round of exchanges for each bit of a lane's number.
template <int DISTANCE = NATIVE_LANES / 2>
INFERCOMP_INLINE void transpose(native_u32 (&square)[NATIVE_LANES]) {
    INFERCOMP_UNROLL
    for (int i = 0; i < NATIVE_LANES; ++i) {
        if (i & DISTANCE) continue;
        exchange_lanes<DISTANCE>(square[i], square[i + DISTANCE], std::make_integer_sequence<int, NATIVE_LANES>{});
    }
    if constexpr (DISTANCE > 1) transpose<DISTANCE / 2>(square);
}

// A weight in memory as [N, k]: the rows that become the outputs of one panel. A null pointer is an output of zeros.
template <class T>
struct WeightRows {
    const T* const* rows;  // [PANEL]

    template <class Use>
    INFERCOMP_INLINE void for_each_word(int64_t k, Use use) const {
        constexpr int PER_WORD = WEIGHTS_PER_WORD<T>;
        int64_t step = 0;
        for (; (step + NATIVE_LANES) * PER_WORD <= k; step += NATIVE_LANES) {
            INFERCOMP_UNROLL
            for (int v = 0; v < PANEL_VECTORS; ++v) {
                native_u32 square[NATIVE_LANES];
                load_square(step, v, square);
                transpose(square);
                INFERCOMP_UNROLL
                for (int i = 0; i < NATIVE_LANES; ++i) use(square[i], step + i, v, PER_WORD);
            }
        }
        for (; step * PER_WORD < k; ++step) {
            const int count = k - step * PER_WORD < PER_WORD ? int(k - step * PER_WORD) : PER_WORD;
            INFERCOMP_UNROLL
            for (int v = 0; v < PANEL_VECTORS; ++v) use(gather_words(step, v, count), step, v, count);
        }
    }

private:
    // Each row is a stream of its own, too many for the hardware to foresee.
    static constexpr int64_t PREFETCH_STEPS = 64;

    INFERCOMP_INLINE void load_square(int64_t step, int v, native_u32 (&square)[NATIVE_LANES]) const {
        INFERCOMP_UNROLL
        for (int i = 0; i < NATIVE_LANES; ++i) {
            square[i] = native_u32{};
            if (const T* row = rows[v * NATIVE_LANES + i]) {
                __builtin_prefetch(row + (step + PREFETCH_STEPS) * WEIGHTS_PER_WORD<T>);
                square[i] = load<native_u32>(row + step * WEIGHTS_PER_WORD<T>);
            }
        }
    }

    native_u32 gather_words(int64_t step, int v, int count) const {
        native_u32 words = {};
        for (int i = 0; i < NATIVE_LANES; ++i) {
            const T* row = rows[v * NATIVE_LANES + i];
            uint32_t word = 0;
            if (row) std::memcpy(&word, row + step * WEIGHTS_PER_WORD<T>, count * sizeof(T));
            words[i] = word;
        }
        return words;
    }
};

// Sixteen lanes of a panel: the `count` columns from `first` on, then zeros.
template <class T>
struct ColumnRun {
    const T* first;
    int count;
};

// A weight in memory as [k, N]: the columns that become the two halves of one panel.
template <class T>
struct WeightColumns {
    ColumnRun<T> halves[2];
    int64_t row_stride;

    template <class Use>
    INFERCOMP_INLINE void for_each_word(int64_t k, Use use) const {
        constexpr int PER_WORD = WEIGHTS_PER_WORD<T>;
        const bool full = halves[0].count == LANES && halves[1].count == LANES;
        int64_t step = 0;
        for (; full && (step + 1) * PER_WORD <= k; ++step) {
            INFERCOMP_UNROLL
            for (int v = 0; v < PANEL_VECTORS; ++v) {
                const T* source = halves[v * NATIVE_LANES / LANES].first + v * NATIVE_LANES % LANES;
                use(words_from(source + step * PER_WORD * row_stride), step, v, PER_WORD);
            }
        }
        for (; step * PER_WORD < k; ++step) {
            const int count = k - step * PER_WORD < PER_WORD ? int(k - step * PER_WORD) : PER_WORD;
            INFERCOMP_UNROLL
            for (int v = 0; v < PANEL_VECTORS; ++v) use(gather_words(step, v, count), step, v, count);
        }
    }

private:
    // Rows are pages apart, and only a few bytes of each are wanted.
    static constexpr int64_t PREFETCH_ROWS = 16;

    INFERCOMP_INLINE native_u32 words_from(const T* source) const {
        __builtin_prefetch(source + PREFETCH_ROWS * row_stride);
        if constexpr (sizeof(T) == 4) {
            return load<native_u32>(source);
        } else {
            __builtin_prefetch(source + (PREFETCH_ROWS + 1) * row_stride);
            const native_u32 low = load_widened(source);
            const native_u32 high = load_widened(source + row_stride);
            return low | high << 16;
        }
    }

    native_u32 gather_words(int64_t step, int v, int count) const {
        const ColumnRun<T>& run = halves[v * NATIVE_LANES / LANES];
        T weights[NATIVE_LANES][WEIGHTS_PER_WORD<T>] = {};
        for (int i = 0; i < NATIVE_LANES && v * NATIVE_LANES % LANES + i < run.count; ++i) {
            const T* source = run.first + step * WEIGHTS_PER_WORD<T> * row_stride + v * NATIVE_LANES % LANES + i;
            for (int j = 0; j < count; ++j) weights[i][j] = source[j * row_stride];
        }
        return load<native_u32>(weights);
    }
};

// The same bytes as infercomp/codegen/weight_panels.py makes of these rows or columns.
template <class Source>
inline void pack_panel(const Source& weight, int64_t k, void* panel) {
    uint32_t* words_of_panel = static_cast<uint32_t*>(panel);
    weight.for_each_word(k, [&](native_u32 words, int64_t step, int v, int) INFERCOMP_INLINE_LAMBDA {
        store(words_of_panel + step * PANEL + v * NATIVE_LANES, words);
    });
}

}  // namespace infercomp
