// The logarithm that every backend computes: nar_kernels/spec/float_math.py.
#pragma once

#include "runtime/host_device.h"

namespace nar {

// Compiled once per instruction set (see levels/kernels.h).
namespace {

constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // ln 2 in two parts

// log(2**exponent * (1 + f)), f in [sqrt(1/2) - 1, sqrt(2) - 1], of a float or a vector. Cephes.
template <typename Float>
NAR_HOST_DEVICE inline Float log_of_parts(Float exponent, Float f) {
  Float y = 7.0376836292e-2f * f - 1.1514610310e-1f;
  y = y * f + 1.1676998740e-1f;
  y = y * f - 1.2420140846e-1f;
  y = y * f + 1.4249322787e-1f;
  y = y * f - 1.6668057665e-1f;
  y = y * f + 2.0000714765e-1f;
  y = y * f - 2.4999993993e-1f;
  y = y * f + 3.3333331174e-1f;
  y = y * f * (f * f) + exponent * kLn2Low - 0.5f * (f * f);
  return f + y + exponent * kLn2High;
}

}  // namespace
}  // namespace nar
