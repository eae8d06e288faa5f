// Window and time of each row of a block, by one warp: a lane a row.
#pragma once

#include "corrupt/gpu/ids.h"

namespace nar {
namespace {

__device__ inline uint64_t seed_of(const KernelArgs& a) {
  return a.seed_tensor ? *a.seed_tensor : a.seed;
}

// The lane of a row, and memory for the random words of a permutation.
struct SlotLane {
  int lane, num_rows;
  uint32_t* words;  // [kExactPermutationMax]
};

// Where permutation `round` of [0, n) sends `index`, as Permutation of permutation_cpu.h does. Each
// lane has its own; those with the same round share its words, which the warp makes together.
__device__ inline uint64_t permute(uint64_t seed, uint32_t stream, uint64_t round, uint64_t n,
                                   uint64_t index, const SlotLane& slot) {
  const auto [lane, num_rows, words] = slot;
  const bool is_exact = n <= uint64_t{kExactPermutationMax};
  const uint32_t num_words = is_exact ? static_cast<uint32_t>(n) : kFeistelRounds;
  uint64_t result = 0;
  for (uint32_t todo = (1u << num_rows) - 1; todo != 0;) {
    const uint64_t common = __shfl_sync(kAllLanes, round, __ffs(todo) - 1);
    __syncwarp();  // the words of the round before have been read
    for (uint32_t block = lane; block * 4 < num_words; block += kWarp) {
      const Words4 made = random_block(seed, stream, common, block);
#pragma unroll
      for (int i = 0; i < 4; ++i) words[4 * block + i] = made.word[i];
    }
    __syncwarp();
    const uint32_t lanes = __ballot_sync(kAllLanes, round == common) & todo;
    todo ^= lanes;
    if (!is_exact) {
      if (round == common) result = feistel_permute(index, n, words);
      continue;
    }
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {  // the rank of its word
      const int at = __ffs(rest) - 1;
      const uint32_t own_index = __shfl_sync(kAllLanes, static_cast<uint32_t>(index), at);
      const uint32_t own = words[own_index];
      uint32_t before = 0;
      for (uint32_t i = lane; i < num_words; i += kWarp) {
        before += words[i] < own || (words[i] == own && i < own_index);
      }
      before = __reduce_add_sync(kAllLanes, before);
      if (lane == at) result = before;
    }
  }
  return result;
}

__device__ inline int64_t ordered_start(const KernelArgs& a, uint64_t seed, uint64_t sample,
                                        const SlotLane& slot) {
  const uint64_t n = static_cast<uint64_t>(a.order.num_windows);
  const uint64_t epoch = sample / n, position = sample - epoch * n;
  return a.order.start(a.order.shuffle ? permute(seed, kWindowOrder, epoch, n, position, slot)
                                       : position);
}

template <bool kDivided>
__device__ uint32_t time_of(const KernelArgs& a, uint64_t seed, const Draw& draw, uint64_t sample,
                            const SlotLane& slot) {
  View view = {};
  uint64_t n = static_cast<uint64_t>(a.global_batch);
  if constexpr (kDivided) {
    if (a.view_times) return static_cast<uint32_t>(a.view_times[draw.view]);
    view = a.division.view(draw.view);
    sample = a.slot(draw), n = a.num_strata();
  }
  const uint32_t word = random_block(seed, view.stream(kTime), sample, 0).word[0];
  if (!a.stratified) return word >> 16;
  const uint64_t step = sample / n, index = sample - step * n;
  return stratified_time(permute(seed, view.stream(kStratum), step, n, index, slot), word, n);
}

// All rows from `first` on that the block takes. What is wrong with them goes into the record.
template <bool kDivided>
__device__ void draw_slots(const KernelArgs& a, int64_t first, int num_rows, int lane,
                           BlockMemory& memory) {
  const SlotLane slot = {lane, num_rows, memory.words};
  const bool has_row = lane < num_rows;
  const int64_t b = first + (has_row ? lane : 0);  // lanes without a row do what the first does
  const Draw draw = draw_at<kDivided>(a, b);
  const uint64_t seed = seed_of(a), sample = a.slot(draw.row);
  int64_t start = a.windows.start(draw.row);
  if (a.order.num_windows) start = ordered_start(a, seed, sample, slot);
  // Of the whole window, whatever the block.
  const int64_t stored = a.windows.span(draw.row).stored;
  const bool outside = start < 0 || start > a.windows.num_corpus_tokens - stored;
  const uint32_t time = time_of<kDivided>(a, seed, draw, sample, slot);
  if (outside) start = 0;
  if constexpr (kDivided) start += draw.block * a.division.block_length;
  if (lane < kMaxRows) {  // also of rows that are not there: what is read is valid
    memory.start[lane] = start;
    memory.time[lane] = time;
  }
  if (!has_row || draw.block > 0 || draw.view > 0) return;
  unsigned long long* record = reinterpret_cast<unsigned long long*>(a.invalid);
  if (outside) atomicAdd(&record[3], 1);
  if (static_cast<int64_t>(sample) < 0) atomicAdd(&record[4], 1);
}

}  // namespace
}  // namespace nar
