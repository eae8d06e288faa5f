// Gumbel-max over a row on a GPU.
#pragma once

#include <cuda_runtime.h>

#include "rng/philox.h"
#include "unmask/gpu/row.h"

namespace nar {
namespace {

// The column with the largest (logit - largest) / temperature + noise, the lowest on ties. A cheap
// upper bound on the noise rules out nearly all: first of a lane's logits at once, then of each.
template <typename L>
class Sampler {
 public:
  __device__ Sampler(const UnmaskLaunch& p, uint64_t slot, float largest, RowMemory* memory)
      : p_(p), slot_(slot), largest_(largest), memory_(memory) {}

  // By one lane: a likely winner, so that the bound rules out most others.
  __device__ void start(uint32_t column) const {
    const Words4 four = random_block(p_.keys, kDecodeNoise, slot_, column / 4);
    const uint32_t even = column & 2 ? four.word[2] : four.word[0];
    const uint32_t odd = column & 2 ? four.word[3] : four.word[1];
    const uint32_t word = column & 1 ? odd : even;
    memory_->start = memory_->best = lifted(gumbel(word));
  }

  // The lowest `logit - largest` that can still win. (Other warps may have changed the best by
  // now.)
  __device__ float lowest_gap() const {
    return (bits_as<float>(memory_->start) - (kLift + kMostNoise)) / scale();
  }

  // `gap`: how far the largest of the chunk is from that of the row.
  __device__ void add(const Chunk& c, uint32_t column, float gap, uint32_t lane) {
    uint32_t words[L::kItems];
#pragma unroll
    for (int j = 0; j < L::kItems; j += 4) {
      const Words4 four = random_block(p_.keys, kDecodeNoise, slot_, column / 4 + j / 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) words[j + i] = four.word[i];
    }
    uint32_t least = words[0];  // which makes the most noise
#pragma unroll
    for (int j = 1; j < L::kItems; ++j) least = min(least, words[j]);

    // A relaxed atomic load, which other warps may outrun: any bound is correct.
    const float bound = bits_as<float>(*static_cast<volatile uint32_t*>(&memory_->best));
    if (__any_sync(kAllLanes, at_most(gap, least) > bound)) offer(c, column, words, bound, lane);
  }

  template <typename Team>
  __device__ uint32_t best_column(Team& team) const {
    const uint64_t ranked = uint64_t{Logits<float>::key(best_)} << 32 | ~best_column_;
    return ~static_cast<uint32_t>(team.largest(ranked));
  }

 private:
  // Makes the noise of the logits that the bound does not rule out one by one.
  __device__ void offer(const Chunk& c, uint32_t column, const uint32_t* words, float bound,
                        uint32_t lane) {
    uint32_t open = 0;
#pragma unroll
    for (int j = 0; j < L::kItems; ++j) {
      open |= static_cast<uint32_t>(at_most(L::item(c, j) - largest_, words[j]) > bound) << j;
    }
    if (!__any_sync(kAllLanes, open != 0)) return;
    do {
      if (open) {
        const int item = __ffs(open) - 1;
        open &= open - 1;
        float x = 0;
        uint32_t word = 0;
#pragma unroll
        for (int j = 0; j < L::kItems; ++j) {  // registers have no index
          x = j == item ? L::item(c, j) : x;
          word = j == item ? words[j] : word;
        }
        const float score = (clean(x) - largest_) * scale() + gumbel(word);
        if (score > best_) best_ = score, best_column_ = column + item;
      }
    } while (__any_sync(kAllLanes, open != 0));
    const uint32_t best = __reduce_max_sync(kAllLanes, lifted(fmaxf(best_, -kLift)));
    if (lane == 0) atomicMax(&memory_->best, best);
  }

  static constexpr float kMostNoise = 23.0f;
  static constexpr float kSlack = 1e-3f;  // for rounding errors
  // Scores of the largest logit, and so the best, are above -kLift: so far up, the bits of those
  // that count are integers in the same order.
  static constexpr float kLift = 4;

  static __device__ uint32_t lifted(float score) { return bits_as<uint32_t>(score + kLift); }

  __device__ float scale() const { return p_.args.inverse_temperature; }

  // An upper bound on a score, lifted: noise is at most -log(u), and the bits of a float x are less
  // than 2**23 (127 + log2(x)).
  __device__ float at_most(float gap, uint32_t word) const {
    constexpr float kLn2 = 0.693147181f;
    const float bits = static_cast<float>(bits_as<int32_t>(static_cast<float>(word)));
    return fmaf(gap, scale(), fmaf(bits, -0x1p-23f * kLn2, (127 + 32) * kLn2 + kSlack + kLift));
  }

  const UnmaskLaunch& p_;
  const uint64_t slot_;
  const float largest_;
  RowMemory* const memory_;
  float best_ = -INFINITY;
  uint32_t best_column_ = kNoColumn;
};

}  // namespace
}  // namespace nar
