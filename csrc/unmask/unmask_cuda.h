// `unmask` on the GPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "rng/philox.h"
#include "unmask/unmask.h"

namespace nar {

enum class GpuLogitType { kFloat32, kBfloat16, kFloat16 };

// So many forbidden ids are arguments of the kernel; more lie in the device's memory.
constexpr int kForbiddenArguments = 64;

// What a kernel is given.
struct UnmaskLaunch {
  UnmaskArgs args;
  RoundKeys keys;
  int32_t forbidden[kForbiddenArguments];  // ascending
  const int64_t* more_forbidden;
  uint32_t held_tiles;  // of a row, in shared memory
  uint32_t scratch;     // bytes, for the search and then for the table
  uint32_t bytes;       // of shared memory for a row
  bool has_table;       // of exponentials
};

// Queues all rows on a stream of the device. Addresses are the device's, but for those of
// args.forbidden, whose ids from number kForbiddenArguments on are at more_forbidden, too. Throws
// std::runtime_error where the launch fails.
void unmask_cuda(const UnmaskArgs& args, GpuLogitType type, const int64_t* more_forbidden,
                 int device, cudaStream_t stream);

}  // namespace nar
