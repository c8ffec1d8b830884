// Attention over given keys and values. Each task packs the keys and values of one head into tiles and then works as on
// a cache of one sequence.
#pragma once

#include "attention_task.h"
#include "kv_tiles.h"

namespace infercomp {

// The last query stands at the last key. Strides lead to the next batch, head and position; channels are contiguous.
template <class T>
struct DenseAttention : AttentionOptions {
    const T* query;         // [batch, query_heads, queries, head_dim]
    const T* key;           // [batch, kv_heads, keys, head_dim]
    const T* value;         // [batch, kv_heads, keys, value_dim]
    T* output;              // [batch, query_heads, queries, value_dim]
    int64_t query_strides[3];
    int64_t key_strides[3];
    int64_t value_strides[3];
    int64_t output_strides[3];
    int64_t batch;
    int64_t query_heads;
    int64_t kv_heads;
    int64_t queries;
    int64_t keys;
    int64_t head_dim;
    int64_t value_dim;
    bool is_causal = false;
    BiasKind bias_kind = BiasKind::NONE;
    const void* bias = nullptr;        // broadcasts to [batch, query_heads, queries, keys]
    int64_t bias_strides[4] = {};      // 0 where it is broadcast

    int64_t group() const { return attention_detail::quotient(query_heads, kv_heads); }
};

namespace attention_detail {

constexpr int64_t PACKED_BLOCK = 32;

inline int64_t packed_positions(int64_t keys) { return (keys + PACKED_BLOCK - 1) / PACKED_BLOCK * PACKED_BLOCK; }

template <class T>
int64_t row_blocks(const DenseAttention<T>& a) {
    return (a.queries * a.group() + TASK_ROWS - 1) / TASK_ROWS;
}

// Into how many tasks the queries of one key-value head are split; each packs keys and values again.
template <class T>
int64_t query_splits(const DenseAttention<T>& a) {
    const int64_t heads = a.batch * a.kv_heads;
    return heads == 0 || heads >= 4 ? 1 : std::min<int64_t>(row_blocks(a), 8 / heads);
}

constexpr int64_t bias_size(BiasKind kind) { return kind == BiasKind::FLOAT ? 4 : kind == BiasKind::BFLOAT16 ? 2 : 1; }

template <class T>
void find_rows(const DenseAttention<T>& a, int64_t batch, int64_t kv_head, int64_t first, int64_t end,
               AttentionRow<T>* rows) {
    const int64_t group = a.group();
    int64_t index = quotient(first, group);
    int64_t in_group = first - index * group;
    for (int64_t row = first; row < end; ++row, ++rows) {
        const int64_t head = kv_head * group + in_group;
        const int64_t position = a.keys - a.queries + index;
        const auto place = [&](const int64_t* strides) {
            return batch * strides[0] + head * strides[1] + index * strides[2];
        };
        rows->query = a.query + place(a.query_strides);
        rows->output = a.output + place(a.output_strides);
        rows->position = position;
        rows->first_key = a.sliding_window > 0 ? std::max<int64_t>(0, position - a.sliding_window + 1) : 0;
        rows->end_key = a.is_causal ? std::max<int64_t>(0, position + 1) : a.keys;
        rows->head = head;
        rows->bias = static_cast<const char*>(a.bias) + bias_size(a.bias_kind) * place(a.bias_strides);
        if (++in_group == group) in_group = 0, ++index;
    }
}

template <class T>
TiledSequence<T> pack(const DenseAttention<T>& a, int64_t batch, int64_t kv_head, T* memory) {
    TiledSequence<T> sequence;
    const int64_t tiled_dim = TiledSequence<T>::padded(a.value_dim);
    T* keys = memory;
    T* values = memory + packed_positions(a.keys) * a.head_dim;
    const T* key = a.key + batch * a.key_strides[0] + kv_head * a.key_strides[1];
    const T* value = a.value + batch * a.value_strides[0] + kv_head * a.value_strides[1];
    if (tiled_dim != a.value_dim) std::fill_n(values, packed_positions(a.keys) * tiled_dim, T{});
    for (int64_t first = 0; first < a.keys; first += UNIT) {
        const int64_t count = std::min<int64_t>(UNIT, a.keys - first);
        const int64_t block = first / PACKED_BLOCK * PACKED_BLOCK;
        store_keys(key + first * a.key_strides[2], a.key_strides[2], count, a.head_dim, PACKED_BLOCK, first - block,
                   keys + block * a.head_dim);
        store_values(value + first * a.value_strides[2], a.value_strides[2], count, a.value_dim, tiled_dim,
                     first - block, values + block * tiled_dim);
    }
    sequence.keys = keys;
    sequence.values = values;
    sequence.key_block_stride = PACKED_BLOCK * a.head_dim;
    sequence.value_block_stride = PACKED_BLOCK * tiled_dim;
    sequence.block_size = PACKED_BLOCK;
    sequence.block_table = nullptr;
    sequence.head_dim = a.head_dim;
    sequence.value_dim = a.value_dim;
    sequence.stored_value_dim = tiled_dim;
    sequence.bias_kind = a.bias_kind;
    sequence.bias_stride = a.bias_strides[3];
    return sequence;
}

}  // namespace attention_detail

template <class T>
size_t scratch_bytes(const DenseAttention<T>& a) {
    const int64_t tiled_dim = TiledSequence<T>::padded(a.value_dim);
    const size_t packed = attention_detail::packed_positions(a.keys) * (a.head_dim + tiled_dim) * sizeof(T);
    return attention_detail::TaskScratch<T>().place(nullptr, a.head_dim, tiled_dim) + (packed + 63) / 64 * 64;
}

template <class T>
int64_t num_tasks(const DenseAttention<T>& a) {
    return a.batch * a.kv_heads * attention_detail::query_splits(a);
}

// Tasks are independent of each other. `scratch` has scratch_bytes(a), begins at a multiple of 64 and may hold
// anything.
template <class T>
void run_task(const DenseAttention<T>& a, int64_t task, void* scratch) {
    using namespace attention_detail;
    const int64_t splits = query_splits(a);
    const int64_t split = task % splits;
    const int64_t kv_head = task / splits % a.kv_heads;
    const int64_t batch = task / splits / a.kv_heads;
    char* memory = static_cast<char*>(scratch);
    const int64_t tiled_dim = TiledSequence<T>::padded(a.value_dim);
    const size_t task_bytes = TaskScratch<T>().place(nullptr, a.head_dim, tiled_dim);
    const TiledSequence<T> sequence = pack(a, batch, kv_head, reinterpret_cast<T*>(memory + task_bytes));
    const int64_t row_count = a.queries * a.group();
    // Neighbouring tasks take neighbouring tiles in turn: with a causal mask, late ones are heavier.
    for (int64_t tile = split; tile < row_blocks(a); tile += splits) {
        const int64_t first = tile * TASK_ROWS;
        const int64_t end = std::min<int64_t>(first + TASK_ROWS, row_count);
        AttentionRow<T> rows[TASK_ROWS];
        find_rows(a, batch, kv_head, first, end, rows);
        Task<T>(a, sequence, rows, end - first, memory).run();
    }
}

}  // namespace infercomp
