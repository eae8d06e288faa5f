// Floats of nar_kernels/spec/float_math.py, a number at a time: bit for bit, so nothing is fused.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "runtime/log_of_parts.h"

namespace nar {
namespace {

template <typename To, typename From>
__device__ To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// exp(x) for x in [-88, 0], to 2 ulp. Below -87 it is garbage, less than 1e-37.
__device__ inline float exp_of_small_negative(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2**23: leaves the integer in the low bits
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = x - n * kLn2High - n * kLn2Low;
  float p = 1.9875691500e-4f * r + 1.3981999507e-3f;  // Cephes
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * bits_as<float>((bits_as<uint32_t>(shifted) << 23) + 0x3F800000u);
}

// exp(x) for x <= 0; 0 below -87.
__device__ inline float exp_of_negative(float x) {
  return x < -87.0f ? 0.0f : exp_of_small_negative(x);
}

// A normal x > 0 as 2**exponent * (1 + f), for log_of_parts.
struct Parts {
  float exponent, f;
};

__device__ inline Parts parts_of(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const float mantissa = bits_as<float>((bits & 0x7FFFFF) | 0x3F000000);  // in [1/2, 1)
  const bool is_low = mantissa < 0.707106781f;
  const int exponent = static_cast<int>(bits >> 23) - 126 - is_low;
  return {static_cast<float>(exponent), (is_low ? mantissa + mantissa : mantissa) - 1.0f};
}

__device__ inline float log_of_positive(float x) {
  const Parts parts = parts_of(x);
  return log_of_parts(parts.exponent, parts.f);
}

// Standard Gumbel noise, -log(-log(1 - u)) with u = (word + 1/2) / 2**32: see gumbel of
// unmask_row.h.
__device__ inline float gumbel(uint32_t word) {
  const float u = (static_cast<float>(word & 0x3FFFFFFF) + 0.5f) * 0x1p-32f;
  const float rest = (static_cast<float>(~word >> 1) + 0.5f) * 0x1p-31f;
  const bool is_small = word < 1u << 30;
  const Parts parts = parts_of(rest);
  const float log = log_of_parts(is_small ? 0.0f : parts.exponent, is_small ? -u : parts.f);
  return -log_of_positive(-log);
}

}  // namespace
}  // namespace nar
