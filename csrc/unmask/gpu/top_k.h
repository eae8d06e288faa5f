// The k largest logits of a row on a GPU: the key of the k-th, by counting how many reach a pivot.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "unmask/gpu/row.h"

namespace nar {
namespace {

// The keys in [low, high) of what may be the k-th largest, and how many logits reach either end.
// Any pivots are correct: rounding here cannot change a result.
struct Bracket {
  uint32_t k, num_logits, low, high, reach_low, reach_high;

  __device__ bool is_done() const { return reach_low == k || high - low == 1; }
  __device__ uint32_t size() const { return reach_low - reach_high; }
  __device__ uint32_t wanted() const { return k - reach_high; }  // of those in the bracket

  __device__ void learn(uint32_t pivot, uint32_t reach) {
    if (reach >= k) {
      if (pivot > low) low = pivot, reach_low = reach;
    } else if (pivot < high) {
      high = pivot, reach_high = reach;
    }
  }

  // Different ones, where there are.
  __device__ void propose(uint32_t first, uint32_t second, uint32_t* pivots) const {
    pivots[0] = min(max(first, low + 1), high - 1);
    pivots[1] = min(max(second, pivots[0] + 1), high - 1);
  }

  __device__ void propose_thirds(uint32_t* pivots) const {
    const uint32_t third = (high - low + 1) / 3;
    propose(low + third, high - third, pivots);
  }

  // Around where the k-th is if the log-odds of the share that reaches a logit are a straight line,
  // as they nearly are in the tails, too: as far as the number of logits up to there is uncertain.
  template <typename L>
  __device__ void propose_around(uint32_t lane, uint32_t* pivots) const {
    const float count = static_cast<float>(size()), above = static_cast<float>(wanted()) - 0.5f;
    const float spread = 1.5f * sqrtf(above * (1 - __fdividef(above, count))) + count / 256 + 0.5f;
    const float rank = static_cast<float>(reach_high) + above;
    // Each pivot by half of the lanes.
    const uint32_t key = key_of_rank<L>(rank + (lane % 2 ? -spread : spread));
    propose(__shfl_sync(kAllLanes, key, 0), __shfl_sync(kAllLanes, key, 1), pivots);
  }

  template <typename L>
  __device__ uint32_t key_of_rank(float rank) const {
    const float least = static_cast<float>(reach_high), most = static_cast<float>(reach_low);
    const float of_low = log_odds(most);
    const float share =
        __fdividef(log_odds(fminf(fmaxf(rank, least), most)) - of_low, log_odds(least) - of_low);
    const float first = L::value(low);
    return L::key_near(first + (L::value(high) - first) * share);
  }

  __device__ float log_odds(float reach) const {
    return __logf(__fdividef(reach + 0.5f, static_cast<float>(num_logits) - reach + 0.5f));
  }
};

// Which logits are kept: those whose key is larger, and, up to a column, those that have it. With
// zeros, all are.
struct TopK {
  uint32_t key, last_tie;

  __device__ bool keeps(uint32_t its_key, uint32_t column) const {
    return its_key > key || (its_key == key && column <= last_tie);
  }
};

// Listed of a bracket: (key, ~column), in the order of which the k-th largest is one.
struct LogitList {
  static constexpr uint32_t kMost = 256;
  static constexpr uint32_t kBytes = kMost * sizeof(uint64_t);
};

template <typename Row>
class TopKSearch {
 public:
  using L = typename Row::L;

  __device__ TopKSearch(const Row& row, typename Row::Warps& team, float largest, uint32_t k)
      : row_(row),
        team_(team),
        listed_(reinterpret_cast<uint64_t*>(team.memory + 1)),
        bracket_{k, row.vocabulary(), L::kKeyOfMinusInfinity, L::key(largest) + 1, row.vocabulary(),
                 0} {}

  // A sample of the row brackets the k-th largest, interpolation brackets it again, and the few
  // logits that are left are listed. Where they are many, such as ties, those that fit into the
  // list are a sample of exact keys; thirds in every sixth turn bound the number of passes.
  __device__ TopK find() {
    bool knows_ties = false;
    for (uint32_t turn = 0;; ++turn) {
      uint32_t pivots[2] = {bracket_.low, bracket_.low + 1};
      if (bracket_.is_done()) {
        const bool all = bracket_.wanted() == bracket_.size();
        if (all || bracket_.low == L::kKeyOfMinusInfinity) return {bracket_.low, kNoColumn};
        if (knows_ties) return up_to({bracket_.low, last_tie()});
      } else if (turn == 0 && row_.vocabulary() >= kWorthSampling) {
        propose_from_row(pivots);
      } else if (turn % 6 == 5 || bracket_.high - bracket_.low <= kFewKeys) {
        bracket_.propose_thirds(pivots);
      } else if (bracket_.size() <= LogitList::kMost || turn % 6 == 3 ||
                 (turn == 0 && bracket_.low == L::kKeyOfMinusInfinity)) {
        const uint32_t listed = list();
        if (listed <= LogitList::kMost) return last_of_list(listed);
        propose_from_list(pivots);
      } else {
        bracket_.template propose_around<L>(team_.lane, pivots);
      }
      uint32_t reach[2];
      count(pivots, reach);
#pragma unroll
      for (int j = 0; j < 2; ++j) bracket_.learn(pivots[j], reach[j]);
      knows_ties = pivots[0] == bracket_.low && pivots[1] == bracket_.high;
    }
  }

 private:
  static constexpr int kSamples = 256;
  static constexpr uint32_t kWorthSampling = 4096;  // logits
  static constexpr uint32_t kFewKeys = 9;           // two passes find one, and how many ties it has

  // How many logits reach each of two pivots.
  __device__ void count(const uint32_t* pivots, uint32_t* reach) {
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
    team_.sum(reach);
  }

  static __device__ uint32_t between(uint64_t of_warp) {
    return static_cast<uint32_t>(of_warp) - static_cast<uint32_t>(of_warp >> 32);
  }

  // Lists the logits of the bracket but for -inf, up to as many as fit; returns how many there are,
  // or, if they do not fit, some number above.
  __device__ uint32_t list() {
    const uint32_t low = max(bracket_.low, L::kKeyOfMinusInfinity + 1);
    const typename L::Pivot p = L::pivot(low), q = L::pivot(bracket_.high);
#pragma unroll 1
    for (uint32_t i = 0; i < row_.num_tiles(); ++i) {
      const uint32_t column = row_.column(i);
      const Chunk c = row_.chunk(i, column);
      if (__any_sync(kAllLanes, L::any_between(c, p, q)) && !enlist(c, column, low)) break;
    }
    team_.sync();
    return team_.memory->num_listed;
  }

  // The logits of a chunk whose keys are in [low, high). Returns whether those of the warp fit.
  __device__ bool enlist(const Chunk& c, uint32_t column, uint32_t low) const {
    typename L::Tally a, b;
    a.add(c, L::pivot(low)), b.add(c, L::pivot(bracket_.high));
    const uint32_t mine = a.total() - b.total();
    uint32_t at = mine ? atomicAdd(&team_.memory->num_listed, mine) : 0;
    const bool fits = at + mine <= LogitList::kMost;
#pragma unroll
    for (int j = 0; j < L::kItems; ++j) {
      const uint32_t key = L::key_at(c, j);
      if (key < low || key >= bracket_.high || at >= LogitList::kMost) continue;
      listed_[at++] = uint64_t{key} << 32 | static_cast<uint32_t>(~(column + j));
    }
    return __all_sync(kAllLanes, fits);
  }

  // Where all are listed: the last that is kept.
  __device__ TopK last_of_list(uint32_t count) {
    const uint32_t wanted = bracket_.wanted();
    if (wanted > count) return {L::kKeyOfMinusInfinity, kNoColumn};
#pragma unroll 1
    for (uint32_t t = team_.thread(); t < count; t += team_.num_threads()) {
      const uint64_t mine = listed_[t];
      uint32_t larger = 0;
#pragma unroll 4
      for (uint32_t i = 0; i < count; ++i) larger += listed_[i] > mine;
      if (larger + 1 != wanted) continue;
      team_.memory->pivots[0] = static_cast<uint32_t>(mine >> 32);
      team_.memory->last_tie = ~static_cast<uint32_t>(mine);
    }
    team_.sync();
    return up_to({team_.memory->pivots[0], team_.memory->last_tie});
  }

  // The lane that has the last tie stores its chunk without what is not kept.
  __device__ TopK up_to(TopK top) const {
    const uint32_t ahead = top.last_tie - row_.column(0), i = ahead / Row::kTile;
    const uint32_t item = ahead % Row::kTile;
    if (i >= row_.num_tiles() || item >= L::kItems) return top;
    const Chunk c = row_.chunk(i, row_.column(i));
    Chunk last = L::kept(c, L::pivot(top.key));
#pragma unroll
    for (int j = 1; j < L::kItems; ++j) {
      const bool is_tie = L::key_at(c, j) == top.key;
      if (is_tie && static_cast<uint32_t>(j) > item) L::set(&last, j, L::minus_infinity());
    }
    team_.memory->last_kept = last;
    return top;
  }

  // Of a few logits, and the upper half of the bits of their keys.
  __device__ void propose_from_row(uint32_t* pivots) {
    constexpr int kShift = L::kSign > 0x10000 ? 16 : 0;
    const uint32_t stride = row_.vocabulary() / kSamples;
    propose_from_sample<kSamples, kShift>(
        static_cast<float>(bracket_.k) / static_cast<float>(row_.vocabulary()),
        [&](uint32_t i) { return L::key(row_.at(i * stride)); }, pivots);
  }

  __device__ void propose_from_list(uint32_t* pivots) {
    propose_from_sample<LogitList::kMost, 0>(
        static_cast<float>(bracket_.wanted()) / static_cast<float>(bracket_.size()),
        [&](uint32_t i) { return static_cast<uint32_t>(listed_[i] >> 32); }, pivots);
    if (team_.thread() == 0) team_.memory->num_listed = 0;
  }

  // Pivots that bracket with high probability what a share of the bracket reaches; two warps look
  // for one each.
  template <int kCount, int kShift, typename KeyOf>
  __device__ void propose_from_sample(float share, KeyOf key_of, uint32_t* pivots) {
    const float rank = share * kCount, spread = 2.5f * sqrtf(rank * (1 - share)) + 1;
    for (uint32_t j = team_.warp; j < 2; j += team_.num_warps()) {
      const float wanted = j == 0 ? ceilf(rank + spread) : floorf(rank - spread);
      const uint32_t key = wanted < 1 ? bracket_.high - 1
                           : wanted > kCount
                               ? bracket_.low + 1
                               : sampled_key<kCount, kShift>(static_cast<uint32_t>(wanted), key_of);
      if (team_.lane == 0) team_.memory->pivots[j] = key;
    }
    team_.sync();
    bracket_.propose(team_.memory->pivots[0], team_.memory->pivots[1], pivots);
  }

  // The rank-th largest key of a sample, without its lowest bits.
  template <int kCount, int kShift, typename KeyOf>
  __device__ uint32_t sampled_key(uint32_t rank, KeyOf key_of) const {
    uint32_t keys[kCount / kWarp];
#pragma unroll
    for (int j = 0; j < kCount / kWarp; ++j) keys[j] = key_of(j * kWarp + team_.lane) >> kShift;
    uint32_t found = 0;
    for (uint32_t bit = L::kSign >> kShift; bit > 0; bit >>= 1) {
      const uint32_t higher = found + bit;
      uint32_t reach = 0;
#pragma unroll
      for (uint32_t key : keys) reach += key >= higher;
      if (__reduce_add_sync(kAllLanes, reach) >= rank) found = higher;
    }
    return found << kShift;
  }

  // Of the logits with the k-th largest one's key, which are those between the last pivots, the
  // column of the last that is wanted.
  __device__ uint32_t last_tie() const {
    const uint64_t* of_warps = team_.last_exchange();
    const uint32_t wanted = bracket_.wanted(), of_warp = between(of_warps[team_.warp]);
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
#pragma unroll
        for (int j = 0; j < L::kItems; ++j) {
          if (L::key_at(c, j) != bracket_.low) continue;
          if (--left == 0) team_.memory->last_tie = row_.column(i) + j;
        }
      }
      return;
    }
  }

  const Row& row_;
  typename Row::Warps& team_;
  uint64_t* const listed_;  // in the scratch memory of the row
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
