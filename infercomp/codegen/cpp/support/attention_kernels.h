// The inner loops of attention: scores of a few rows, their probabilities, and the products with values.
//
// Keys are stored [block, channel / PAIR, position, PAIR] and values [block, position / PAIR, channel, PAIR], so that
// both products multiply a broadcast number with a register of neighbours and nothing is summed across lanes.
// A cache may hold codes: 8-bit integers, four to a word, and a scale for each position. The products are of codes; the
// scales are multiplied into the scores and into the probabilities.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "lanes.h"
#include "math.h"

namespace infercomp {

constexpr int UNIT = 16;
constexpr int UNIT_REGISTERS = UNIT / NATIVE_LANES;
// Positions whose probabilities are computed together.
constexpr int CHUNK = 512;
constexpr int CHUNK_UNITS = CHUNK / UNIT;
constexpr int TILE_ROWS = NATIVE_REGISTERS == 32 ? 12 : 6;
// The left side of a product is stored [channel or position / UNIT][TILE_ROWS][UNIT]: a step of the inner loop reads
// its operands at small offsets, and rows are written and read by whole registers.
constexpr int LEFT_BLOCK = TILE_ROWS * UNIT;
constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();

// How many positions (of values) or channels (of keys) lie together in a 32-bit word.
template <class T>
constexpr int PAIR = 4 / int(sizeof(T));
template <class T>
constexpr bool IS_CODES = std::is_same_v<T, int8_t>;

namespace attention_detail {

// ---- the product of left rows and right registers -------------------------------------------------------------------

// Left operands (queries, probabilities) are floats, or pairs of bfloat16 where the machine multiplies these.
#if defined(__AVX512BF16__)
template <class T>
using Left = std::conditional_t<std::is_same_v<T, bf16>, uint32_t, float>;
#else
template <class T>
using Left = float;
#endif

template <class T>
constexpr bool PAIRED = std::is_same_v<Left<T>, uint32_t>;
// Left operands per 32-bit word on the right.
template <class T>
constexpr int LEFTS = PAIRED<T> ? 1 : PAIR<T>;

template <class T>
INFERCOMP_INLINE native_f32 right_floats(native_u32 words, int part) {
    if constexpr (sizeof(T) == 4) return math::from_words<native_f32>(words);
    if constexpr (IS_CODES<T>) return __builtin_convertvector((native_i32)(words << (24 - 8 * part)) >> 24, native_f32);
    return math::from_words<native_f32>(part == 0 ? words << 16 : words & 0xffff0000u);
}

template <class T, int ROWS, int COLUMNS>
INFERCOMP_INLINE void add_word(native_f32 (&sums)[ROWS][COLUMNS], const native_u32 (&words)[COLUMNS],
                               const float* left) {
    INFERCOMP_UNROLL
    for (int part = 0; part < PAIR<T>; ++part) {
        native_f32 right[COLUMNS];
        INFERCOMP_UNROLL
        for (int column = 0; column < COLUMNS; ++column) right[column] = right_floats<T>(words[column], part);
        INFERCOMP_UNROLL
        for (int row = 0; row < ROWS; ++row) {
            const float factor = left[row * UNIT + part];
            INFERCOMP_UNROLL
            for (int column = 0; column < COLUMNS; ++column) sums[row][column] += right[column] * factor;
        }
    }
}

#if defined(__AVX512BF16__)
template <class T, int ROWS, int COLUMNS>
INFERCOMP_INLINE void add_word(native_f32 (&sums)[ROWS][COLUMNS], const native_u32 (&words)[COLUMNS],
                               const uint32_t* left) {
    INFERCOMP_UNROLL
    for (int row = 0; row < ROWS; ++row) {
        const __m512i factors = _mm512_set1_epi32(int(left[row * UNIT]));
        INFERCOMP_UNROLL
        for (int column = 0; column < COLUMNS; ++column) {
            sums[row][column] =
                (native_f32)_mm512_dpbf16_ps((__m512)sums[row][column], (__m512bh)factors, (__m512bh)words[column]);
        }
    }
}
#endif

// sums[row][column] += left[row] · right[column] over so many words, `right_step` elements apart; moves `right` on.
// `ahead` is what will be read later: where a word is used for long, the hardware does not look that far.
template <class T, int ROWS, int COLUMNS>
INFERCOMP_INLINE void add_products(native_f32 (&sums)[ROWS][COLUMNS], const Left<T>* left, const T* (&right)[COLUMNS],
                                   int64_t right_step, int64_t words, const T* (&ahead)[COLUMNS]) {
    for (int64_t word = 0; word < words; ++word) {
        native_u32 loaded[COLUMNS];
        INFERCOMP_UNROLL
        for (int column = 0; column < COLUMNS; ++column) {
            loaded[column] = load<native_u32>(right[column]);
            right[column] += right_step;
            if constexpr (ROWS >= 4 || PAIR<T> > 1) __builtin_prefetch(ahead[column]);
            ahead[column] += right_step;
        }
        add_word<T, ROWS, COLUMNS>(sums, loaded, left);
        left += LEFTS<T>;
    }
}

// Registers side by side for a number of rows: with these, sums, right operands and a factor fit the register file.
constexpr int columns_for(int rows) { return rows <= (NATIVE_REGISTERS == 32 ? 6 : 2) ? 4 : 2; }

// Calls function(std::integral_constant<int, rows>) for a number of rows that kernels exist for.
template <class Function>
INFERCOMP_INLINE void with_rows(int rows, Function function) {
    switch (rows) {
        case 1: return function(std::integral_constant<int, 1>());
        case 2: return function(std::integral_constant<int, 2>());
        case 3: return function(std::integral_constant<int, 3>());
        case 4: return function(std::integral_constant<int, 4>());
        case 6: return function(std::integral_constant<int, 6>());
    }
    if constexpr (TILE_ROWS > 6) {
        if (rows == 8) return function(std::integral_constant<int, 8>());
        if (rows == 12) return function(std::integral_constant<int, 12>());
    }
}

inline int kernel_rows_at_least(int rows) { return rows <= 4 ? rows : rows <= 6 ? 6 : rows <= 8 ? 8 : 12; }

inline int kernel_rows_at_most(int rows) { return rows < 4 ? rows : rows < 6 ? 4 : rows < 8 ? 6 : rows < 12 ? 8 : 12; }

// ---- scores ---------------------------------------------------------------------------------------------------------

// scores = scale * query · key for `units` units of positions, and whatever follows until the kernel's registers are
// full. Keys that are codes have `key_scales`.
template <class T, int ROWS>
__attribute__((noinline)) void compute_scores(const Left<T>* queries, int64_t head_dim, const T* const* keys,
                                              const float* const* key_scales, int64_t key_step, int64_t units,
                                              float scale, float* scores) {
    constexpr int COLUMNS = columns_for(ROWS);
    const int64_t registers = units * UNIT_REGISTERS;
    for (int64_t first = 0; first < registers; first += COLUMNS) {
        const T* right[COLUMNS];
        const T* ahead[COLUMNS];
        native_f32 scales[COLUMNS];
        INFERCOMP_UNROLL
        for (int column = 0; column < COLUMNS; ++column) {
            const int64_t index = std::min(first + column, registers - 1);
            scales[column] = math::constant<native_f32>(scale);
            if constexpr (IS_CODES<T>) {
                scales[column] *= load<native_f32>(key_scales[index / UNIT_REGISTERS] +
                                                   index % UNIT_REGISTERS * NATIVE_LANES);
            }
            right[column] = keys[index / UNIT_REGISTERS] + index % UNIT_REGISTERS * (NATIVE_LANES * PAIR<T>);
            ahead[column] = right[column] + 4 * key_step;
            if constexpr (IS_CODES<T>) {
                // A unit is short: those that come next are fetched whole.
                const int64_t next = std::min(first + column + COLUMNS, registers - 1);
                ahead[column] = keys[next / UNIT_REGISTERS] + next % UNIT_REGISTERS * (NATIVE_LANES * PAIR<T>);
            }
        }
        native_f32 sums[ROWS][COLUMNS] = {};
        const Left<T>* left = queries;
        for (int64_t channel = 0; channel < head_dim; channel += UNIT, left += LEFT_BLOCK) {
            const int64_t words = std::min<int64_t>(UNIT, head_dim - channel) / PAIR<T>;
            add_products<T, ROWS, COLUMNS>(sums, left, right, key_step, words, ahead);
        }
        INFERCOMP_UNROLL
        for (int row = 0; row < ROWS; ++row) {
            INFERCOMP_UNROLL
            for (int column = 0; column < COLUMNS; ++column) {
                const int64_t place = (first + column) / UNIT_REGISTERS * LEFT_BLOCK +
                                      (first + column) % UNIT_REGISTERS * NATIVE_LANES;
                store(scores + place + row * UNIT, sums[row][column] * scales[column]);
            }
        }
    }
}

// ---- probabilities --------------------------------------------------------------------------------------------------

// A row's scores: `row` points to those of its first unit, `units` of them LEFT_BLOCK apart.

inline void cap_scores(float* row, int64_t units, float cap) {
    const float inverse = 1.0f / cap;
    for (int64_t unit = 0; unit < units; ++unit, row += LEFT_BLOCK) {
        for (int i = 0; i < UNIT; i += NATIVE_LANES) {
            store(row + i, math::tanh(load<native_f32>(row + i) * inverse) * cap);
        }
    }
}

inline void add_alibi(float* row, int64_t units, float slope, int64_t distance) {
    for (int64_t unit = 0; unit < units; ++unit, row += LEFT_BLOCK, distance += UNIT) {
#pragma omp simd
        for (int i = 0; i < UNIT; ++i) row[i] += slope * float(int32_t(distance) + i);
    }
}

INFERCOMP_INLINE float& score_at(float* row, int64_t position) {
    return row[position / UNIT * LEFT_BLOCK + position % UNIT];
}

inline void fill_scores(float* row, int64_t first, int64_t end, float value) {
    for (int64_t i = first; i < end; ++i) score_at(row, i) = value;
}

template <class B>
INFERCOMP_INLINE float with_bias(float score, B bias) {
    if constexpr (std::is_same_v<B, bool>) return bias ? score : MINUS_INFINITY;
    else return score + to_float(bias);
}

template <class B>
void add_bias(float* row, const B* bias, int64_t stride, int64_t first, int64_t end) {
    while (first < end) {
        if (stride == 1 && first % UNIT == 0 && end - first >= UNIT) {
            float* scores = &score_at(row, first);
#pragma omp simd
            for (int i = 0; i < UNIT; ++i) scores[i] = with_bias(scores[i], bias[first + i]);
            first += UNIT;
        } else {
            score_at(row, first) = with_bias(score_at(row, first), bias[first * stride]);
            ++first;
        }
    }
}

// Position p is in lane p % UNIT of these registers, whatever the registers' size.
template <class Combine>
INFERCOMP_INLINE float combine_lanes(native_f32 (&parts)[UNIT_REGISTERS], Combine combine) {
    INFERCOMP_UNROLL
    for (int half = UNIT_REGISTERS / 2; half > 0; half /= 2) {
        INFERCOMP_UNROLL
        for (int part = 0; part < half; ++part) parts[part] = combine(parts[part], parts[part + half]);
    }
    native_f32 result = parts[0];
    INFERCOMP_UNROLL
    for (int half = NATIVE_LANES / 2; half > 0; half /= 2) {
        native_f32 others;
        INFERCOMP_UNROLL
        for (int lane = 0; lane < NATIVE_LANES; ++lane) others[lane] = result[lane ^ half];
        result = combine(result, others);
    }
    return result[0];
}

inline float maximum_of(const float* row, int64_t units) {
    const auto larger = [](native_f32 a, native_f32 b) { return a > b ? a : b; };
    native_f32 largest[UNIT_REGISTERS];
    for (native_f32& part : largest) part = math::constant<native_f32>(MINUS_INFINITY);
    for (int64_t unit = 0; unit < units; ++unit, row += LEFT_BLOCK) {
        INFERCOMP_UNROLL
        for (int part = 0; part < UNIT_REGISTERS; ++part) {
            largest[part] = larger(largest[part], load<native_f32>(row + part * NATIVE_LANES));
        }
    }
    return combine_lanes(largest, larger);
}

INFERCOMP_INLINE native_u32 round_to_bf16(native_f32 values) {
    const native_u32 words = math::to_words(values);
    return (words + 0x7fffu + ((words >> 16) & 1u)) & 0xffff0000u;
}

// Replaces scores by exp(score - maximum), as the left operands of the second product; returns their sum. The operands
// of codes have the scales of these in them, the sum has not.
template <class T>
inline float exponentials(float* row, int64_t units, float maximum, const float* const* value_scales) {
    const float reference = maximum == MINUS_INFINITY ? 0.0f : maximum;
    native_f32 sums[UNIT_REGISTERS] = {};
    for (int64_t unit = 0; unit < units; ++unit, row += LEFT_BLOCK) {
        uint16_t* pairs = reinterpret_cast<uint16_t*>(row);
        INFERCOMP_UNROLL
        for (int part = 0; part < UNIT_REGISTERS; ++part) {
            const int i = part * NATIVE_LANES;
            native_f32 value = math::exp2_nonpositive((load<native_f32>(row + i) - reference) * math::LOG2_E);
            if constexpr (sizeof(T) == 2) value = math::from_words<native_f32>(round_to_bf16(value));
            sums[part] += value;
            if constexpr (IS_CODES<T>) value *= load<native_f32>(value_scales[unit] + i);
            if constexpr (PAIRED<T>) {
                store(pairs + i, __builtin_convertvector(math::to_words(value) >> 16, native_u16));
            } else {
                store(row + i, value);
            }
        }
    }
    return combine_lanes(sums, [](native_f32 a, native_f32 b) { return a + b; });
}

// ---- values ---------------------------------------------------------------------------------------------------------

// sums[row][channel...] += probabilities · values for positions from `first` to `end`, both multiples of PAIR.
template <class T, int ROWS, int COLUMNS>
INFERCOMP_INLINE void add_value_columns(float* sums, const Left<T>* probabilities, const T* const* units,
                                        int64_t value_dim, int64_t channel, int64_t first, int64_t end) {
    native_f32 registers[ROWS][COLUMNS];
    INFERCOMP_UNROLL
    for (int row = 0; row < ROWS; ++row) {
        INFERCOMP_UNROLL
        for (int column = 0; column < COLUMNS; ++column) {
            registers[row][column] = load<native_f32>(sums + row * value_dim + channel + column * NATIVE_LANES);
        }
    }
    while (first < end) {
        const int64_t unit = first / UNIT;
        const int64_t offset = first % UNIT;
        const int64_t count = std::min(end - first, UNIT - offset);
        const T* right[COLUMNS];
        const T* ahead[COLUMNS];
        INFERCOMP_UNROLL
        for (int column = 0; column < COLUMNS; ++column) {
            const int64_t first_channel = (channel + column * NATIVE_LANES) * PAIR<T>;
            right[column] = units[unit] + offset * value_dim + first_channel;
            ahead[column] = units[first + count < end ? unit + 1 : unit] + first_channel;
        }
        const Left<T>* left = probabilities + unit * LEFT_BLOCK + offset / PAIR<T> * LEFTS<T>;
        add_products<T, ROWS, COLUMNS>(registers, left, right, value_dim * PAIR<T>, count / PAIR<T>, ahead);
        first += count;
    }
    INFERCOMP_UNROLL
    for (int row = 0; row < ROWS; ++row) {
        INFERCOMP_UNROLL
        for (int column = 0; column < COLUMNS; ++column) {
            store(sums + row * value_dim + channel + column * NATIVE_LANES, registers[row][column]);
        }
    }
}

template <class T, int ROWS>
__attribute__((noinline)) void add_values(float* sums, const Left<T>* probabilities, const T* const* units,
                                          int64_t value_dim, int64_t first, int64_t end) {
    constexpr int COLUMNS = columns_for(ROWS);
    int64_t channel = 0;
    for (; channel + COLUMNS * NATIVE_LANES <= value_dim; channel += COLUMNS * NATIVE_LANES) {
        add_value_columns<T, ROWS, COLUMNS>(sums, probabilities, units, value_dim, channel, first, end);
    }
    for (; channel < value_dim; channel += NATIVE_LANES) {
        add_value_columns<T, ROWS, 1>(sums, probabilities, units, value_dim, channel, first, end);
    }
}

}  // namespace attention_detail
}  // namespace infercomp
