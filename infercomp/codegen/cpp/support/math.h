// Elementary functions without branches. F is float, which GCC vectorises in simd loops, or a vector of floats.
//
// Bounds are against the exact value, in units in the last place. They hold down to 1e-36, and for exp down to the
// smallest normal number; what is smaller may become 0. NaN stays NaN. Each template is one sequence of operations, so
// a value gives the same bits in a loop, in its remainder and in a vector.
#pragma once

#include <cmath>
#include <cstdint>

#include "lanes.h"

namespace infercomp {
namespace math {

template <class F>
struct WordsOf {
    typedef uint32_t type __attribute__((vector_size(sizeof(F))));
};

template <>
struct WordsOf<float> {
    typedef uint32_t type;
};

template <class F>
using Words = typename WordsOf<F>::type;

template <class F>
INFERCOMP_INLINE Words<F> to_words(F value) {
    static_assert(sizeof(Words<F>) == sizeof(F));
    Words<F> words;
    __builtin_memcpy(&words, &value, sizeof(F));
    return words;
}

template <class F>
INFERCOMP_INLINE F from_words(Words<F> words) {
    F value;
    __builtin_memcpy(&value, &words, sizeof(F));
    return value;
}

template <class F>
INFERCOMP_INLINE F constant(float value) {
    return value - F{};
}

template <class F, class Mask>
INFERCOMP_INLINE F select(Mask mask, F chosen, F otherwise) {
    return mask ? chosen : otherwise;
}

template <class F>
INFERCOMP_INLINE F absolute(F x) {
    return from_words<F>(to_words(x) & 0x7fffffffu);
}

template <class F>
INFERCOMP_INLINE F copy_sign(F magnitude, F sign) {
    return from_words<F>((to_words(magnitude) & 0x7fffffffu) | (to_words(sign) & 0x80000000u));
}

template <class F, class... Rest>
INFERCOMP_INLINE F horner(F x, F sum, float next, Rest... rest) {
    sum = sum * x + next;
    if constexpr (sizeof...(rest) == 0) {
        return sum;
    } else {
        return horner(x, sum, rest...);
    }
}

// Coefficients from the highest power down.
template <class F, class... Rest>
INFERCOMP_INLINE F polynomial(F x, float highest, Rest... rest) {
    return horner(x, constant<F>(highest), rest...);
}

constexpr float INFINITE = __builtin_inff();
constexpr float SMALLEST_NORMAL = 0x1p-126f;
constexpr float LOG2_E = 1.44269504f;
// ln 2 in two parts; small integers times the first are exact.
constexpr float LN_2_HIGH = 0.693145752f;
constexpr float LN_2_LOW = 1.42860677e-06f;
// Adding it rounds to an integer, which is then in the low bits of the sum.
constexpr float ROUNDER = 12582912.0f;

// e^x, where x = n ln 2 + rest and the low bits of `rounded` are n.
template <class F>
INFERCOMP_INLINE F finish_exp(F x, F rounded, F rest) {
    const F tail = polynomial(rest, 1.37897190e-3f, 8.35693099e-3f, 4.16667797e-2f, 1.66665211e-1f, 0.5f);
    const F power = 1.0f + (rest + rest * rest * tail);
    F result = from_words<F>(to_words(power) + (to_words(rounded) << 23));
    result = select(x > 88.7228317f, constant<F>(INFINITE), result);
    result = select(x < -87.3365402f, constant<F>(0), result);
    return select(x != x, x, result);
}

// 2 ulp.
template <class F>
INFERCOMP_INLINE F exp(F x) {
    const F rounded = x * LOG2_E + ROUNDER;
    const F n = rounded - ROUNDER;
    return finish_exp(x, rounded, x - n * LN_2_HIGH - n * LN_2_LOW);
}

// e^(x + correction) for a small correction, such as the rounding error of x. 2 ulp.
template <class F>
INFERCOMP_INLINE F exp_corrected(F x, F correction) {
    const F rounded = x * LOG2_E + ROUNDER;
    const F n = rounded - ROUNDER;
    return finish_exp(x, rounded, x - n * LN_2_HIGH - n * LN_2_LOW + correction);
}

// 2^x for x <= 0, exactly 1 for 0 and exactly 0 below -126. 2 ulp.
template <class F>
INFERCOMP_INLINE F exp2_nonpositive(F x) {
    constexpr float BIASED_ROUNDER = ROUNDER + 127;
    const F rounded = x + BIASED_ROUNDER;
    const F rest = x - (rounded - BIASED_ROUNDER);
    const F power = polynomial(rest, 1.58474140e-4f, 1.34176234e-3f, 9.61705390e-3f, 5.55027202e-2f, 2.40226552e-1f,
                               6.93147242e-1f, 1.0f);
    const F scale = from_words<F>(to_words(rounded) << 23);
    return select(x < -126.0f, constant<F>(0), power * scale);
}

// 3 ulp.
template <class F>
INFERCOMP_INLINE F tanh(F x) {
    const F size = absolute(x);
    const F square = x * x;
    const F tail =
        polynomial(square, -5.92717109e-3f, 2.08263043e-2f, -5.37940003e-2f, 1.33320644e-1f, -3.33333045e-1f);
    const F near = size + size * (square * tail);
    const F far = 1.0f - 2.0f / (exp(size + size) + 1.0f);
    return copy_sign(select(size > 0.6f, far, near), x);
}

// 3 ulp.
template <class F>
INFERCOMP_INLINE F erf(F x) {
    const F size = absolute(x);
    const F square = x * x;
    const F tail = polynomial(square, 7.80690406e-5f, -7.99785310e-4f, 5.18716220e-3f, -2.68533472e-2f, 1.12835787e-1f,
                              -3.76126260e-1f, 1.28379166e-1f);
    const F near = size + size * tail;
    const F capped = select(size > 4.0f, constant<F>(4), size);
    const F log_complement = polynomial(capped, -2.16925403e-5f, 4.41425480e-4f, -4.20510676e-3f, 2.52099875e-2f,
                                        -1.08421713e-1f, -6.33216619e-1f, -1.12958026e0f, 1.88468170e-4f);
    return copy_sign(select(size > 1.0f, 1.0f - exp(log_complement), near), x);
}

// 3 ulp.
template <class F>
INFERCOMP_INLINE F sigmoid(F x) {
    return 1.0f / (1.0f + exp(-x));
}

// x sigmoid(x). 3 ulp; NaN at -inf, as in PyTorch.
template <class F>
INFERCOMP_INLINE F silu(F x) {
    return x / (1.0f + exp(-x));
}

// x Φ(x). 6 ulp, below -5 up to 16, where x (1 + erf(x / √2)) / 2 keeps no digit; NaN at -inf, as in PyTorch.
template <class F>
INFERCOMP_INLINE F gelu(F x) {
    const F magnitude = absolute(x);
    const F size = select(magnitude > 14.5f, constant<F>(14.5f), magnitude);
    // size² = leading² + correction, exactly enough for the exponent.
    const F leading = from_words<F>(to_words(size) & 0xfffff000u);
    const F density = exp_corrected(-0.5f * (leading * leading), -0.5f * ((size - leading) * (size + leading)));
    const F t = 3.0f / (3.0f + size) - 0.59375f;
    const F ratio = polynomial(t, -2.98204310e-2f, 5.54557240e-3f, 5.77342920e-2f, -2.87908800e-2f, -1.19329830e-1f,
                               4.76037080e-2f, 3.97423200e-1f, 6.01223230e-1f, 5.15257060e-1f, 1.64858060e-1f);
    const F upper_tail = density * ratio;
    return x * select(x < 0.0f, upper_tail, 1.0f - upper_tail);
}

// x (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2. 4 ulp, plus 5 for each unit of the tanh's argument; NaN at -inf.
template <class F>
INFERCOMP_INLINE F gelu_tanh(F x) {
    return x / (1.0f + exp(x * (x * x * -0.0713548163f + -1.59576912f)));
}

// 2 ulp.
template <class F>
INFERCOMP_INLINE F log(F x) {
    const auto is_subnormal = x < SMALLEST_NORMAL;
    const Words<F> words = to_words(select(is_subnormal, x * 0x1p23f, x));
    // Mantissas from √½ to √2, so that the logarithm of a number near 1 has no part that cancels.
    const Words<F> exponent = (words + (0x3f800000u - 0x3f3504f3u)) >> 23;
    const F fraction = from_words<F>(words - (exponent << 23) + 0x3f800000u) - 1.0f;
    const F bias = select(is_subnormal, constant<F>(ROUNDER + 150), constant<F>(ROUNDER + 127));
    const F n = from_words<F>(exponent + 0x4b400000u) - bias;
    const F tail = polynomial(fraction, 5.32768629e-2f, -1.09182693e-1f, 1.21099308e-1f, -1.25492096e-1f,
                              1.42096370e-1f, -1.66593686e-1f, 2.00022221e-1f, -2.50001669e-1f, 3.33333135e-1f);
    const F of_fraction = fraction + fraction * fraction * (tail * fraction - 0.5f);
    F result = n * LN_2_HIGH + (n * LN_2_LOW + of_fraction);
    result = select(x == INFINITE, x, result);
    result = select(x == 0.0f, constant<F>(-INFINITE), result);
    return select(x >= 0.0f, result, constant<F>(__builtin_nanf("")));
}

inline float sqrt(float x) { return __builtin_sqrtf(x); }

// 2 ulp.
inline float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }

inline float sin(float x) { return std::sin(x); }

inline float cos(float x) { return std::cos(x); }

inline float pow(float base, float exponent) { return std::pow(base, exponent); }

}  // namespace math
}  // namespace infercomp
