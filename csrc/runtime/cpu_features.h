// Which instruction set to use, found at run time so that one binary runs on any CPU.
#pragma once

namespace nar {

enum class SimdLevel { kGeneric = 0, kAvx2 = 1, kAvx512 = 2 };

// The best that this CPU has, or less after limit_simd.
SimdLevel simd_level();

// For tests and benchmarks: use at most this level from now on.
void limit_simd(SimdLevel level);

}  // namespace nar
