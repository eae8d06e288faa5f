// In place of CUDA's own header: what the kernels of csrc use of float16.
#pragma once

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
  // Of numbers that float16 has: no kernel may ask for others.
  static __half from(float x) {
    const unsigned sign = std::signbit(x) ? 0x8000 : 0;
    if (std::isinf(x)) return {static_cast<uint16_t>(sign | 0x7C00)};
    int exponent;
    std::frexp(x, &exponent);
    exponent = std::max(exponent + 14, 1);  // biased; 1 also of subnormal numbers
    const float mantissa = std::ldexp(std::fabs(x), 25 - exponent);
    if (!(mantissa < 2048) || mantissa != std::floor(mantissa) || exponent > 30) std::abort();
    const unsigned whole = static_cast<unsigned>(mantissa);
    return {static_cast<uint16_t>(sign + (whole < 1024 ? whole : (exponent << 10) + whole - 1024))};
  }
};
using __half2 = cuda_on_cpu::Two<__half>;

inline float __half2float(__half x) { return x.value(); }
inline __half __float2half(float x) { return __half::from(x); }
