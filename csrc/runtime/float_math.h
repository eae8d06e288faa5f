// Floats in vectors, and functions of them that every backend computes with the same roundings:
// plain multiplications and additions in one order, none of them fused.
// nar_kernels/spec/float_math.py has the same in PyTorch.
#pragma once

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

#include "runtime/log_of_parts.h"

namespace nar {

// Compiled once per instruction set (see levels/kernels.h). The vectors are those of the GNU
// extension, which GCC and clang lower to what the file may use.
namespace {

#if defined(__AVX512F__)
constexpr int kFloats = 16;
#elif defined(__AVX__)
constexpr int kFloats = 8;
#else
constexpr int kFloats = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * kFloats)));
typedef int32_t Ints __attribute__((vector_size(4 * kFloats)));
typedef uint32_t UInts __attribute__((vector_size(4 * kFloats)));
typedef uint16_t Shorts __attribute__((vector_size(2 * kFloats)));

inline Floats spread(float x) { return x - Floats{}; }

template <typename Vector, typename T>
inline Vector load(const T* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <typename Vector, typename T>
inline void store(T* to, Vector v) {
  std::memcpy(to, &v, sizeof v);
}

// Lane-wise maximum and minimum; b where either is NaN.
#if defined(__AVX512F__)
inline Floats larger(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
inline Floats smaller(Floats a, Floats b) { return (Floats)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX__)
inline Floats larger(Floats a, Floats b) { return (Floats)_mm256_max_ps((__m256)a, (__m256)b); }
inline Floats smaller(Floats a, Floats b) { return (Floats)_mm256_min_ps((__m256)a, (__m256)b); }
#else
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
#endif

// exp(x) for x <= 0, to 2 ulp; 0 below -87, where float32 underflows. NaN stays NaN. Interleaves
// several vectors: each is one long dependency chain, and out-of-order windows are too short to
// overlap whole chains.
template <int kCount>
inline void exp_of_negative(Floats (&x)[kCount]) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2**23: leaves the integer in the low bits
  const auto each = [](auto step) {
    for (int i = 0; i < kCount; ++i) step(i);
  };
  Floats shifted[kCount], r[kCount], p[kCount];
  each([&](int i) { shifted[i] = x[i] * 1.44269504f + kRound; });
  each([&](int i) {
    const Floats n = shifted[i] - kRound;
    r[i] = x[i] - n * kLn2High - n * kLn2Low;
  });
  each([&](int i) { p[i] = 1.9875691500e-4f * r[i] + 1.3981999507e-3f; });  // Cephes
  each([&](int i) { p[i] = p[i] * r[i] + 8.3334519073e-3f; });
  each([&](int i) { p[i] = p[i] * r[i] + 4.1665795894e-2f; });
  each([&](int i) { p[i] = p[i] * r[i] + 1.6666665459e-1f; });
  each([&](int i) { p[i] = p[i] * r[i] + 5.0000001201e-1f; });
  each([&](int i) { p[i] = p[i] * (r[i] * r[i]) + r[i] + 1.0f; });
  each([&](int i) {
    const UInts power = ((UInts)shifted[i] << 23) + 0x3F800000u;
    x[i] = x[i] < -87.0f ? Floats{} : p[i] * (Floats)power;
  });
}

inline Floats exp_of_negative(Floats x) {
  Floats one[] = {x};
  exp_of_negative(one);
  return one[0];
}

// Enough vectors to hide the latency of exp.
constexpr int kManyVectors = 4, kManyFloats = kManyVectors * kFloats;

// log(x) of a normal x > 0.
inline Floats log_of_positive(Floats x) {
  const Ints bits = (Ints)x;
  const Floats mantissa = (Floats)((bits & 0x7FFFFF) | 0x3F000000);  // in [1/2, 1)
  const Ints is_low = mantissa < 0.707106781f;
  const Floats exponent = __builtin_convertvector((bits >> 23) - 126 + is_low, Floats);
  return log_of_parts(exponent, (is_low ? mantissa + mantissa : mantissa) - 1.0f);
}

// Standard Gumbel noise, -log(-log(1 - u)) with u = (word + 1/2) / 2**32. Small words, which make
// the large noise that decides, keep all their bits; large ones are rounded to 31.
inline Floats gumbel(Ints words) {
  const Ints is_small = ((words >> 30) & 3) == 0;  // u < 1/4: 1 - u would lose its bits
  const Floats u = (__builtin_convertvector(words & 0x3FFFFFFF, Floats) + 0.5f) * 0x1p-32f;
  const Ints complement = (~words >> 1) & 0x7FFFFFFF;
  const Floats rest = (__builtin_convertvector(complement, Floats) + 0.5f) * 0x1p-31f;
  const Floats log_of_rest = is_small ? log_of_parts(Floats{}, -u) : log_of_positive(rest);
  return -log_of_positive(-log_of_rest);
}

inline void widen(const uint16_t* bfloats, int64_t count, float* floats) {
  int64_t i = 0;
  for (; i + kFloats <= count; i += kFloats) {
    const UInts bits = __builtin_convertvector(load<Shorts>(bfloats + i), UInts) << 16;
    store(floats + i, bits);
  }
  for (; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(bfloats[i]) << 16;
    std::memcpy(floats + i, &bits, sizeof bits);
  }
}

}  // namespace
}  // namespace nar
