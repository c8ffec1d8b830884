// Matrix products of a few rows of activations with a weight in panels of 32 outputs.
//
// A panel is one sequential stream of 32-bit words: for each step along k, 32 words, one an output, each holding the
// next 1 (float), 2 (bfloat16) or 4 (INT8) weights of that output. One broadcast activation thus serves a
// whole register of outputs, and nothing is ever summed across lanes. Which row of the weight an output is, is decided
// by who packs: infercomp/codegen/weight_panels.py ahead of time, `pack_panel` here on the fly.
//
// Each output has one sum, to which products are added in ascending k. The order depends on k alone, never on how many
// rows are multiplied together, so a row's results are the same bits in every batch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "lanes.h"

#define INFERCOMP_INLINE_LAMBDA __attribute__((always_inline))

namespace infercomp {

constexpr int PANEL = 32;
constexpr int PANEL_VECTORS = PANEL / NATIVE_LANES;
// Three quarters of the registers hold sums, the others weights and broadcast activations.
constexpr int REGISTERS_OF_SUMS = NATIVE_REGISTERS * 3 / 4;
constexpr int ROWS_IN_REGISTERS = REGISTERS_OF_SUMS / PANEL_VECTORS;
// More rows share each weight where a panel is taken in passes, a part of its outputs at a time: at least two registers
// of them, which share each broadcast activation.
constexpr int ROWS_IN_PASSES = REGISTERS_OF_SUMS / 2;
// Products of integers gain nothing by that: to take a weight apart is a small part of their work.
constexpr int ROWS_OF_INTEGERS = ROWS_IN_REGISTERS < 3 ? ROWS_IN_PASSES : ROWS_IN_REGISTERS;

// Cores with registers of 256 bits bring a single row's weights faster in two streams, from two panels side by side,
// whose sums their registers hold.
constexpr int MAX_PANELS = PANEL_VECTORS == 4 ? 2 : 1;

// How many of a panel's registers of outputs so many rows take in one pass.
template <int ROWS>
constexpr int vectors_of_pass() {
    int vectors = PANEL_VECTORS;
    while (vectors > 2 && ROWS * vectors > REGISTERS_OF_SUMS) vectors /= 2;
    return vectors;
}
// So few rows are one tile, which meets each panel once and waits for it; with more, panels come from a cache.
constexpr int ROWS_READ_ONCE = 11;
// Rows that lie a multiple of 4 KiB apart share one set of the first-level cache, which has so many ways.
constexpr int ROWS_OF_ONE_SET = 8;
// Fewer where a square of weights is transposed in registers too.
constexpr int UNPACKED_ROWS_IN_REGISTERS = PANEL_VECTORS > 2 ? 1 : NATIVE_REGISTERS / 4 / PANEL_VECTORS;

template <class Vector, int ROWS, int VECTORS = PANEL_VECTORS>
using Sums = Vector[ROWS][VECTORS];

template <class To, class From>
INFERCOMP_INLINE To reinterpret(From value) {
    static_assert(sizeof(To) == sizeof(From));
    return (To)value;
}

INFERCOMP_INLINE native_f32 to_floats(native_i32 values) { return __builtin_convertvector(values, native_f32); }

// A tile of few rows waits for memory: hints run so far ahead of the words in use, in one stream or in two.
constexpr int64_t PREFETCH_BYTES = 2048, PREFETCH_BYTES_OF_TWO = 768;

template <int ROWS, int VECTORS = PANEL_VECTORS>
INFERCOMP_INLINE void prefetch(const void* words, int64_t num_bytes, int64_t bytes_to_second = 0) {
    constexpr bool ARE_TWO = VECTORS > PANEL_VECTORS;
    if constexpr (ROWS <= ROWS_READ_ONCE) {
        const char* ahead = static_cast<const char*>(words) + (ARE_TWO ? PREFETCH_BYTES_OF_TWO : PREFETCH_BYTES);
        INFERCOMP_UNROLL
        for (int64_t line = 0; line < num_bytes; line += 64) {
            __builtin_prefetch(ahead + line);
            if constexpr (ARE_TWO) __builtin_prefetch(ahead + bytes_to_second + line);
        }
    }
}

template <int ROWS, int VECTORS = PANEL_VECTORS>
INFERCOMP_INLINE void prefetch_words(const void* words, int64_t second = 0) {
    prefetch<ROWS, VECTORS>(words, std::min(VECTORS, PANEL_VECTORS) * NATIVE_LANES * 4, second * 4);
}

// Where a register of outputs is in what a panel has of each output. Registers of a second panel, which lies `second`
// such elements further on, are counted after those of the first.
INFERCOMP_INLINE int64_t place_of(int v, int64_t second) {
    return v % PANEL_VECTORS * NATIVE_LANES + v / PANEL_VECTORS * second;
}

// The outputs from register `first` of each row on; a second panel's rows come after the first's.
template <int ROWS, int VECTORS, class Vector, class T>
INFERCOMP_INLINE void store_tile(const Vector (&sums)[ROWS][VECTORS], T (*tile)[PANEL], int first = 0) {
    INFERCOMP_UNROLL
    for (int row = 0; row < ROWS; ++row) {
        INFERCOMP_UNROLL
        for (int v = 0; v < VECTORS; ++v) {
            store(tile[row + v / PANEL_VECTORS * ROWS] + first * NATIVE_LANES + place_of(v, 0), sums[row][v]);
        }
    }
}

}  // namespace infercomp
