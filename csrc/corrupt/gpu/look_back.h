// Where the row indices of a block go: each block publishes how many positions it masks, and adds
// up what those before it published (decoupled look-back: Merrill, Garland, "Single-pass Parallel
// Prefix Scan", 2016).
#pragma once

#include "corrupt/corrupt_cuda.h"
#include "corrupt/gpu/ids.h"

namespace nar {
namespace {

// A published word: 0 before anything is known, then one of these flags and a count.
constexpr uint64_t kOwn = uint64_t{1} << 60;   // the positions that the block masks
constexpr uint64_t kUpTo = uint64_t{2} << 60;  // those of all blocks up to it
constexpr uint64_t kCountBits = kOwn - 1;

__device__ inline unsigned long long* published_by(const KernelArgs& a, int64_t block) {
  return reinterpret_cast<unsigned long long*>(a.invalid) + kFirstPublished + block;
}

__device__ inline void publish(const KernelArgs& a, int64_t block, uint64_t flag, uint64_t count) {
  atomicExch(published_by(a, block), flag + count);
}

// Masked positions in all blocks before this one, by one warp.
__device__ inline uint64_t masked_in_blocks_before(const KernelArgs& a, int64_t block, int lane) {
  uint64_t total = 0;
  for (int64_t end = block; end > 0;) {
    const int64_t at = end - kWarp + lane;
    uint64_t word = kUpTo;
    if (at >= 0) word = *const_cast<volatile unsigned long long*>(published_by(a, at));
    // Those after the newest word that sums up all before it must be there.
    const uint32_t up_to = __ballot_sync(kAllLanes, word >= kUpTo);
    const uint32_t missing = __ballot_sync(kAllLanes, word == 0);
    if (missing > up_to) {  // the highest bit of either decides
      __nanosleep(40);
      continue;
    }
    uint64_t count = kAllLanes << lane & up_to & ~(1u << lane) ? 0 : word & kCountBits;
    for (int step = kWarp / 2; step > 0; step /= 2) {
      count += __shfl_xor_sync(kAllLanes, count, step);
    }
    total += count;
    end = up_to ? 0 : end - kWarp;
  }
  return total;
}

// Publishes the counts of the block, finds where its row indices go, and writes what is known of
// its rows: a lane a row, which masks k of n positions.
template <bool kDivided>
__device__ void finish_rows(const KernelArgs& a, int64_t block, int64_t first, int num_rows,
                            int lane, uint32_t n, uint32_t k, BlockMemory& memory) {
  uint64_t up_to = lane < num_rows ? k : 0;
#pragma unroll
  for (int step = 1; step < kMaxRows; step *= 2) {
    const uint64_t before = __shfl_up_sync(kAllLanes, up_to, step);
    if (lane >= step) up_to += before;
  }
  const uint64_t of_block = __shfl_sync(kAllLanes, up_to, kMaxRows - 1);
  uint64_t before = 0;
  if (a.row_buffer) {
    if (lane == 0) publish(a, block, kOwn, of_block);
    before = masked_in_blocks_before(a, block, lane);
    if (lane == 0) publish(a, block, kUpTo, before + of_block);
  }
  if (lane >= num_rows) return;
  memory.rows_before[lane] = before + up_to - k;
  write_scalars<kDivided>(a, first + lane, draw_at<kDivided>(a, first + lane).view,
                          memory.time[lane], n, k);
}

}  // namespace
}  // namespace nar
