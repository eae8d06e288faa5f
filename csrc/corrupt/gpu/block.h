// A block of threads: some rows, a few warps for each, and one warp more, which draws the slots of
// the rows and looks back (slots.h, look_back.h) while the others work.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "corrupt/corrupt.h"
#include "rng/permutation.h"
#include "runtime/warp.h"
#include "select/order_statistic.h"

namespace nar {
namespace {

constexpr int kMaxRows = 7;

// Tiles that a warp holds in registers. The more, the fewer instructions for each and the fewer
// warps. The most only of rows that fit no other way, such as those of 16384 positions.
constexpr int kFewTiles = 4, kManyTiles = 8, kMostTiles = 12;

// Warps of a block that work on rows, at most, and blocks that a multiprocessor should hold of that
// size: what the registers of each warp allow. Where few tiles are held, two blocks are faster on
// sm_90, though some registers spill; before it, and of blocks and views, more do, and nobody has
// measured.
constexpr int kMaxWarps = 16;
constexpr int max_warps(int held) { return held == 0 ? kMaxWarps : held == kMostTiles ? 11 : 15; }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int min_blocks(int, bool) { return 1; }
#else
constexpr int min_blocks(int held, bool divided) {
  return !divided && (held == 1 || held == kFewTiles) ? 2 : 1;
}
#endif

struct Shape {
  int rows, warps_per_row;  // several rows only of one warp each

  NAR_HOST_DEVICE int num_warps() const { return rows * warps_per_row; }
};

// With what the host works out for a launch.
struct KernelArgs : CorruptArgs {
  Shape shape;
  int id_bytes;       // in the corpus
  uint32_t id_limit;  // ids, as unsigned words of their size, are below this
  bool in_pairs;      // outputs can be stored two neighbours at a time
  bool restricted;    // some positions may not be masked: asked again for each tile of a long row
};

struct BlockMemory {
  // Of each row.
  int64_t start[kMaxRows];
  uint32_t time[kMaxRows];
  uint32_t num_maskable[kMaxRows];
  uint64_t rows_before[kMaxRows];
  // Of each warp.
  uint32_t num_masked[kMaxWarps];
  uint32_t counts[2][kMaxWarps][kNumRanks];
  // Of the warp that draws slots.
  alignas(16) uint32_t words[kExactPermutationMax];
};

// Barriers, by number.
constexpr unsigned kOfTeam = 1, kOfBlock = 2;

// All threads of the block. Told how many, since warps come here from different places in the code,
// which __syncthreads does not allow.
__device__ inline void sync_block() { __barrier_sync_count(kOfBlock, blockDim.x); }

// The warps of a row.
struct Team {
  BlockMemory& memory;
  int row, first_warp, num_warps;  // row and first warp in the block
  int warp, lane;                  // of this thread, in the team and in the warp
  int turn = 0;

  __device__ Team(BlockMemory& memory, const Shape& shape)
      : memory(memory), num_warps(shape.warps_per_row), lane(threadIdx.x % kWarp) {
    // By way of lane 0 the compiler sees that a warp is of one mind.
    const int in_block = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x / kWarp), 0);
    row = in_block / num_warps;
    first_warp = row * num_warps;
    warp = in_block - first_warp;
  }

  __device__ bool is_first() const { return warp == 0 && lane == 0; }

  // Sums over the team. The memory takes turns, so that one barrier is enough.
  template <int kCount>
  __device__ void sum(uint32_t (&counts)[kCount]) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) counts[j] = __reduce_add_sync(kAllLanes, counts[j]);
    if (num_warps == 1) return;
    uint32_t (*shared)[kNumRanks] = memory.counts[turn] + first_warp;
    turn ^= 1;
    if (lane == 0) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) shared[warp][j] = counts[j];
    }
    __barrier_sync_count(kOfTeam, num_warps * kWarp);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      counts[j] = __reduce_add_sync(kAllLanes, lane < num_warps ? shared[lane][j] : 0);
    }
  }

  // How many positions the warps of the team before this one mask.
  __device__ uint32_t masked_before() const {
    return __reduce_add_sync(kAllLanes, lane < warp ? memory.num_masked[first_warp + lane] : 0);
  }
};

}  // namespace
}  // namespace nar
