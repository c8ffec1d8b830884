// Products with weights of codes in groups, of which two in every four consecutive inputs are kept
// (sparse_group_weight_linear). infercomp/codegen/sparse_group_panels.py says how they lie.
#pragma once

#include "group_panels.h"
#include "sparse_panels.h"

namespace infercomp {

// Words of the kept codes of a block.
template <int BITS>
constexpr int SPARSE_CODE_WORDS = SPARSE_BLOCK / 2 * BITS / 32;

template <int BITS, int GROUP>
constexpr int64_t SPARSE_CODE_BYTES = GROUP / SPARSE_BLOCK * (1 + SPARSE_CODE_WORDS<BITS>) * PANEL * 4;

// Codes times floats: tile = Σ over groups of scale · Σ a (q − zero) over what is kept. k is a multiple of GROUP.
template <int BITS, int GROUP, Zeros ZEROS, class Activation>
struct SparseGroupWeightPanels {
    static_assert(32 % BITS == 0 && ZEROS != Zeros::VALUES);
    using activation = Activation;
    using accumulator = float;
    using Widened = SparseGroupWeightPanels<BITS, GROUP, ZEROS, float>;
    using Group = CodeGroup<BITS, GROUP, ZEROS, SPARSE_CODE_BYTES<BITS, GROUP>>;
    static constexpr int MAX_ROWS = SPARSE_ROWS, PANELS_OF_ONE_ROW = 1;
    static constexpr int PER_WORD = 32 / BITS;

    static constexpr int64_t panel_bytes(int64_t k) { return Group::panel_bytes(k); }

    template <int ROWS>
    __attribute__((noinline)) static void multiply(const float* rows, int64_t row_stride, const void* panel, int64_t k,
                                                   float (*tile)[PANEL]) {
        std::memset(tile, 0, sizeof(*tile) * ROWS);
        Group group{static_cast<const char*>(panel)};
        for (int64_t index = 0; index < k / GROUP; ++index) {
            for (group.first = 0; group.first < PANEL_VECTORS; group.first += vectors_of_pass<ROWS>()) {
                multiply_group<ROWS>(rows + index * GROUP, row_stride, group, tile);
            }
            group.start += Group::BYTES;
        }
    }

private:
    template <int ROWS>
    INFERCOMP_INLINE static void multiply_group(const float* rows, int64_t row_stride, const Group& group,
                                                float (*tile)[PANEL]) {
        constexpr int VECTORS = vectors_of_pass<ROWS>();
        FieldWords<BITS, VECTORS> decoder;
        INFERCOMP_UNROLL
        for (int v = 0; v < VECTORS; ++v) decoder.set_zeros(to_floats(group.points(v)), v);
        Sums<native_f32, ROWS, VECTORS> sums = {};
        const uint32_t* words = group.words();
        for (int block = 0; block < GROUP / SPARSE_BLOCK; ++block) {
            native_u32 places[VECTORS];
            prefetch_words<ROWS, VECTORS>(words);
            load_words(words, places);
            words += PANEL;
            INFERCOMP_UNROLL
            for (int word = 0; word < SPARSE_CODE_WORDS<BITS>; ++word) {
                prefetch_words<ROWS, VECTORS>(words);
                add_word<ROWS>(decoder, rows + word * 2 * PER_WORD, row_stride * 4, words, places, word, sums);
                words += PANEL;
            }
            rows += SPARSE_BLOCK;
        }
        add_group(group, sums, tile);
    }

    template <int ROWS, int VECTORS>
    INFERCOMP_INLINE static void add_word(const FieldWords<BITS, VECTORS>& decoder, const float* rows, int64_t row_bytes,
                                          const uint32_t* source, const native_u32 (&places)[VECTORS], int word,
                                          native_f32 (&sums)[ROWS][VECTORS]) {
        INFERCOMP_UNROLL
        for (int i = 0; i < PER_WORD; ++i) {
            const int value = word * PER_WORD + i, place_at = value % SPARSE_VALUES * 8 + value / SPARSE_VALUES * 2;
            INFERCOMP_UNROLL
            for (int v = 0; v < VECTORS; ++v) {
                const native_f32 weights = decoder.weight(load<native_u32>(source + v * NATIVE_LANES), i, v);
                const native_u32 shifted = places[v] >> place_at;
                INFERCOMP_UNROLL
                for (int row = 0; row < ROWS; ++row) {
                    const char* group_of_four = reinterpret_cast<const char*>(rows + i / 2 * 4) + row * row_bytes;
                    sums[row][v] += weights * pick(reinterpret_cast<const float*>(group_of_four), shifted);
                }
                // Else GCC keeps each group for the next register of outputs, and has no room for so many.
                if constexpr (ROWS > 2) asm volatile("" : : : "memory");
            }
        }
    }
};

}  // namespace infercomp
