// `unmask` on the GPU.
#pragma once

#include <cuda_runtime.h>

#include "rng/philox.h"
#include "unmask/unmask.h"

namespace nar {

// Forbidden ids that travel with a launch.
constexpr int kInlineForbidden = 64;

// What a kernel is given.
struct UnmaskLaunch {
  UnmaskArgs args;
  PhiloxKeys keys;
  int32_t forbidden[kInlineForbidden];
  const int64_t* more_forbidden;  // the ids behind those, on the device
  uint32_t held_tiles;            // of a row, in shared memory
  bool has_table;                 // of exponentials
  uint32_t bytes;                 // of shared memory for a row
};

// Queues all rows on a stream of the device. `args.forbidden` is on the host; where there are more
// than kInlineForbidden ids, the others are also at `more_forbidden`, on the device. Throws
// std::runtime_error where the launch fails.
void unmask_cuda(const UnmaskArgs& args, const int64_t* more_forbidden, int device,
                 cudaStream_t stream);

}  // namespace nar
