// What this machine reaches at most: streaming reads, and multiply-adds on values that never leave the registers.
// Each function runs once and returns how many bytes or operations a second all of its threads did together.
#include <chrono>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "gemm.h"
#include "step.h"

namespace infercomp {
namespace {

// A value that the compiler knows nothing about, in a vector register.
#if defined(__aarch64__)
#define INFERCOMP_OPAQUE(value) asm volatile("" : "+w"(value))
#else
#define INFERCOMP_OPAQUE(value) asm volatile("" : "+v"(value))
#endif

constexpr int NUM_SUMS = 12;  // hides the latency of two units, and leaves AVX2 four registers
constexpr int64_t BLOCK_BYTES = 4096;

// The time from when all threads are at work until the last is done.
template <class Work>
double seconds_of(int num_threads, Work work) {
    std::atomic<int> num_ready{0};
    std::vector<std::thread> threads;
    const auto arrive = [&] {
        num_ready.fetch_add(1);
        while (num_ready.load() < num_threads) std::this_thread::yield();
    };
    for (int thread = 1; thread < num_threads; ++thread) {
        threads.emplace_back([&, thread] {
            arrive();
            work(thread);
        });
    }
    arrive();
    const auto start = std::chrono::steady_clock::now();
    work(0);
    for (std::thread& thread : threads) thread.join();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Results go where the compiler cannot see that nobody reads them.
std::atomic<uint32_t> sink;

template <int COUNT, class Vector>
INFERCOMP_INLINE void consume(const Vector (&sums)[COUNT]) {
    // Copied one by one: an array whose address is passed on would live in memory from the beginning.
    Vector copies[COUNT];
    INFERCOMP_UNROLL
    for (int i = 0; i < COUNT; ++i) store(&copies[i], sums[i]);
    uint32_t words[sizeof(copies) / 4], mixed = 0;
    std::memcpy(words, copies, sizeof(copies));
    for (uint32_t word : words) mixed ^= word;
    sink.fetch_xor(mixed, std::memory_order_relaxed);
}

// Streams of whole registers from as many places as `STREAMS`, each read from its beginning to its end.
template <int STREAMS>
void read_streams(const char* memory, int64_t num_bytes) {
    const int64_t length = num_bytes / STREAMS / BLOCK_BYTES * BLOCK_BYTES;
    native_u32 even[STREAMS] = {}, odd[STREAMS] = {};
    for (int64_t position = 0; position < length; position += 2 * int64_t(sizeof(native_u32))) {
        INFERCOMP_UNROLL
        for (int stream = 0; stream < STREAMS; ++stream) {
            const char* source = memory + stream * length + position;
            __builtin_prefetch(source + PREFETCH_BYTES);
            even[stream] ^= load<native_u32>(source);
            odd[stream] ^= load<native_u32>(source + sizeof(native_u32));
        }
    }
    consume(even);
    consume(odd);
}

void read_all(const char* memory, int64_t num_bytes, int num_streams) {
    if (num_streams == 1) read_streams<1>(memory, num_bytes);
    if (num_streams == 2) read_streams<2>(memory, num_bytes);
    if (num_streams == 4) read_streams<4>(memory, num_bytes);
    if (num_streams == 8) read_streams<8>(memory, num_bytes);
}

// `multiply_add(sum)` is one instruction of `OPERATIONS` multiplications and additions a lane.
template <int OPERATIONS, class Vector, class MultiplyAdd>
double operations_per_second(int num_threads, int64_t num_rounds, MultiplyAdd multiply_add) {
    const double seconds = seconds_of(num_threads, [&](int) {
        Vector sums[NUM_SUMS] = {};
        for (int64_t round = 0; round < num_rounds; ++round) {
            INFERCOMP_UNROLL
            for (int i = 0; i < NUM_SUMS; ++i) {
                sums[i] = multiply_add(sums[i]);
                // Each sum is wanted after each round: no two rounds may become one.
                INFERCOMP_OPAQUE(sums[i]);
            }
        }
        consume(sums);
    });
    return double(OPERATIONS) * NATIVE_LANES * NUM_SUMS * double(num_rounds) * num_threads / seconds;
}

}  // namespace
}  // namespace infercomp

using namespace infercomp;

extern "C" {

// Memory of `num_bytes`, touched, on large pages where there are some; null if there is not that much.
void* infercomp_ceiling_memory(int64_t num_bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 2 << 20, num_bytes) != 0) return nullptr;
#if defined(__linux__)
    madvise(memory, num_bytes, MADV_HUGEPAGE);
#endif
    std::memset(memory, 1, num_bytes);
    return memory;
}

void infercomp_ceiling_free(void* memory) { std::free(memory); }

double infercomp_ceiling_read(const void* memory, int64_t num_bytes, int num_threads, int num_streams) {
    const int64_t share = num_bytes / num_threads / BLOCK_BYTES * BLOCK_BYTES;
    const char* bytes = static_cast<const char*>(memory);
    const double seconds =
        seconds_of(num_threads, [&](int thread) { read_all(bytes + thread * share, share, num_streams); });
    return double(share) * num_threads / seconds;
}

double infercomp_ceiling_float32(int num_threads, int64_t num_rounds) {
    native_f32 factor = native_f32{} + 0.5f, addend = native_f32{} + 1.0f;
    INFERCOMP_OPAQUE(factor);
    INFERCOMP_OPAQUE(addend);
    return operations_per_second<2, native_f32>(num_threads, num_rounds,
                                                [=](native_f32 sum) { return sum * factor + addend; });
}

double infercomp_ceiling_int8(int num_threads, int64_t num_rounds) {
    native_u32 weights = native_u32{} + 0x01020304u;
    INFERCOMP_OPAQUE(weights);
    return operations_per_second<8, native_i32>(
        num_threads, num_rounds, [=](native_i32 sum) { return add_dot_int8(sum, weights, 0x01010101); });
}

// 0 where the instruction set has no dot product of bfloat16.
double infercomp_ceiling_bfloat16(int num_threads, int64_t num_rounds) {
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
    native_u32 weights = native_u32{} + 0x3f803f80u;
    INFERCOMP_OPAQUE(weights);
    return operations_per_second<4, native_f32>(
        num_threads, num_rounds, [=](native_f32 sum) { return BF16Dot::add(sum, weights, 0x3f803f80); });
#else
    return 0;
#endif
}

}  // extern "C"
