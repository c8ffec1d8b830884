// Sixteen lanes of 32 bits in the compiler's own vector extension: one source for AVX-512, AVX2 and any other
// instruction set. Only what the extension cannot say (dot products of bytes and of bfloat16 pairs) is written per set.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INFERCOMP_INLINE inline __attribute__((always_inline))
// Register arrays stay in registers only where the loops over them are unrolled.
#define INFERCOMP_UNROLL _Pragma("GCC unroll 16")

namespace infercomp {

constexpr int LANES = 16;
typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

// As many 32-bit lanes as one register holds: a kernel that keeps its sums in registers is written in these, because a
// wider vector would live in memory.
#if defined(__AVX512BW__)
constexpr int NATIVE_LANES = 16;
#elif defined(__AVX2__)
constexpr int NATIVE_LANES = 8;
#else
constexpr int NATIVE_LANES = 4;
#endif
#if defined(__AVX512BW__) || defined(__aarch64__)
constexpr int NATIVE_REGISTERS = 32;
#else
constexpr int NATIVE_REGISTERS = 16;
#endif
typedef float native_f32 __attribute__((vector_size(NATIVE_LANES * 4)));
typedef int32_t native_i32 __attribute__((vector_size(NATIVE_LANES * 4)));
typedef uint32_t native_u32 __attribute__((vector_size(NATIVE_LANES * 4)));
typedef int16_t native_i16_pairs __attribute__((vector_size(NATIVE_LANES * 4)));
typedef uint16_t native_u16_pairs __attribute__((vector_size(NATIVE_LANES * 4)));
typedef uint16_t native_u16 __attribute__((vector_size(NATIVE_LANES * 2)));
typedef uint8_t native_u8 __attribute__((vector_size(NATIVE_LANES)));

// bfloat16 as its 16 bits; arithmetic happens in float, rounding to nearest even as in PyTorch.
struct bf16 {
    uint16_t bits;
};

inline float to_float(float value) { return value; }

inline float to_float(bf16 value) {
    const uint32_t bits = uint32_t(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

template <class T>
inline T from_float(float value);

template <>
inline float from_float<float>(float value) {
    return value;
}

template <>
inline bf16 from_float<bf16>(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return bf16{uint16_t(value != value ? 0x7fc0u : rounded)};
}

template <class V, class T>
inline V load(const T* source) {
    V result;
    std::memcpy(&result, source, sizeof(V));
    return result;
}

template <class V, class T>
inline void store(T* target, V value) {
    std::memcpy(target, &value, sizeof(V));
}

inline f32x16 splat(float value) { return value - f32x16{}; }

inline i32x16 splat(int32_t value) { return value - i32x16{}; }

// Sixteen activations as floats.
inline f32x16 load_floats(const float* source) { return load<f32x16>(source); }

inline f32x16 load_floats(const bf16* source) {
#if defined(__AVX512BW__)
    // One instruction, for which GCC 12 takes five when asked by __builtin_convertvector.
    const u32x16 bits = (u32x16)_mm512_maskz_cvtepu16_epi32(0xffff, load<__m256i>(source)) << 16;
#else
    const u32x16 bits = __builtin_convertvector(load<u16x16>(source), u32x16) << 16;
#endif
    return load<f32x16>(&bits);
}

// As many 16-bit numbers as a register has 32-bit lanes, one in each lane.
inline native_u32 load_widened(const void* source) {
#if defined(__AVX512BW__)
    return (native_u32)_mm512_maskz_cvtepu16_epi32(0xffff, load<__m256i>(source));
#elif defined(__AVX2__)
    return (native_u32)_mm256_cvtepu16_epi32(load<__m128i>(source));
#else
    return __builtin_convertvector(load<native_u16>(source), native_u32);
#endif
}

}  // namespace infercomp
