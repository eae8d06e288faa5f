// `unmask` on the GPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "unmask/unmask.h"

namespace nar {

enum class GpuLogitType { kFloat32, kBfloat16, kFloat16 };

// So many forbidden ids are arguments of the kernel; more lie in the device's memory.
constexpr int kForbiddenArguments = 64;

struct UnmaskKernelArgs {
  const void* logits;  // [rows, vocabulary], a row every `stride`
  int64_t rows, vocabulary, stride;
  const int64_t* noise_slots;
  const int64_t* given;
  int forbidden[kForbiddenArguments];  // ascending
  const int64_t* more_forbidden;
  int num_forbidden;
  int64_t fallback;
  uint64_t seed;
  int64_t top_k;
  float inverse_temperature;
  ConfidenceType confidence_type;
  int64_t* tokens;
  float* log_prob;
  float* confidence;
};

// Queues all rows on a stream of the device. Addresses are the device's, but for those of
// args.forbidden, whose ids from number kForbiddenArguments on are at more_forbidden, too. Throws
// std::runtime_error where the launch fails.
void unmask_cuda(const UnmaskArgs& args, GpuLogitType type, const int64_t* more_forbidden,
                 int device, cudaStream_t stream);

}  // namespace nar
