// A matrix product of any number of rows, cut into tasks: a block of rows times a few panels, handed tile by tile to an
// epilogue. The weight is in panels, or stays where its owner keeps it.
#pragma once

#include <type_traits>

#include "clustered_panels.h"
#include "group_panels.h"
#include "sparse_group_panels.h"
#include "step.h"

namespace infercomp {

struct Product {
    int64_t rows;
    int64_t panels;
    int64_t reduced;
    int64_t row_stride;
    int64_t groups;  // sums that each row of integer activations has
};

// The format that multiplies rows which were widened to float, or freed of their sign, beforehand; itself where nothing
// is to be done.
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

// With many rows a task has several panels, as many as stay in the second-level cache while tiles of rows pass by.
template <class Format>
int64_t panels_of_task(const Product& p) {
    constexpr int64_t BYTES = 3 << 17;
    const int64_t bytes = std::max<int64_t>(1, Format::panel_bytes(p.reduced));
    return p.rows < 96 ? 1 : std::min<int64_t>(4, std::max<int64_t>(1, BYTES / bytes));
}

// A single row may take two panels at a time. They are those of one half of the weight, and a quarter of it apart: so
// two threads have two streams each.
struct PanelPair {
    int64_t first;
    int64_t second;  // -1 where an odd number leaves the first alone
};

inline int64_t num_panel_pairs(int64_t panels) { return divide_up(divide_up(panels, 2), 2) + divide_up(panels / 2, 2); }

inline PanelPair panel_pair(int64_t panels, int64_t task) {
    const int64_t middle = divide_up(panels, 2), pairs_before = divide_up(middle, 2);
    const bool is_before = task < pairs_before;
    const int64_t begin = is_before ? 0 : middle, end = is_before ? middle : panels;
    const int64_t first = begin + (is_before ? task : task - pairs_before), second = first + divide_up(end - begin, 2);
    return {first, second < end ? second : -1};
}

template <class Format, class Weights>
constexpr bool HAS_PAIRS = Weights::ARE_PACKED && WidenedOf<Format>::type::PANELS_OF_ONE_ROW == 2;

template <class Format, class Weights>
int64_t num_product_tasks(const Product& p) {
    if (p.rows == 0) return 0;
    if (HAS_PAIRS<Format, Weights> && p.rows == 1) return num_panel_pairs(p.panels);
    return divide_up(p.panels, panels_of_task<Format>(p)) * divide_up(p.rows, rows_of_block<Format, Weights>(p));
}

// What a task streams of a packed weight; nothing where its rows are many, as then it computes rather than waits.
template <class Format>
Stream product_stream(const Product& p, int64_t task, const uint8_t* panels) {
    if (p.rows > ROWS_READ_ONCE) return {nullptr, 0, 0};
    const int64_t bytes = Format::panel_bytes(p.reduced);
    if (!HAS_PAIRS<Format, Panels> || p.rows > 1) return {panels + task * bytes, bytes, 0};
    const PanelPair pair = panel_pair(p.panels, task);
    return {panels + pair.first * bytes, bytes, pair.second < 0 ? 0 : (pair.second - pair.first) * bytes};
}

inline void prepare_row(const bf16* row, int64_t count, float* prepared) {
    for (int64_t k = 0; k < count; ++k) prepared[k] = to_float(row[k]);
}

inline void prepare_row(const int8_t* row, int64_t count, uint8_t* prepared) {
    for (int64_t k = 0; k < count; ++k) prepared[k] = uint8_t(row[k] + 128);
}

// In fours, the last filled up with zeros: those at even places before those at odd places.
inline void prepare_row(const int8_t* row, int64_t count, int16_t* prepared) {
    const int64_t whole = count / 4 * 4;
    for (int64_t k = 0; k < whole; k += 4) {
        for (int i = 0; i < 4; ++i) prepared[k + i] = row[k + i % 2 * 2 + i / 2];
    }
    if (whole == count) return;
    for (int i = 0; i < 4; ++i) {
        const int64_t from = whole + i % 2 * 2 + i / 2;
        prepared[whole + i] = from < count ? row[from] : int16_t(0);
    }
}

template <class From, class To>
const To* prepared_rows(const From* rows, int64_t num_rows, const Product& p, int64_t& row_stride) {
    if constexpr (std::is_same_v<From, To>) {
        return rows;
    } else {
        const int64_t length = (p.reduced + 3) / 4 * 4;
        To* prepared = static_cast<To*>(scratch<To>(num_rows * length * sizeof(To)));
        for (int64_t row = 0; row < num_rows; ++row) {
            prepare_row(rows + row * row_stride, p.reduced, prepared + row * length);
        }
        row_stride = length;
        return prepared;
    }
}

// The panels of a task where they are packed ahead of time, else put together in memory of the thread.
template <class Format, class Weights>
const uint8_t* panels_from(const Weights& weights, int64_t first, int64_t last, int64_t reduced) {
    const int64_t bytes = Format::panel_bytes(reduced);
    if constexpr (Weights::ARE_PACKED) {
        return weights.start + first * bytes;
    } else {
        uint8_t* packed = static_cast<uint8_t*>(scratch<Panels>((last - first) * bytes));
        for (int64_t panel = first; panel < last; ++panel) {
            uint8_t* words = packed + (panel - first) * bytes;
            weights.with_panel(panel, reduced, [&](const auto& source) { pack_panel(source, reduced, words); });
        }
        return packed;
    }
}

template <class Format>
constexpr bool HAS_INTEGER_ROWS = std::is_same_v<typename Format::activation, int8_t>;

template <class Format, class Row, class Epilogue>
void run_pair(const Product& p, PanelPair pair, const Row* row, const int32_t* sums,
              const uint8_t* panels, Epilogue epilogue) {
    using Multiplied = typename WidenedOf<Format>::type;
    alignas(64) typename Multiplied::accumulator tile[2][PANEL];
    const int64_t bytes = Multiplied::panel_bytes(p.reduced), bytes_to_second = (pair.second - pair.first) * bytes;
    const auto multiply = [&](auto... rest) {
        const uint8_t* panel = panels + pair.first * bytes;
        if (pair.second < 0) return Multiplied::template multiply<1>(row, 0, panel, p.reduced, rest...);
        Multiplied::template multiply<1, 2>(row, 0, panel, p.reduced, rest..., bytes_to_second);
    };
    if constexpr (HAS_INTEGER_ROWS<Format>) {
        multiply(sums, tile);
    } else {
        multiply(tile);
    }
    epilogue(0, pair.first, tile[0]);
    if (pair.second >= 0) epilogue(0, pair.second, tile[1]);
}

// epilogue(row, panel, products) is called once for every row and panel of the task.
template <class Format, class Weights, class Epilogue>
void run_product_task(const Product& p, int64_t task, const typename Format::activation* left, const int32_t* sums,
                      const Weights& weights, Epilogue epilogue) {
    using Multiplied = typename WidenedOf<Format>::type;
    const int64_t panels = panels_of_task<Format>(p), groups = divide_up(p.panels, panels);
    const int64_t block = rows_of_block<Format, Weights>(p);
    const int64_t begin = task / groups * block, num_rows = std::min(p.rows - begin, block);
    const int64_t first_panel = task % groups * panels, last_panel = std::min(p.panels, first_panel + panels);
    int64_t stride = p.row_stride;
    const auto* rows = prepared_rows<typename Format::activation, typename Multiplied::activation>(
        left + begin * stride, num_rows, p, stride);
    alignas(64) typename Multiplied::accumulator tile[Multiplied::MAX_ROWS][PANEL];
    if constexpr (!Weights::ARE_PACKED) {
        if (num_rows <= Multiplied::MAX_UNPACKED_ROWS) {
            for (int64_t panel = first_panel; panel < last_panel; ++panel) {
                weights.with_panel(panel, p.reduced, [&](const auto& source) {
                    multiply_unpacked_rows<Multiplied>(int(num_rows), rows, stride, source, p.reduced, tile);
                });
                for (int64_t row = 0; row < num_rows; ++row) epilogue(begin + row, panel, tile[row]);
            }
            return;
        }
    }
    if constexpr (HAS_PAIRS<Format, Weights>) {
        if (p.rows == 1) return run_pair<Format>(p, panel_pair(p.panels, task), rows, sums, weights.start, epilogue);
    }
    const uint8_t* words = panels_from<Multiplied>(weights, first_panel, last_panel, p.reduced);
    const bool share_a_set = stride * int64_t(sizeof(*rows)) % 4096 == 0;
    const int64_t most = share_a_set ? std::min(Multiplied::MAX_ROWS, ROWS_OF_ONE_SET) : Multiplied::MAX_ROWS;
    const int64_t tile_rows = divide_up(num_rows, divide_up(num_rows, most));
    for (int64_t first = 0; first < num_rows; first += tile_rows) {
        const int count = int(std::min(num_rows - first, tile_rows));
        for (int64_t panel = first_panel; panel < last_panel; ++panel) {
            const void* panel_words = words + (panel - first_panel) * Multiplied::panel_bytes(p.reduced);
            if constexpr (HAS_INTEGER_ROWS<Format>) {
                const int32_t* tile_sums = sums + (begin + first) * p.groups;
                multiply_rows<Multiplied>(count, rows + first * stride, stride, panel_words, p.reduced, tile_sums, tile);
            } else {
                multiply_rows<Multiplied>(count, rows + first * stride, stride, panel_words, p.reduced, tile);
            }
            for (int row = 0; row < count; ++row) epilogue(begin + first + row, panel, tile[row]);
        }
    }
}

}  // namespace infercomp
