#include "runtime/cpu_features.h"

#include <algorithm>
#include <atomic>

namespace nar {
namespace {

SimdLevel detect() {
#if defined(NAR_X86)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("bmi2")) {
    return SimdLevel::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2")) {
    return SimdLevel::kAvx2;
  }
#endif
  return SimdLevel::kGeneric;
}

std::atomic<SimdLevel> limit{SimdLevel::kAvx512};

}  // namespace

SimdLevel simd_level() {
  static const SimdLevel best = detect();
  return std::min(best, limit.load(std::memory_order_relaxed));
}

void limit_simd(SimdLevel level) { limit.store(level, std::memory_order_relaxed); }

}  // namespace nar
