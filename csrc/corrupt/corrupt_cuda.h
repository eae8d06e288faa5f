// `corrupt` on the GPU.
#pragma once

#include <cuda_runtime.h>

#include "corrupt/corrupt.h"

namespace nar {

// Words at `invalid`, which is the workspace of a launch: the record, a lock, and what each block
// has published, of at least one draw.
constexpr int64_t kLock = kNumInvalid, kFirstPublished = kLock + 1;

inline int64_t workspace_size(int64_t draws) { return kFirstPublished + draws; }

// Queues the whole batch on a stream of the device. All addresses must be such that the device can
// read or write them. Throws std::runtime_error where the launch fails; what is wrong with the data
// is left in `invalid`.
void corrupt_cuda(const CorruptArgs& args, int device, cudaStream_t stream);

}  // namespace nar
