// A matrix product of any number of rows, cut into tasks: a block of rows times a few panels, handed tile by tile to an
// epilogue. The weight is in panels, or stays where its owner keeps it.
#pragma once

#include <type_traits>

#include "gemm.h"
#include "step.h"

namespace infercomp {

struct Product {
    int64_t rows;
    int64_t panels;
    int64_t reduced;
    int64_t row_stride;
    int64_t groups;  // sums that each row of integer activations has
};

// The format that multiplies rows which were widened to float beforehand; itself where nothing is to be widened.
template <class Format, class = void>
struct WidenedOf {
    using type = Format;
};

template <class Format>
struct WidenedOf<Format, std::void_t<typename Format::Widened>> {
    using type = typename Format::Widened;
};

// A weight packed ahead of time.
struct Panels {
    static constexpr bool ARE_PACKED = true;
    // A block of rows stays in the second-level cache while panels stream past it.
    static constexpr int64_t BLOCK_BYTES = 1 << 18;
    const uint8_t* start;
};

// The outputs of a panel: 32 neighbours, or 16 and as many that lie `half_distance` further.
struct Outputs {
    int64_t number;
    int64_t half_distance;

    int64_t first(int64_t panel, int half) const {
        return half_distance == LANES ? panel * PANEL + half * LANES : panel * LANES + half * half_distance;
    }

    int count(int64_t panel, int half) const {
        const int64_t end = half_distance == LANES || half == 1 ? number : half_distance;
        return int(std::min<int64_t>(LANES, std::max<int64_t>(0, end - first(panel, half))));
    }
};

// A weight [N, K] in place. Its panels are put together for each block of rows anew, so a block is larger.
template <class T>
struct RowsInPlace {
    static constexpr bool ARE_PACKED = false;
    static constexpr int64_t BLOCK_BYTES = 1 << 20;
    const T* weight;
    Outputs outputs;

    template <class Use>
    void with_panel(int64_t panel, int64_t reduced, Use use) const {
        const T* rows[PANEL] = {};
        for (int half = 0; half < 2; ++half) {
            for (int i = 0; i < outputs.count(panel, half); ++i) {
                rows[half * LANES + i] = weight + (outputs.first(panel, half) + i) * reduced;
            }
        }
        use(WeightRows<T>{rows});
    }
};

// A weight [K, N] in place.
template <class T>
struct ColumnsInPlace {
    static constexpr bool ARE_PACKED = false;
    static constexpr int64_t BLOCK_BYTES = 1 << 20;
    const T* weight;
    Outputs outputs;

    template <class Use>
    void with_panel(int64_t panel, int64_t, Use use) const {
        const auto run = [&](int half) {
            return ColumnRun<T>{weight + outputs.first(panel, half), outputs.count(panel, half)};
        };
        use(WeightColumns<T>{{run(0), run(1)}, outputs.number});
    }
};

template <class Format, class Weights>
int64_t rows_of_block(const Product& p) {
    const int64_t row_bytes = std::max<int64_t>(1, p.reduced * int64_t(sizeof(typename Format::activation)));
    const int64_t largest = std::max<int64_t>(Format::MAX_ROWS, Weights::BLOCK_BYTES / row_bytes);
    return divide_up(p.rows, std::max<int64_t>(1, divide_up(p.rows, largest)));
}

// With many rows a task has several panels, so that preparing the rows costs little.
inline int64_t panels_of_task(const Product& p) { return p.rows >= 96 ? 4 : 1; }

template <class Format, class Weights>
int64_t num_product_tasks(const Product& p) {
    if (p.rows == 0) return 0;
    return divide_up(p.panels, panels_of_task(p)) * divide_up(p.rows, rows_of_block<Format, Weights>(p));
}

// What a task streams of a packed weight; nothing where its rows are many, as then it computes rather than waits.
template <class Format>
Stream product_stream(const Product& p, int64_t task, const uint8_t* panels) {
    if (p.rows > 11) return {nullptr, 0};
    const int64_t bytes = Format::panel_bytes(p.reduced);
    return {panels + task * bytes, bytes};
}

template <class From, class To>
const To* prepared_rows(const From* rows, int64_t num_rows, const Product& p, int64_t& row_stride) {
    if constexpr (std::is_same_v<From, To>) {
        return rows;
    } else {
        To* wide = static_cast<To*>(scratch<To>(num_rows * p.reduced * sizeof(To)));
        for (int64_t row = 0; row < num_rows; ++row) {
            for (int64_t k = 0; k < p.reduced; ++k) wide[row * p.reduced + k] = to_float(rows[row * row_stride + k]);
        }
        row_stride = p.reduced;
        return wide;
    }
}

// multiply(row, num_rows, tile) puts the products of those rows of a block into a tile, which goes to the epilogue.
template <class Multiplied, class Multiply, class Epilogue>
INFERCOMP_INLINE void run_tiles(int64_t num_rows, int64_t tile_rows, Multiply multiply, Epilogue epilogue) {
    for (int64_t first = 0; first < num_rows; first += tile_rows) {
        alignas(64) typename Multiplied::accumulator tile[Multiplied::MAX_ROWS][PANEL];
        const int rows = int(std::min(num_rows - first, tile_rows));
        multiply(first, rows, tile);
        for (int row = 0; row < rows; ++row) epilogue(first + row, tile[row]);
    }
}

// epilogue(row, panel, products) is called once for every row and panel of the task.
template <class Format, class Weights, class Epilogue>
void run_product_task(const Product& p, int64_t task, const typename Format::activation* left, const int32_t* sums,
                      const Weights& weights, Epilogue epilogue) {
    using Multiplied = typename WidenedOf<Format>::type;
    using Tile = typename Multiplied::accumulator(*)[PANEL];
    const int64_t panel_groups = divide_up(p.panels, panels_of_task(p)), block = rows_of_block<Format, Weights>(p);
    const int64_t begin = task / panel_groups * block, num_rows = std::min(p.rows - begin, block);
    const int64_t first_panel = task % panel_groups * panels_of_task(p);
    const int64_t last_panel = std::min(p.panels, first_panel + panels_of_task(p));
    int64_t stride = p.row_stride;
    const auto* rows = prepared_rows<typename Format::activation, typename Multiplied::activation>(
        left + begin * stride, num_rows, p, stride);
    const int64_t tile_rows = divide_up(num_rows, divide_up(num_rows, Multiplied::MAX_ROWS));
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        const auto finish = [&](int64_t row, const auto* products) { epilogue(begin + row, panel, products); };
        const auto multiply_panel = [&](const void* words) {
            run_tiles<Multiplied>(num_rows, tile_rows, [&](int64_t first, int count, Tile tile) {
                const auto* start = rows + first * stride;
                if constexpr (std::is_same_v<typename Format::activation, int8_t>) {
                    multiply_rows<Multiplied>(count, start, stride, words, p.reduced, sums + (begin + first) * p.groups, tile);
                } else {
                    multiply_rows<Multiplied>(count, start, stride, words, p.reduced, tile);
                }
            }, finish);
        };
        if constexpr (Weights::ARE_PACKED) {
            multiply_panel(weights.start + panel * Multiplied::panel_bytes(p.reduced));
        } else {
            weights.with_panel(panel, p.reduced, [&](const auto& source) {
                if (num_rows <= Multiplied::MAX_UNPACKED_ROWS) {
                    run_tiles<Multiplied>(num_rows, num_rows, [&](int64_t, int count, Tile tile) {
                        multiply_unpacked_rows<Multiplied>(count, rows, stride, source, p.reduced, tile);
                    }, finish);
                } else {
                    void* words = scratch<Panels>(Multiplied::panel_bytes(p.reduced));
                    pack_panel(source, p.reduced, words);
                    multiply_panel(words);
                }
            });
        }
    }
}

}  // namespace infercomp
