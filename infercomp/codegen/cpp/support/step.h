// What every generated kernel may use besides mathematics: checked indices, tasks, and the table it is entered in.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "lanes.h"

namespace infercomp {

// Set by kernels that meet bad input; the step goes on with harmless values and the caller raises.
struct Errors {
    std::atomic<int64_t> index_out_of_range{0};
};

inline int64_t checked(int64_t index, int64_t extent, Errors& errors) {
    if (index >= 0 && index < extent) return index;
    if (index < 0 && index >= -extent) return index + extent;
    errors.index_out_of_range.fetch_add(1, std::memory_order_relaxed);
    return 0;
}

inline int64_t divide_up(int64_t numerator, int64_t divisor) { return (numerator + divisor - 1) / divisor; }

// Rows of so many columns that make up a task of about `elements` elements.
inline int64_t rows_per_task(int64_t columns, int64_t elements) {
    return std::max<int64_t>(1, elements / std::max<int64_t>(1, columns));
}

// The larger value, or NaN if either is NaN, as in PyTorch.
template <class T>
inline T larger(T left, T right) {
    return left > right || left != left ? left : right;
}

template <class T>
inline T smaller(T left, T right) {
    return left < right || left != left ? left : right;
}

inline int32_t bits_of(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float from_bits(int32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline bool is_finite(float value) { return (bits_of(value) & 0x7f800000) != 0x7f800000; }

inline bool is_finite(double value) { return value - value == 0; }

// Memory of the calling thread for one purpose, valid until its next request for it; begins at a multiple of 64.
template <class Purpose>
void* scratch(size_t num_bytes) {
    static thread_local std::vector<char> memory;
    if (memory.size() < num_bytes + 64) memory.resize(num_bytes + 64);
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory.data());
    return reinterpret_cast<void*>((address + 63) / 64 * 64);
}

// Memory that a task reads once, from beginning to end, and that no other call writes.
struct Stream {
    const void* start;
    int64_t num_bytes;
    int64_t bytes_to_second;  // where it reads from two places at a time, else 0
};

// A kernel: how many independent tasks a call has, and one of them. `stream` may be null.
struct Kernel {
    const char* name;
    int64_t (*num_tasks)(void* const* operands, const int64_t* sizes);
    void (*run)(void* const* operands, const int64_t* sizes, int64_t task, Errors& errors);
    Stream (*stream)(void* const* operands, const int64_t* sizes, int64_t task);
};

}  // namespace infercomp
