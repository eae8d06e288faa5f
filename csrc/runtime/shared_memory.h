// Memory that the threads of a block share. Tests run kernels on the CPU, where the header that
// stands in for CUDA's own defines both.
#pragma once

#include <cuda_runtime.h>

// Of a type without constructors; nothing is in it yet.
#ifndef NAR_SHARED
#define NAR_SHARED(Type, name) __shared__ Type name
#endif

// Of a size that the launch tells.
#ifndef NAR_DYNAMIC_SHARED
#define NAR_DYNAMIC_SHARED(Type, name)      \
  extern __shared__ uint4 dynamic_shared[]; \
  Type* name = reinterpret_cast<Type*>(dynamic_shared)
#endif
