// Storing rows of keys and values in the tiles that attention_kernels.h describes.
#pragma once

#include "attention_kernels.h"

namespace infercomp {
namespace attention_detail {

// A block of lanes is transposed by exchanging halves, quarters and so on between pairs of registers. The lanes of such
// a pair are numbered through.
struct Exchange {
    int32_t first[NATIVE_LANES] = {};
    int32_t second[NATIVE_LANES] = {};

    constexpr explicit Exchange(int half) {
        for (int lane = 0; lane < NATIVE_LANES; ++lane) {
            first[lane] = lane & half ? NATIVE_LANES + (lane ^ half) : lane;
            second[lane] = lane & half ? NATIVE_LANES + lane : lane ^ half;
        }
    }
};

template <int HALF = NATIVE_LANES / 2>
INFERCOMP_INLINE void transpose(native_u32 (&rows)[NATIVE_LANES]) {
    static constexpr Exchange EXCHANGE(HALF);
    const native_i32 first = load<native_i32>(EXCHANGE.first);
    const native_i32 second = load<native_i32>(EXCHANGE.second);
    INFERCOMP_UNROLL
    for (int row = 0; row < NATIVE_LANES; ++row) {
        if (row & HALF) continue;
        const native_u32 left = rows[row];
        const native_u32 right = rows[row | HALF];
        rows[row] = __builtin_shuffle(left, right, first);
        rows[row | HALF] = __builtin_shuffle(left, right, second);
    }
    if constexpr (HALF > 1) transpose<HALF / 2>(rows);
}

// The channels of NATIVE_LANES positions that fill registers; returns how many channels that are.
template <class T>
int64_t transpose_keys(const T* source, int64_t stride, int64_t head_dim, int64_t block_size, T* target) {
    constexpr int CHANNELS = NATIVE_LANES * PAIR<T>;
    int64_t channel = 0;
    for (; channel + CHANNELS <= head_dim; channel += CHANNELS) {
        native_u32 rows[NATIVE_LANES];
        INFERCOMP_UNROLL
        for (int row = 0; row < NATIVE_LANES; ++row) rows[row] = load<native_u32>(source + row * stride + channel);
        transpose(rows);
        INFERCOMP_UNROLL
        for (int row = 0; row < NATIVE_LANES; ++row) {
            store(target + (channel + row * PAIR<T>) * block_size, rows[row]);
        }
    }
    return channel;
}

// Keys of `count` neighbouring positions of a unit into the tiles of one block and one head, from `offset` on.
template <class T>
void store_keys(const T* source, int64_t stride, int64_t count, int64_t head_dim, int64_t block_size, int64_t offset,
                T* tiles) {
    T* target = tiles + offset * PAIR<T>;
    int64_t channel = 0;
    if (count == UNIT) {
        for (int i = 0; i < UNIT; i += NATIVE_LANES) {
            channel = transpose_keys(source + i * stride, stride, head_dim, block_size, target + i * PAIR<T>);
        }
    }
    for (; channel < head_dim; channel += PAIR<T>) {
        for (int64_t i = 0; i < count; ++i) {
            std::memcpy(target + channel * block_size + i * PAIR<T>, source + i * stride + channel, 4);
        }
    }
}

// Values of two positions that share their words.
inline void store_value_pairs(const bf16* first, const bf16* second, int64_t value_dim, bf16* target) {
    int64_t channel = 0;
    for (; channel + NATIVE_LANES <= value_dim; channel += NATIVE_LANES) {
        const native_u32 low = __builtin_convertvector(load<native_u16>(first + channel), native_u32);
        const native_u32 high = __builtin_convertvector(load<native_u16>(second + channel), native_u32);
        store(target + channel * 2, low | high << 16);
    }
    for (; channel < value_dim; ++channel) {
        target[channel * 2] = first[channel];
        target[channel * 2 + 1] = second[channel];
    }
}

// The same as store_keys for values, whose tiles have `tiled_dim` channels.
template <class T>
void store_values(const T* source, int64_t stride, int64_t count, int64_t value_dim, int64_t tiled_dim, int64_t offset,
                  T* tiles) {
    for (const int64_t end = offset + count; offset < end; ++offset, source += stride) {
        T* target = tiles + offset / PAIR<T> * PAIR<T> * tiled_dim;
        if constexpr (PAIR<T> == 2) {
            if (offset % 2 == 0 && offset + 1 < end) {
                store_value_pairs(source, source + stride, value_dim, target);
                ++offset;
                source += stride;
                continue;
            }
        }
        for (int64_t channel = 0; channel < value_dim; ++channel) {
            target[channel * PAIR<T> + offset % PAIR<T>] = source[channel];
        }
    }
}

}  // namespace attention_detail
}  // namespace infercomp
