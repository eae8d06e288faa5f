// Sums and extremes over the threads of a block.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

// Memory of the block whose size is told at the launch. (Tests define this for the CPU.)
#ifndef NAR_DYNAMIC_SHARED
#define NAR_DYNAMIC_SHARED(Type, name)      \
  extern __shared__ uint4 dynamic_shared[]; \
  Type* const name = reinterpret_cast<Type*>(dynamic_shared)
#endif

namespace nar {
namespace {

constexpr int kWarp = 32, kMaxWarps = 16;
constexpr uint32_t kAllLanes = 0xFFFFFFFF;

struct BlockMemory {
  uint64_t of_warp[2][kMaxWarps];
  float best;  // score so far, of any warp
  uint32_t num_candidates;
};

struct Block {
  BlockMemory& memory;
  int thread, num_threads;
  int turn = 0;

  __device__ explicit Block(BlockMemory& memory)
      : memory(memory),
        thread(static_cast<int>(threadIdx.x)),
        num_threads(static_cast<int>(blockDim.x)) {}

  __device__ int lane() const { return thread % kWarp; }

  // What all threads make of their values. The memory takes turns, so that one barrier is enough.
  template <typename Combine>
  __device__ uint64_t reduce(uint64_t value, uint64_t neutral, Combine combine) {
    for (int step = kWarp / 2; step > 0; step /= 2) {
      value = combine(value, __shfl_xor_sync(kAllLanes, value, step));
    }
    if (num_threads == kWarp) return value;
    uint64_t* of_warp = memory.of_warp[turn];
    turn ^= 1;
    if (lane() == 0) of_warp[thread / kWarp] = value;
    __syncthreads();
    value = lane() < num_threads / kWarp ? of_warp[lane()] : neutral;
    for (int step = kMaxWarps / 2; step > 0; step /= 2) {
      value = combine(value, __shfl_xor_sync(kAllLanes, value, step));
    }
    return __shfl_sync(kAllLanes, value, 0);
  }

  __device__ uint64_t sum(uint64_t value) {
    return reduce(value, 0, [](uint64_t a, uint64_t b) { return a + b; });
  }
  __device__ uint64_t largest(uint64_t value) {
    return reduce(value, 0, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
  }
};

// Numbers whose order is that of floats, NaN aside.
__device__ inline uint32_t ordered(float x) {
  const uint32_t bits = static_cast<uint32_t>(__float_as_int(x));
  return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}
__device__ inline float from_ordered(uint32_t key) {
  return __int_as_float(static_cast<int32_t>(key ^ (key >> 31 ? 0x80000000u : 0xFFFFFFFFu)));
}

}  // namespace
}  // namespace nar
