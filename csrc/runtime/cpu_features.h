// Which instruction set to use, found at run time so that one binary runs on any CPU.
#pragma once

namespace nar {

enum class SimdLevel { kGeneric = 0, kAvx2 = 1, kAvx512 = 2 };

// The best that this CPU has, or less after limit_simd.
SimdLevel simd_level();

// For tests and benchmarks: use at most this level from now on.
void limit_simd(SimdLevel level);

// Calls the function of this name that was compiled for what the CPU has.
#if defined(NAR_X86)
#define NAR_OF_BEST_LEVEL(name)                                   \
  (nar::simd_level() == nar::SimdLevel::kAvx512 ? name##_avx512() \
   : nar::simd_level() == nar::SimdLevel::kAvx2 ? name##_avx2()   \
                                                : name##_generic())
#else
#define NAR_OF_BEST_LEVEL(name) name##_generic()
#endif

}  // namespace nar
