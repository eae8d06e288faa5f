// The k largest logits of a row on a GPU: the key of the k-th, by counting how many reach a pivot.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "unmask/gpu/row.h"

namespace nar {
namespace {

// The keys in [low, high) of what may be the k-th largest, and how many logits reach either end.
struct Bracket {
  uint32_t k, low, high, reach_low, reach_high;

  __device__ bool is_done() const { return reach_low == k || high - low == 1; }

  __device__ void learn(uint32_t pivot, uint32_t reach) {
    if (reach >= k) {
      if (pivot > low) low = pivot, reach_low = reach;
    } else if (pivot < high) {
      high = pivot, reach_high = reach;
    }
  }

  // Around where the k-th would be if keys were spread evenly; every third time thirds, which
  // bounds the number of passes. (Any pivots are correct: rounding here cannot change a result.)
  __device__ void propose(uint32_t turn, uint32_t* pivots) const {
    const uint32_t width = high - low;
    uint32_t below = width / 3, step = width / 3;
    if (turn % 3 != 2) {
      const float share = __fdividef(static_cast<float>(reach_low - k) + 0.5f,
                                     static_cast<float>(reach_low - reach_high));
      step = width / 8;
      below = static_cast<uint32_t>(static_cast<float>(width) * share);
      below -= min(below, step / 2);
    }
    below = min(max(below, 1u), width - 1);
    pivots[0] = low + below;
    pivots[1] = low + min(below + max(step, 1u), width - 1);
  }
};

// Which logits are kept: those whose key is larger, and, up to a column, those that have it.
struct TopK {
  uint32_t key, last_tie;
};

template <typename Row>
class TopKSearch {
 public:
  using L = typename Row::L;

  __device__ TopKSearch(const Row& row, typename Row::Warps& team, float largest, uint32_t k)
      : row_(row),
        team_(team),
        bracket_{k, L::kKeyOfMinusInfinity, L::key(largest) + 1, row.vocabulary(), 0} {}

  __device__ TopK find() {
    uint32_t pivots[2], reach[2], of_warp = 0;
    const uint64_t* of_warps = nullptr;
    bool knows_ties = false, has_pivots = propose_from_sample(pivots);
    for (uint32_t turn = 0; !bracket_.is_done(); ++turn) {
      if (!has_pivots) bracket_.propose(turn, pivots);
      has_pivots = false;
      of_warp = count(pivots, reach, &of_warps);
#pragma unroll
      for (int j = 0; j < 2; ++j) bracket_.learn(pivots[j], reach[j]);
      knows_ties = pivots[0] == bracket_.low && pivots[1] == bracket_.high;
    }
    const uint32_t ties = bracket_.reach_low - bracket_.reach_high;
    const uint32_t wanted = bracket_.k - bracket_.reach_high;
    if (wanted == ties || bracket_.low == L::kKeyOfMinusInfinity) return {bracket_.low, kNoColumn};
    if (!knows_ties) {
      pivots[0] = bracket_.low, pivots[1] = bracket_.low + 1;
      of_warp = count(pivots, reach, &of_warps);
    }
    return {bracket_.low, last_tie(wanted, of_warp, of_warps)};
  }

 private:
  static constexpr int kSamples = 512, kOfLane = kSamples / kWarp;
  static constexpr uint32_t kWorthSampling = 4096;  // logits

  // How many logits reach each of two pivots. Returns how many of the warp's are between the two,
  // and where the counts of all warps are.
  __device__ uint32_t count(const uint32_t* pivots, uint32_t* reach, const uint64_t** of_warps) {
    const typename L::Pivot p = L::pivot(pivots[0]), q = L::pivot(pivots[1]);
    reach[0] = reach[1] = 0;
    for (uint32_t i = 0; i < row_.num_tiles();) {
      typename L::Tally a, b;
      const uint32_t end = min(row_.num_tiles() - i, L::Tally::kMost) + i;
      uint32_t column = row_.column(i);
#pragma unroll 4
      for (; i < end; ++i, column += Row::kTile) {
        const Chunk c = row_.chunk(i, column);
        a.add(c, p), b.add(c, q);
      }
      reach[0] += a.total(), reach[1] += b.total();
    }
    team_.sum(reach, of_warps);
    return between((*of_warps)[team_.warp]);
  }

  static __device__ uint32_t between(uint64_t of_warp) {
    return static_cast<uint32_t>(of_warp) - static_cast<uint32_t>(of_warp >> 32);
  }

  // Pivots that bracket the k-th with high probability; two warps look for one each.
  __device__ bool propose_from_sample(uint32_t* pivots) {
    if (row_.vocabulary() < kWorthSampling || team_.num_warps() == 1) return false;
    if (team_.warp < 2) {
      const float share =
          static_cast<float>(bracket_.k) / static_cast<float>(row_.vocabulary()) * kSamples;
      const float spread = 2.5f * sqrtf(share * (1 - share / kSamples)) + 1;
      const float rank = team_.warp == 0 ? ceilf(share + spread) : floorf(share - spread);
      const uint32_t key = sampled_key(rank);
      if (team_.lane == 0) team_.memory->pivots[team_.warp] = key;
    }
    team_.sync();
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      pivots[j] = min(max(team_.memory->pivots[j], bracket_.low + 1), bracket_.high - 1);
    }
    return true;
  }

  // The key of about the rank-th largest of a sample, of its upper half of bits.
  __device__ uint32_t sampled_key(float rank) const {
    if (rank < 1) return bracket_.high - 1;
    if (rank > kSamples) return bracket_.low + 1;
    const uint32_t stride = row_.vocabulary() / kSamples;
    constexpr int kShift = L::kSign > 0x10000 ? 16 : 0;
    uint32_t keys[kOfLane];
#pragma unroll
    for (int j = 0; j < kOfLane; ++j) {
      keys[j] = L::key(row_.at((j * kWarp + team_.lane) * stride)) >> kShift;
    }
    uint32_t found = 0;
    for (uint32_t bit = 0x10000; bit > 0; bit >>= 1) {
      const uint32_t higher = found + bit;
      uint32_t reach = 0;
#pragma unroll
      for (int j = 0; j < kOfLane; ++j) reach += keys[j] >= higher;
      reach = __reduce_add_sync(kAllLanes, reach);
      if (reach >= static_cast<uint32_t>(rank)) found = higher;
    }
    return found << kShift;
  }

  // Of the logits with the k-th largest one's key, the column of the `wanted`-th.
  __device__ uint32_t last_tie(uint32_t wanted, uint32_t of_warp, const uint64_t* of_warps) const {
    const uint32_t before =
        __reduce_add_sync(kAllLanes, team_.lane < team_.warp ? between(of_warps[team_.lane]) : 0);
    if (before < wanted && wanted <= before + of_warp) find_tie(wanted - before);
    team_.sync();
    return team_.memory->last_tie;
  }

  // By one warp: the `wanted`-th of its ties.
  __device__ void find_tie(uint32_t wanted) const {
    const uint32_t pivots[2] = {bracket_.low, bracket_.low + 1};
    const typename L::Pivot p = L::pivot(pivots[0]), q = L::pivot(pivots[1]);
    for (uint32_t i = 0;; ++i) {
      const Chunk c = row_.chunk(i, row_.column(i));
      typename L::Tally a, b;
      a.add(c, p), b.add(c, q);
      const uint32_t mine = a.total() - b.total();
      const uint32_t all = __reduce_add_sync(kAllLanes, mine);
      if (all < wanted) {
        wanted -= all;
        continue;
      }
      uint32_t up_to = mine;  // inclusive, over lanes
#pragma unroll
      for (int step = 1; step < kWarp; step *= 2) {
        const uint32_t other = __shfl_up_sync(kAllLanes, up_to, step);
        if (static_cast<int>(team_.lane) >= step) up_to += other;
      }
      if (up_to - mine < wanted && wanted <= up_to) {
        uint32_t left = wanted - (up_to - mine);
        Chunk last = L::kept(c, p);
#pragma unroll
        for (int j = 0; j < L::kItems; ++j) {
          if (L::key(clean(L::item(c, j))) != bracket_.low) continue;
          if (left == 0) {
            L::set(&last, j, L::minus_infinity());
          } else if (--left == 0) {
            team_.memory->last_tie = row_.column(i) + j;
          }
        }
        team_.memory->last_kept = last;
      }
      return;
    }
  }

  const Row& row_;
  typename Row::Warps& team_;
  Bracket bracket_;
};

// Chunks without what is not kept.
template <typename L>
struct Filter {
  typename L::Pivot reached, passed;  // up to the last tie, and behind it
  uint32_t last_tie;
  const Chunk* last_kept;

  __device__ Filter(const TopK& top, const RowMemory* memory)
      : reached(L::pivot(top.key)),
        passed(L::pivot(top.key + 1)),
        last_tie(top.last_tie),
        last_kept(&memory->last_kept) {}

  __device__ Chunk kept(uint32_t column, const Chunk& c) const {
    Chunk result = L::kept(c, column <= last_tie ? reached : passed);
    if (last_tie - column < L::kItems) result = *last_kept;
    return result;
  }
};

}  // namespace
}  // namespace nar
