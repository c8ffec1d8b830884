// Softmax attention of some query rows over the tiled keys and values of one sequence.
//
// The bits of a row depend on its query, the keys and values that it sees and the options only:
//   - positions are cut into chunks at multiples of CHUNK; within one, each row is computed by itself, in ascending
//     order of positions, and the results of chunks are merged in ascending order;
//   - a hidden position is never multiplied with its value, adds exactly 0 to the sum of lane (position % UNIT) and
//     -inf to the maximum, so it does not matter which hidden positions were looked at, nor what is stored there.
//     Where values are codes it is multiplied by exactly 0, which changes no sum, as every code is finite.
//
// T is the type of queries and outputs, C that of keys and values.
#pragma once

#include "attention_kernels.h"

namespace infercomp {

// Rows of a task: some tiles that take turns on the same chunk of keys and values, while it is in the cache.
constexpr int TASK_ROWS = 48;

struct AttentionOptions {
    float scale = 1;
    int64_t sliding_window = 0;           // keys this many or more positions back are hidden; 0: none are
    float logit_softcap = 0;              // 0: none
    const float* alibi_slopes = nullptr;  // [query heads]
    const float* sinks = nullptr;         // [query heads]
};

enum class BiasKind { NONE, FLOAT, BFLOAT16, BOOL };

// One query head at one position. It sees the keys from first_key up to end_key.
template <class T>
struct AttentionRow {
    const T* query;
    T* output;
    int64_t position;
    int64_t first_key;
    int64_t end_key;
    int64_t head;
    const void* bias = nullptr;  // of key 0
};

// The keys and values of one sequence and one key-value head.
template <class C>
struct TiledSequence {
    const C* keys;
    const C* values;
    const float* key_scales = nullptr;    // [block, position], those of other heads between blocks; of codes only
    const float* value_scales = nullptr;
    int64_t scale_block_stride = 0;
    int64_t key_block_stride;
    int64_t value_block_stride;
    int64_t block_size;            // a multiple of UNIT
    const int64_t* block_table;    // nullptr: the blocks in order
    int64_t head_dim;
    int64_t value_dim;
    int64_t stored_value_dim;      // channels of a position in `values`; those after value_dim are 0
    BiasKind bias_kind = BiasKind::NONE;
    int64_t bias_stride = 0;       // from key to key

    static int64_t padded(int64_t dim) { return (dim + UNIT - 1) / UNIT * UNIT; }
    int64_t key_step() const { return block_size * PAIR<C>; }
};

namespace attention_detail {

// Of sizes, which fit 32 bits: a 64-bit division takes as long as a row of scores.
inline int64_t quotient(int64_t numerator, int64_t denominator) { return uint32_t(numerator) / uint32_t(denominator); }

// Positions relative to the chunk.
struct Range {
    int64_t first;
    int64_t end;
    bool empty() const { return first >= end; }
    bool operator==(Range other) const { return first == other.first && end == other.end; }
};

inline Range intersection(Range left, Range right) {
    return {std::max(left.first, right.first), std::min(left.end, right.end)};
}

// What is carried from chunk to chunk for a row; its sums of values are kept apart.
struct RowState {
    float maximum;
    float sum;
};

// With few registers a product takes twice as long where it also has to widen what it multiplies. The keys of a chunk are
// widened before, for so many rows that it pays.
template <class C>
constexpr bool WIDENS_KEYS = std::is_same_v<C, bf16> && !PAIRED<C> && NATIVE_REGISTERS == 16;
constexpr int WIDENING_ROWS = 2 * TILE_ROWS;

template <class C>
struct TaskScratch {
    Left<C>* queries;   // [tile][channel / UNIT][TILE_ROWS][UNIT]
    float* scores;      // [position / UNIT][TILE_ROWS][UNIT], then probabilities
    float* sums;        // [TASK_ROWS][value_dim]
    float* chunk_sums;  // [TILE_ROWS][value_dim]
    float* wide_keys;   // [position / UNIT][channel][UNIT], where keys are widened
    C* values;          // [CHUNK][value_dim], where the stored value_dim is not a multiple of UNIT
    C* pair;            // [PAIR][value_dim]

    // Hands out the parts, one after the other, and returns the number of bytes; with nullptr it only counts.
    size_t place(char* memory, int64_t head_dim, int64_t stored_value_dim) {
        const int64_t value_dim = TiledSequence<C>::padded(stored_value_dim);
        size_t used = 0;
        const auto take = [&](auto*& pointer, int64_t count) {
            pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(memory + used);
            used += (size_t(count) * sizeof(*pointer) + 63) / 64 * 64;
        };
        take(queries, TASK_ROWS * TiledSequence<C>::padded(head_dim));
        take(scores, TILE_ROWS * CHUNK);
        take(sums, TASK_ROWS * value_dim);
        take(chunk_sums, TILE_ROWS * value_dim);
        take(wide_keys, WIDENS_KEYS<C> ? CHUNK * head_dim : 0);
        take(values, value_dim == stored_value_dim ? 0 : CHUNK * value_dim);
        take(pair, PAIR<C> * value_dim);
        return used;
    }
};

template <class T, class C = T>
class Task {
public:
    Task(const AttentionOptions& options, const TiledSequence<C>& sequence, const AttentionRow<T>* rows,
         int64_t row_count, char* memory)
        : options(options), sequence(sequence), rows(rows), row_count(row_count),
          value_dim(TiledSequence<C>::padded(sequence.value_dim)) {
        scratch.place(memory, sequence.head_dim, sequence.stored_value_dim);
    }

    void run() {
        Range seen = {std::numeric_limits<int64_t>::max(), 0};
        for (int64_t row = 0; row < row_count; ++row) {
            if (rows[row].first_key >= rows[row].end_key) continue;
            seen = {std::min(seen.first, rows[row].first_key), std::max(seen.end, rows[row].end_key)};
        }
        for (int64_t tile = 0; tile < row_count; tile += TILE_ROWS) begin_tile(tile);
        for (chunk = seen.first / CHUNK * CHUNK; chunk < seen.end; chunk += CHUNK) {
            const Range in_chunk = intersection({seen.first - chunk, seen.end - chunk}, {0, CHUNK});
            find_units(in_chunk.first / UNIT, (in_chunk.end + UNIT - 1) / UNIT);
            if constexpr (WIDENS_KEYS<C>) {
                if (row_count >= WIDENING_ROWS) widen_keys(in_chunk.first / UNIT, (in_chunk.end + UNIT - 1) / UNIT);
            }
            for (int64_t tile = 0; tile < row_count; tile += TILE_ROWS) add_chunk(tile);
        }
        for (int64_t row = 0; row < row_count; ++row) write_output(row);
    }

private:
    const AttentionOptions& options;
    const TiledSequence<C>& sequence;
    const AttentionRow<T>* rows;
    int64_t row_count;
    int64_t value_dim;
    TaskScratch<C> scratch;
    RowState states[TASK_ROWS];
    int64_t chunk;
    const C* keys[CHUNK_UNITS];
    const C* values[CHUNK_UNITS];
    const float* key_scales[IS_CODES<C> ? CHUNK_UNITS : 1];
    const float* value_scales[IS_CODES<C> ? CHUNK_UNITS : 1];

    int tile_rows(int64_t tile) const { return int(std::min<int64_t>(TILE_ROWS, row_count - tile)); }

    Left<C>* tile_queries(int64_t tile) const {
        return scratch.queries + tile * TiledSequence<C>::padded(sequence.head_dim);
    }

    Range seen_in_chunk(int64_t row) const {
        return intersection({rows[row].first_key - chunk, rows[row].end_key - chunk}, {0, CHUNK});
    }

    void begin_tile(int64_t tile) {
        const int count = tile_rows(tile);
        for (int row = 0; row < kernel_rows_at_least(count); ++row) {
            Left<C>* target = tile_queries(tile) + row * UNIT;
            for (int64_t channel = 0; channel < sequence.head_dim; channel += UNIT, target += LEFT_BLOCK) {
                const int64_t width = std::min<int64_t>(UNIT, sequence.head_dim - channel);
                if (row < count) copy_lefts(rows[tile + row].query + channel, width, target);
                else std::fill_n(target, UNIT, Left<C>(0));
            }
        }
        for (int row = 0; row < count; ++row) {
            const float sink = options.sinks ? options.sinks[rows[tile + row].head] : MINUS_INFINITY;
            states[tile + row] = {sink, sink == MINUS_INFINITY ? 0.0f : 1.0f};
            std::fill_n(scratch.sums + (tile + row) * value_dim, value_dim, 0.0f);
        }
    }

    static void copy_lefts(const T* query, int64_t width, Left<C>* target) {
        if constexpr (PAIRED<C>) {
            std::memcpy(target, query, width * sizeof(T));
        } else if (width == UNIT) {
            store(target, load_floats(query));
        } else {
            for (int64_t i = 0; i < width; ++i) target[i] = to_float(query[i]);
        }
    }

    void find_units(int64_t first, int64_t end) {
        const int64_t position = chunk + first * UNIT;
        int64_t place = quotient(position, sequence.block_size);
        int64_t offset = position - place * sequence.block_size;
        for (int64_t unit = first; unit < end; ++unit) {
            const int64_t block = sequence.block_table ? sequence.block_table[place] : place;
            keys[unit] = sequence.keys + block * sequence.key_block_stride + offset * PAIR<C>;
            values[unit] = sequence.values + block * sequence.value_block_stride + offset * sequence.stored_value_dim;
            if (value_dim != sequence.stored_value_dim) pad_values(unit);
            if constexpr (IS_CODES<C>) {
                key_scales[unit] = sequence.key_scales + block * sequence.scale_block_stride + offset;
                value_scales[unit] = sequence.value_scales + block * sequence.scale_block_stride + offset;
            }
            offset += UNIT;
            if (offset == sequence.block_size) offset = 0, ++place;
        }
    }

    void widen_keys(int64_t first, int64_t end) {
        for (int64_t unit = first; unit < end; ++unit) {
            float* target = wide_keys(unit);
            const C* source = keys[unit];
            for (int64_t channel = 0; channel < sequence.head_dim; channel += PAIR<C>) {
                INFERCOMP_UNROLL
                for (int i = 0; i < UNIT; i += NATIVE_LANES) {
                    const native_u32 words = load<native_u32>(source + i * PAIR<C>);
                    store(target + i, right_floats<C>(words, 0));
                    store(target + UNIT + i, right_floats<C>(words, 1));
                }
                source += sequence.key_step();
                target += PAIR<C> * UNIT;
            }
        }
    }

    float* wide_keys(int64_t unit) const { return scratch.wide_keys + unit * UNIT * sequence.head_dim; }

    void pad_values(int64_t unit) {
        C* target = scratch.values + unit * UNIT * value_dim;
        const C* source = values[unit];
        values[unit] = target;
        for (int position = 0; position < UNIT; position += PAIR<C>) {
            target = std::copy_n(source, sequence.stored_value_dim * PAIR<C>, target);
            target = std::fill_n(target, (value_dim - sequence.stored_value_dim) * PAIR<C>, C{});
            source += sequence.stored_value_dim * PAIR<C>;
        }
    }

    void add_chunk(int64_t tile) {
        const int count = tile_rows(tile);
        const int padded = kernel_rows_at_least(count);
        Range seen[TILE_ROWS];
        Range any = {CHUNK, 0};
        Range all = {0, CHUNK};
        for (int row = 0; row < count; ++row) {
            seen[row] = seen_in_chunk(tile + row);
            all = intersection(all, seen[row]);
            if (!seen[row].empty()) any = {std::min(any.first, seen[row].first), std::max(any.end, seen[row].end)};
        }
        if (any.empty()) return;
        // Scores are stored from here on; a multiple of UNIT.
        const int64_t origin = any.first / UNIT * UNIT;
        const int64_t units = (any.end - origin + UNIT - 1) / UNIT;
        with_rows(padded, [&](auto ROWS) { compute_tile_scores<ROWS>(tile, origin, units); });
        // Row after row in each step: what ends one row overlaps with the next.
        RowState of_chunk[TILE_ROWS];
        for (int row = 0; row < count; ++row) adjust_scores(tile + row, row, origin, units, seen[row]);
        for (int row = 0; row < count; ++row) of_chunk[row].maximum = maximum_of(tile_scores(row), units);
        for (int row = 0; row < count; ++row) {
            of_chunk[row].sum =
                exponentials<C>(tile_scores(row), units, of_chunk[row].maximum, value_scales + scale_index(origin));
        }
        std::fill_n(scratch.chunk_sums, padded * value_dim, 0.0f);
        if constexpr (IS_CODES<C>) {
            // The scale of a hidden position may be anything.
            for (int row = 0; row < count; ++row) hide(row, shown(seen[row], origin), units, 0.0f);
            add_pairs(0, padded, values, scores_from(0, -origin), {origin, origin + units * UNIT});
        } else {
            multiply_values(seen, count, padded, all, origin);
        }
        for (int row = 0; row < count; ++row) {
            if (!seen[row].empty()) merge(tile + row, row, of_chunk[row]);
        }
    }

    template <int ROWS>
    void compute_tile_scores(int64_t tile, int64_t origin, int64_t units) {
        if constexpr (WIDENS_KEYS<C>) {
            if (row_count >= WIDENING_ROWS) {
                const float* wide[CHUNK_UNITS];
                for (int64_t unit = 0; unit < units; ++unit) wide[unit] = wide_keys(origin / UNIT + unit);
                return compute_scores<float, ROWS>(tile_queries(tile), sequence.head_dim, wide, nullptr, UNIT, units,
                                                   options.scale, scratch.scores);
            }
        }
        compute_scores<C, ROWS>(tile_queries(tile), sequence.head_dim, keys + origin / UNIT,
                                key_scales + scale_index(origin), sequence.key_step(), units, options.scale,
                                scratch.scores);
    }

    float* tile_scores(int row) const { return scratch.scores + row * UNIT; }

    // Where the scales of a position's unit are in a chunk.
    static int64_t scale_index(int64_t position) { return IS_CODES<C> ? position / UNIT : 0; }

    // What a row sees, counted from the origin.
    static Range shown(Range seen, int64_t origin) {
        return seen.empty() ? Range{0, 0} : Range{seen.first - origin, seen.end - origin};
    }

    void hide(int row, Range shown, int64_t units, float value) {
        fill_scores(tile_scores(row), 0, shown.first, value);
        fill_scores(tile_scores(row), shown.end, units * UNIT, value);
    }

    void adjust_scores(int64_t index, int tile_row, int64_t origin, int64_t units, Range seen) {
        const AttentionRow<T>& row = rows[index];
        float* scores = tile_scores(tile_row);
        const Range shown = this->shown(seen, origin);
        if (options.logit_softcap != 0) cap_scores(scores, units, options.logit_softcap);
        if (options.alibi_slopes) {
            add_alibi(scores, units, options.alibi_slopes[row.head], chunk + origin - row.position);
        }
        if (sequence.bias_kind != BiasKind::NONE) add_row_bias(scores, row.bias, origin, shown);
        hide(tile_row, shown, units, MINUS_INFINITY);
    }

    void add_row_bias(float* scores, const void* bias, int64_t origin, Range shown) {
        const int64_t stride = sequence.bias_stride;
        const int64_t first_key = chunk + origin;
        if (sequence.bias_kind == BiasKind::FLOAT) {
            add_bias(scores, static_cast<const float*>(bias) + first_key * stride, stride, shown.first, shown.end);
        } else if (sequence.bias_kind == BiasKind::BFLOAT16) {
            add_bias(scores, static_cast<const bf16*>(bias) + first_key * stride, stride, shown.first, shown.end);
        } else {
            add_bias(scores, static_cast<const bool*>(bias) + first_key * stride, stride, shown.first, shown.end);
        }
    }

    // What all rows see is multiplied for all at once; before and after, each run of rows at one position by itself.
    void multiply_values(const Range* seen, int count, int padded, Range all, int64_t origin) {
        // No pair of positions is cut in two except where a row's own range begins or ends.
        all = {(all.first + 1) / 2 * 2, all.end / 2 * 2};
        if (all.empty()) all = {CHUNK, CHUNK};
        for_runs(seen, count, [&](int row, int rows) {
            add_range(row, rows, intersection(seen[row], {0, all.first}), origin);
        });
        add_range(0, padded, all, origin);
        for_runs(seen, count, [&](int row, int rows) {
            add_range(row, rows, intersection(seen[row], {all.end, CHUNK}), origin);
        });
    }

    // Calls function(first row, rows) for rows that see the same, as many at once as there is a kernel for.
    template <class Function>
    static void for_runs(const Range* seen, int count, Function function) {
        for (int row = 0; row < count;) {
            int run_end = row + 1;
            while (run_end < count && seen[run_end] == seen[row]) ++run_end;
            while (row < run_end) {
                const int rows = kernel_rows_at_most(run_end - row);
                function(row, rows);
                row += rows;
            }
        }
    }

    void add_range(int row, int rows, Range range, int64_t origin) {
        if (range.empty()) return;
        if (range.first % PAIR<C> != 0) {
            add_half_pair(row, rows, range.first, origin);
            ++range.first;
        }
        const int64_t whole_end = range.end / PAIR<C> * PAIR<C>;
        if (range.first < whole_end) add_pairs(row, rows, values, scores_from(row, -origin), {range.first, whole_end});
        if (range.first < range.end && whole_end < range.end) add_half_pair(row, rows, whole_end, origin);
    }

    // A position whose neighbour in the pair is hidden: the neighbour's value may be anything, so it is replaced by 0.
    void add_half_pair(int row, int rows, int64_t position, int64_t origin) {
        const C* source = values[position / UNIT] + position % UNIT / PAIR<C> * PAIR<C> * value_dim;
        for (int64_t i = 0; i < PAIR<C> * value_dim; ++i) {
            scratch.pair[i] = i % PAIR<C> == position % PAIR<C> ? source[i] : C{};
        }
        const C* units[1] = {scratch.pair};
        const int64_t place = position / PAIR<C> * PAIR<C> - origin;
        const float* scores = scores_from(row, place / UNIT * UNIT) + place % UNIT / PAIR<C> * LEFTS<C>;
        add_pairs(row, rows, units, scores, {0, PAIR<C>});
    }

    // A row's scores from a multiple of UNIT after the origin on.
    const float* scores_from(int row, int64_t position) const {
        return tile_scores(row) + position / UNIT * LEFT_BLOCK;
    }

    // `units` and `scores` begin at position 0 of `range`.
    void add_pairs(int row, int rows, const C* const* units, const float* scores, Range range) {
        const Left<C>* probabilities = reinterpret_cast<const Left<C>*>(scores);
        with_rows(rows, [&](auto ROWS) {
            add_values<C, ROWS>(scratch.chunk_sums + row * value_dim, probabilities, units, value_dim, range.first,
                                range.end);
        });
    }

    void merge(int64_t row, int tile_row, RowState of_chunk) {
        RowState& state = states[row];
        float* sums = scratch.sums + row * value_dim;
        const float maximum = std::max(state.maximum, of_chunk.maximum);
        const float reference = maximum == MINUS_INFINITY ? 0.0f : maximum;
        const float kept = math::exp2_nonpositive((state.maximum - reference) * math::LOG2_E);
        const float added = math::exp2_nonpositive((of_chunk.maximum - reference) * math::LOG2_E);
        const float* chunk_sums = scratch.chunk_sums + tile_row * value_dim;
        state = {maximum, state.sum * kept + of_chunk.sum * added};
#pragma omp simd
        for (int64_t i = 0; i < value_dim; ++i) sums[i] = sums[i] * kept + chunk_sums[i] * added;
    }

    void write_output(int64_t row) {
        const float sum = states[row].sum;
        const float factor = sum == 0 ? 0.0f : 1.0f / sum;
        const float* sums = scratch.sums + row * value_dim;
        T* output = rows[row].output;
        // Adding 0 turns -0 into 0: a sum that is 0 has either sign, depending on the hidden positions looked at.
#pragma omp simd
        for (int64_t i = 0; i < sequence.value_dim; ++i) output[i] = from_float<T>(sums[i] * factor + 0.0f);
    }
};

}  // namespace attention_detail
}  // namespace infercomp
