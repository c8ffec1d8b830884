// Products of float activations with weights that are codes of a table, and a few outliers (clustered_weight_linear).
#pragma once

#include "widening_panels.h"

namespace infercomp {

// Words as those of 4 bits in group_panels.h; each half of a panel has a table of 16 floats.
struct ClusterWords {
    static constexpr int PER_WORD = 8;
#if defined(__AVX512BW__)
    native_f32 tables[PANEL_VECTORS];

    explicit ClusterWords(const float* source) {
        INFERCOMP_UNROLL
        for (int v = 0; v < PANEL_VECTORS; ++v) tables[v] = load<native_f32>(source + v * LANES);
    }

    // The instruction sees the lowest four bits of each lane alone.
    INFERCOMP_INLINE native_f32 weight(native_u32 words, int i, int v) const {
        return (native_f32)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)(words >> nibble_position(i)), (__m512)tables[v]);
    }
#else
    const float* tables;

    explicit ClusterWords(const float* source) : tables(source) {}

    INFERCOMP_INLINE native_f32 weight(native_u32 words, int i, int v) const {
        const float* table = tables + v * NATIVE_LANES / LANES * LANES;
        native_f32 found;
        for (int lane = 0; lane < NATIVE_LANES; ++lane) found[lane] = table[words[lane] >> nibble_position(i) & 15];
        return found;
    }
#endif
};

// tile = Σ a table[code], then, for each half in the order in which they are stored, Σ a excess of its outliers.
// k is a multiple of 8. A panel: tables float [2][16], words, numbers of outliers int32 [2] in 64 bytes, and
// outliers [2][ROOM]: k * 16 + lane as uint32, and the excess.
template <int ROOM, class Activation>
struct ClusteredWeightPanels {
    using activation = Activation;
    using accumulator = float;
    using Widened = ClusteredWeightPanels<ROOM, float>;
    static constexpr int MAX_ROWS = ROWS_IN_REGISTERS, PANELS_OF_ONE_ROW = 1;
    static constexpr int64_t TABLES_BYTES = PANEL * 4, COUNTS_BYTES = 64;

    struct Outlier {
        uint32_t place;
        float excess;
    };

    static constexpr int64_t words_bytes(int64_t k) { return k / ClusterWords::PER_WORD * PANEL * 4; }

    static constexpr int64_t panel_bytes(int64_t k) {
        return TABLES_BYTES + words_bytes(k) + COUNTS_BYTES + 2 * ROOM * int64_t(sizeof(Outlier));
    }

    template <int ROWS>
    __attribute__((noinline)) static void multiply(const Activation* rows, int64_t row_stride, const void* panel,
                                                   int64_t k, float (*tile)[PANEL]) {
        const char* start = static_cast<const char*>(panel);
        Sums<native_f32, ROWS> sums = {};
        const ClusterWords decoder(reinterpret_cast<const float*>(start));
        const auto* words = reinterpret_cast<const uint32_t*>(start + TABLES_BYTES);
        add_products<ROWS>(decoder, rows, row_stride * int64_t(sizeof(Activation)), words, k, sums);
        store_tile(sums, tile);
        const char* counts = start + TABLES_BYTES + words_bytes(k);
        for (int half = 0; half < 2; ++half) {
            const auto* outliers = reinterpret_cast<const Outlier*>(counts + COUNTS_BYTES) + half * ROOM;
            const int32_t count = reinterpret_cast<const int32_t*>(counts)[half];
            for (int32_t i = 0; i < count; ++i) {
                const uint32_t place = outliers[i].place, lane = half * LANES + place % LANES;
                for (int row = 0; row < ROWS; ++row) {
                    const float activation = to_float(rows[row * row_stride + place / LANES]);
                    tile[row][lane] = __builtin_fmaf(outliers[i].excess, activation, tile[row][lane]);
                }
            }
        }
    }
};

}  // namespace infercomp
