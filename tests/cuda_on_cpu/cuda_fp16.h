// In place of CUDA's own header: what the kernels of csrc use of float16.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "packed_halves.h"

struct __half {
  uint16_t bits;

  float value() const {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const float magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                            : exponent     ? std::ldexp(1024.0f + mantissa, exponent - 25)
                                           : std::ldexp(1.0f * mantissa, -24);
    return bits & 0x8000 ? -magnitude : magnitude;
  }
  operator float() const { return value(); }
  // Rounded toward 0.
  static __half truncated(float x) {
    const unsigned sign = std::signbit(x) ? 0x8000 : 0;
    if (std::isnan(x)) return {0x7FFF};
    if (std::isinf(x)) return {static_cast<uint16_t>(sign | 0x7C00)};
    const float magnitude = std::min(std::fabs(x), 65504.0f);
    int exponent;
    std::frexp(magnitude, &exponent);
    exponent = std::max(exponent + 14, 1);  // biased; 1 also of subnormal numbers
    const unsigned whole = static_cast<unsigned>(std::ldexp(magnitude, 25 - exponent));
    return {static_cast<uint16_t>(sign + (whole < 1024 ? whole : (exponent << 10) + whole - 1024))};
  }
  // Of numbers that float16 has: no kernel may ask for others.
  static __half from(float x) {
    const __half same = truncated(x);
    if (same.value() != x) std::abort();
    return same;
  }
};
using __half2 = cuda_on_cpu::Two<__half>;

inline float __half2float(__half x) { return x.value(); }
inline __half __float2half_rz(float x) { return __half::truncated(x); }
