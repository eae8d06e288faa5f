#include "levels/kernels.h"

#include "runtime/cpu_features.h"

namespace nar {

const Kernels& kernels() {
#if defined(NAR_X86)
  if (simd_level() == SimdLevel::kAvx512) return kAvx512Kernels;
  if (simd_level() == SimdLevel::kAvx2) return kAvx2Kernels;
#endif
  return kGenericKernels;
}

}  // namespace nar
