// Causal attention over a paged key-value cache, and writing to it.
#pragma once

#include "attention_task.h"
#include "kv_tiles.h"

namespace infercomp {

// Sequence b owns the query rows query_start_loc[b] to query_start_loc[b + 1], its newest positions; all its
// seq_lens[b] positions lie in the blocks block_tables[b], their keys and values already written. A cache of type C
// that holds codes has scales.
template <class T, class C = T>
struct PagedAttention : AttentionOptions {
    const T* query;         // [tokens, query_heads, head_dim], channels contiguous
    const C* key_cache;     // [blocks, kv_heads, head_dim / PAIR, block_size, PAIR]
    const C* value_cache;   // [blocks, kv_heads, block_size / PAIR, value_dim, PAIR]
    const float* key_scale = nullptr;    // [blocks, kv_heads, block_size]
    const float* value_scale = nullptr;  // the same
    T* output;              // [tokens, query_heads, value_dim], heads and channels contiguous
    const int64_t* block_tables;
    const int64_t* seq_lens;
    const int64_t* query_start_loc;
    int64_t query_token_stride;
    int64_t query_head_stride;
    int64_t output_token_stride;
    int64_t block_table_stride;
    int64_t tokens;
    int64_t sequences;
    int64_t query_heads;
    int64_t kv_heads;
    int64_t head_dim;
    int64_t value_dim;
    int64_t block_size;     // a multiple of 16

    int64_t group() const { return attention_detail::quotient(query_heads, kv_heads); }
};

namespace attention_detail {

// Few rows a task where there would be few tasks.
template <class T, class C>
int64_t rows_per_task(const PagedAttention<T, C>& a) {
    return a.tokens * a.query_heads >= 16 * TASK_ROWS ? TASK_ROWS : TILE_ROWS;
}

// Where a sequence's blocks of rows begin, given its number and its first token. The next sequence's begin after as
// many as it needs or one more, which is then empty; so no table of them has to be made.
template <class T, class C>
int64_t first_block(const PagedAttention<T, C>& a, int64_t sequence, int64_t first_token) {
    return quotient(first_token * a.group(), rows_per_task(a)) + sequence;
}

template <class T, class C>
int64_t row_blocks(const PagedAttention<T, C>& a) {
    return a.sequences == 0 ? 0 : first_block(a, a.sequences, a.tokens);
}

template <class T, class C>
int64_t sequence_of_block(const PagedAttention<T, C>& a, int64_t block) {
    int64_t low = 0;
    int64_t high = a.sequences;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (first_block(a, middle, a.query_start_loc[middle]) <= block ? low : high) = middle;
    }
    return low;
}

// Late tokens see more keys: light and heavy blocks take turns, so that any split of the tasks is balanced.
inline int64_t balanced(int64_t i, int64_t count) { return i % 4 == 0 || i % 4 == 3 ? i / 2 : count - 1 - i / 2; }

template <class T, class C>
void find_rows(const PagedAttention<T, C>& a, int64_t sequence, int64_t kv_head, int64_t first, int64_t end,
               AttentionRow<T>* rows) {
    const int64_t group = a.group();
    int64_t token = quotient(first, group);
    int64_t in_group = first - token * group;
    token += a.query_start_loc[sequence];
    for (int64_t row = first; row < end; ++row, ++rows) {
        const int64_t head = kv_head * group + in_group;
        const int64_t position = a.seq_lens[sequence] - a.query_start_loc[sequence + 1] + token;
        rows->query = a.query + token * a.query_token_stride + head * a.query_head_stride;
        rows->output = a.output + token * a.output_token_stride + head * a.value_dim;
        rows->position = position;
        rows->first_key = a.sliding_window > 0 ? std::max<int64_t>(0, position - a.sliding_window + 1) : 0;
        rows->end_key = position + 1;
        rows->head = head;
        if (++in_group == group) in_group = 0, ++token;
    }
}

}  // namespace attention_detail

template <class T, class C>
size_t scratch_bytes(const PagedAttention<T, C>& a) {
    return attention_detail::TaskScratch<C>().place(nullptr, a.head_dim, a.value_dim);
}

// Reads sizes only.
template <class T, class C>
int64_t num_tasks(const PagedAttention<T, C>& a) {
    return attention_detail::row_blocks(a) * a.kv_heads;
}

// Tasks are independent of each other. `scratch` has scratch_bytes(a), begins at a multiple of 64 and may hold
// anything.
template <class T, class C>
void run_task(const PagedAttention<T, C>& a, int64_t task, void* scratch) {
    using namespace attention_detail;
    // One head after the other: its keys and values stay in the cache.
    const int64_t blocks = row_blocks(a);
    const int64_t kv_head = quotient(task, blocks);
    const int64_t block = balanced(task - kv_head * blocks, blocks);
    const int64_t b = sequence_of_block(a, block);
    const int64_t start = a.query_start_loc[b];
    const int64_t first = (block - first_block(a, b, start)) * rows_per_task(a);
    const int64_t end = std::min(first + rows_per_task(a), (a.query_start_loc[b + 1] - start) * a.group());
    if (first >= end) return;
    AttentionRow<T> rows[TASK_ROWS];
    find_rows(a, b, kv_head, first, end, rows);
    TiledSequence<C> sequence;
    sequence.keys = a.key_cache + kv_head * a.head_dim * a.block_size;
    sequence.values = a.value_cache + kv_head * a.value_dim * a.block_size;
    sequence.key_block_stride = a.kv_heads * a.head_dim * a.block_size;
    sequence.value_block_stride = a.kv_heads * a.value_dim * a.block_size;
    if constexpr (IS_CODES<C>) {
        sequence.key_scales = a.key_scale + kv_head * a.block_size;
        sequence.value_scales = a.value_scale + kv_head * a.block_size;
        sequence.scale_block_stride = a.kv_heads * a.block_size;
    }
    sequence.block_size = a.block_size;
    sequence.block_table = a.block_tables + b * a.block_table_stride;
    sequence.head_dim = a.head_dim;
    sequence.value_dim = sequence.stored_value_dim = a.value_dim;
    Task<T, C>(a, sequence, rows, end - first, static_cast<char*>(scratch)).run();
}

// ---- writing --------------------------------------------------------------------------------------------------------

// Token t goes to slot slot_mapping[t] = block * block_size + offset; a negative slot is skipped.
template <class T>
struct WriteKV {
    const T* key;           // [tokens, kv_heads, head_dim], channels contiguous
    const T* value;         // [tokens, kv_heads, value_dim], channels contiguous
    T* key_cache;
    T* value_cache;
    const int64_t* slot_mapping;
    int64_t tokens;
    int64_t key_token_stride;
    int64_t key_head_stride;
    int64_t value_token_stride;
    int64_t value_head_stride;
    int64_t kv_heads;
    int64_t head_dim;
    int64_t value_dim;
    int64_t block_size;
};

constexpr int64_t WRITE_TOKENS = 32;

template <class T>
int64_t num_tasks(const WriteKV<T>& w) {
    return (w.tokens + WRITE_TOKENS - 1) / WRITE_TOKENS;
}

namespace attention_detail {

// How many of the tokens from `token` on lie side by side in one unit.
template <class T>
int64_t run_of_slots(const WriteKV<T>& w, int64_t token, int64_t end) {
    const int64_t slot = w.slot_mapping[token];
    const int64_t limit = std::min(end - token, UNIT - slot % UNIT);
    int64_t count = 1;
    while (count < limit && w.slot_mapping[token + count] == slot + count) ++count;
    return count;
}

}  // namespace attention_detail

template <class T>
void run_task(const WriteKV<T>& w, int64_t task) {
    using namespace attention_detail;
    const int64_t end = std::min(w.tokens, (task + 1) * WRITE_TOKENS);
    for (int64_t token = task * WRITE_TOKENS, count = 1; token < end; token += count) {
        const int64_t slot = w.slot_mapping[token];
        count = 1;
        if (slot < 0) continue;
        count = run_of_slots(w, token, end);
        const int64_t block = quotient(slot, w.block_size);
        const int64_t offset = slot - block * w.block_size;
        for (int64_t head = 0; head < w.kv_heads; ++head) {
            const int64_t tile = (block * w.kv_heads + head) * w.block_size;
            const T* key = w.key + token * w.key_token_stride + head * w.key_head_stride;
            const T* value = w.value + token * w.value_token_stride + head * w.value_head_stride;
            store_keys(key, w.key_token_stride, count, w.head_dim, w.block_size, offset,
                       w.key_cache + tile * w.head_dim);
            store_values(value, w.value_token_stride, count, w.value_dim, w.value_dim, offset,
                         w.value_cache + tile * w.value_dim);
        }
    }
}

}  // namespace infercomp
