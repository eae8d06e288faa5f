// Floats of nar_kernels/spec/float_math.py, a number at a time: bit for bit, so nothing is fused.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace nar {
namespace {

constexpr float kLargestFloat = 3.40282347e38f;
constexpr float kLn2Upper = 0.693359375f, kLn2Lower = -2.12194440e-4f;  // ln 2 in two parts

__device__ inline float float_of_bits(uint32_t bits) {
  return __int_as_float(static_cast<int32_t>(bits));
}
__device__ inline uint32_t bits_of_float(float x) {
  return static_cast<uint32_t>(__float_as_int(x));
}

__device__ inline float exp_of_negative(float x) {
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2**23: leaves the integer below
  const float n = shifted - 12582912.0f;
  const float r = x - n * kLn2Upper - n * kLn2Lower;
  float p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const uint32_t power = (bits_of_float(shifted) << 23) + 0x3F800000u;
  return x < -87.0f ? 0.0f : p * float_of_bits(power);
}

__device__ inline float log_of_parts(float exponent, float f) {
  float y = 7.0376836292e-2f * f - 1.1514610310e-1f;
  y = y * f + 1.1676998740e-1f;
  y = y * f - 1.2420140846e-1f;
  y = y * f + 1.4249322787e-1f;
  y = y * f - 1.6668057665e-1f;
  y = y * f + 2.0000714765e-1f;
  y = y * f - 2.4999993993e-1f;
  y = y * f + 3.3333331174e-1f;
  y = y * f * (f * f) + exponent * kLn2Lower - 0.5f * (f * f);
  return f + y + exponent * kLn2Upper;
}

__device__ inline float log_of_positive(float x) {
  const int32_t bits = static_cast<int32_t>(bits_of_float(x));
  const float mantissa = float_of_bits((bits & 0x7FFFFF) | 0x3F000000);  // in [1/2, 1)
  const bool is_low = mantissa < 0.707106781f;
  const float exponent = static_cast<float>((bits >> 23) - 126 - is_low);
  return log_of_parts(exponent, (is_low ? mantissa + mantissa : mantissa) - 1.0f);
}

__device__ inline float gumbel(uint32_t word) {
  float log_of_rest;
  if (word < 1u << 30) {  // u < 1/4: 1 - u would lose its bits
    log_of_rest = log_of_parts(0.0f, -((static_cast<float>(word) + 0.5f) * 0x1p-32f));
  } else {
    log_of_rest = log_of_positive((static_cast<float>(~word >> 1) + 0.5f) * 0x1p-31f);
  }
  return -log_of_positive(-log_of_rest);
}

// No noise from this word or a larger one is above: -log(u), with room for its error.
__device__ inline float gumbel_bound(uint32_t word) {
  constexpr float kLn2 = 0.693147181f, kSlack = 1e-3f;
  return -kLn2 * __log2f((static_cast<float>(word) + 0.5f) * 0x1p-32f) + kSlack;
}

// x in [0, 1] in units of 2**-30: sums of integers are the same in any order.
__device__ inline uint32_t units(float x) {
  return static_cast<uint32_t>(static_cast<int32_t>(x * 0x1p30f + 0.5f));
}
__device__ inline float from_units(uint64_t sum) {
  return static_cast<float>(static_cast<int64_t>(sum)) * 0x1p-30f;
}

}  // namespace
}  // namespace nar
