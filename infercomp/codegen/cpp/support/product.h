// A matrix product of any number of rows, cut into tasks: a block of rows times a few panels, handed tile by tile to an
// epilogue.
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

// A block of rows stays in the second-level cache while panels stream past it.
constexpr int64_t BLOCK_BYTES = 1 << 18;

template <class Format>
int64_t rows_of_block(const Product& p) {
    const int64_t row_bytes = p.reduced * int64_t(sizeof(typename Format::activation));
    const int64_t largest = std::max<int64_t>(Format::MAX_ROWS, BLOCK_BYTES / row_bytes);
    return divide_up(p.rows, std::max<int64_t>(1, divide_up(p.rows, largest)));
}

// With many rows a task has several panels, so that preparing the rows costs little.
inline int64_t panels_of_task(const Product& p) { return p.rows >= 96 ? 4 : 1; }

template <class Format>
int64_t num_product_tasks(const Product& p) {
    return p.rows == 0 ? 0 : divide_up(p.panels, panels_of_task(p)) * divide_up(p.rows, rows_of_block<Format>(p));
}

template <class From, class To>
const To* prepared_rows(const From* rows, int64_t num_rows, const Product& p, int64_t& row_stride) {
    if constexpr (std::is_same_v<From, To>) {
        return rows;
    } else {
        To* wide = static_cast<To*>(scratch(num_rows * p.reduced * sizeof(To)));
        for (int64_t row = 0; row < num_rows; ++row) {
            for (int64_t k = 0; k < p.reduced; ++k) wide[row * p.reduced + k] = to_float(rows[row * row_stride + k]);
        }
        row_stride = p.reduced;
        return wide;
    }
}

// epilogue(row, panel, products) is called once for every row and panel of the task.
template <class Format, class Epilogue>
void run_product_task(const Product& p, int64_t task, const typename Format::activation* left, const int32_t* sums,
                      const uint8_t* weights, Epilogue epilogue) {
    using Multiplied = typename WidenedOf<Format>::type;
    const int64_t panel_groups = divide_up(p.panels, panels_of_task(p)), block = rows_of_block<Format>(p);
    const int64_t begin = task / panel_groups * block, end = std::min(p.rows, begin + block);
    const int64_t first_panel = task % panel_groups * panels_of_task(p);
    const int64_t last_panel = std::min(p.panels, first_panel + panels_of_task(p));
    int64_t stride = p.row_stride;
    const auto* rows = prepared_rows<typename Format::activation, typename Multiplied::activation>(
        left + begin * stride, end - begin, p, stride);
    const int64_t tile_rows = divide_up(end - begin, divide_up(end - begin, Multiplied::MAX_ROWS));
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        const uint8_t* words = weights + panel * Multiplied::panel_bytes(p.reduced);
        for (int64_t first = begin; first < end; first += tile_rows) {
            alignas(64) typename Multiplied::accumulator tile[Multiplied::MAX_ROWS][PANEL];
            const int num_rows = int(std::min(end - first, tile_rows));
            const auto* start = rows + (first - begin) * stride;
            if constexpr (std::is_same_v<typename Format::activation, int8_t>) {
                multiply_rows<Multiplied>(num_rows, start, stride, words, p.reduced, sums + first * p.groups, tile);
            } else {
                multiply_rows<Multiplied>(num_rows, start, stride, words, p.reduced, tile);
            }
            for (int row = 0; row < num_rows; ++row) epilogue(first + row, panel, tile[row]);
        }
    }
}

}  // namespace infercomp
