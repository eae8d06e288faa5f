// In place of CUDA's own header: what the kernels of csrc use of bfloat16.
#pragma once

#include <cstdlib>
#include <cstring>

#include "packed_halves.h"

struct __nv_bfloat16 {
  uint16_t bits;

  float value() const {
    const uint32_t wide = uint32_t{bits} << 16;
    float x;
    std::memcpy(&x, &wide, sizeof x);
    return x;
  }
  operator float() const { return value(); }
  // Of numbers that bfloat16 has: no kernel may ask for others.
  static __nv_bfloat16 from(float x) {
    uint32_t wide;
    std::memcpy(&wide, &x, sizeof wide);
    if (wide & 0xFFFF) std::abort();
    return {static_cast<uint16_t>(wide >> 16)};
  }
};
using __nv_bfloat162 = cuda_on_cpu::Two<__nv_bfloat16>;
