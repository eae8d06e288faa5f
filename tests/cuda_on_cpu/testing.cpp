// What only tests ask of the emulation, by ctypes: its schedule, and kernels with known faults.
#include "corrupt/gpu/tiles.h"
#include "cuda_runtime.h"

namespace {

using Pair = uint32_t[2];

// The sum of a block's thread numbers, in every thread, through shared memory.
__global__ void sum_kernel(uint32_t* sums, bool with_barrier) {
  NAR_SHARED(Pair, of_warps);
  const uint32_t sum = __reduce_add_sync(0xFFFFFFFF, threadIdx.x);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum;
  if (with_barrier) __syncthreads();
  sums[blockIdx.x * blockDim.x + threadIdx.x] = of_warps[0] + of_warps[1];
}

__global__ void divergent_kernel(bool in_a_barrier) {
  if (in_a_barrier) {
    if (threadIdx.x != 5) __syncthreads();
    if (threadIdx.x == 5) __syncwarp();
  } else if (threadIdx.x == 3) {
    __any_sync(0xFFFFFFFF, true);
  } else {
    __reduce_add_sync(0xFFFFFFFF, 1);
  }
}

// Writes a word behind as many as it is launched with, or before.
__global__ void overrun_kernel(unsigned word) {
  NAR_DYNAMIC_SHARED(uint32_t, shared);
  if (threadIdx.x == 0) shared[word] = 1;
}

// What shared memory holds before anything is written to it. Then a 0 is.
__global__ void uninitialised_kernel(uint32_t* seen) {
  NAR_SHARED(uint32_t, word);
  if (threadIdx.x == 0) seen[blockIdx.x] = word;
  __syncthreads();
  word = 0;
}

template <typename... Arguments>
const char* launch(unsigned blocks, void (*kernel)(Arguments...), Arguments... arguments) {
  static std::string error;
  cudaLaunchConfig_t config = {};
  config.dynamicSmemBytes = 64;
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(64);
  try {
    cudaLaunchKernelEx(&config, kernel, arguments...);
    return nullptr;
  } catch (const std::exception& failure) {
    error = failure.what();
    return error.c_str();
  }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void set_schedule(unsigned seed) { cuda_on_cpu::schedule = seed; }
EXPORT const char* run_sum(unsigned blocks, uint32_t* sums, bool with_barrier) {
  return launch(blocks, sum_kernel, sums, with_barrier);
}
EXPORT const char* run_divergent(bool in_a_barrier) {
  return launch(1, divergent_kernel, in_a_barrier);
}
EXPORT const char* run_overrun(unsigned word) { return launch(1, overrun_kernel, word); }
EXPORT const char* run_uninitialised(unsigned blocks, uint32_t* seen) {
  return launch(blocks, uninitialised_kernel, seen);
}
// How many tiles of `corrupt` a row has, and whether it fills the last.
EXPORT void tiles_of_row(int32_t length, int32_t* count, bool* is_last_whole) {
  const nar::Row row = {0, 0, 0, 0, 0, length, length, length, {}, false};
  *count = nar::num_tiles(row);
  *is_last_whole = nar::is_whole(row, *count - 1);
}
EXPORT void set_num_processors(int count) { cuda_on_cpu::num_processors = count; }
// As if it were another device: no kernel has asked it for more memory yet.
EXPORT void set_shared_bytes(int bytes) {
  cuda_on_cpu::shared_bytes = bytes;
  cuda_on_cpu::most_shared.forget();
}
