// Which keys of a row are the smallest: bounds to compare them with.
#pragma once

#include "corrupt/gpu/tiles.h"

namespace nar {
namespace {

// A bracket around a pivot with exactly `rank` keys below it.
struct PivotSearch {
  int32_t rank;
  uint32_t low = 0, last = 0xFFFFFFFF;  // the pivot lies in [low, last]
  int32_t below_low = 0, below_end;     // keys below low, and up to last
  uint32_t pivot = 0;
  bool found;

  __device__ PivotSearch(int32_t rank, int32_t num_keys)
      : rank(rank), below_end(num_keys), found(rank == 0) {}

  // Random keys are nearly evenly spread, so interpolation homes in within about five passes. A
  // bisection every other pass after that bounds the number of passes for any keys. Every pivot is
  // right, so this may round as it likes.
  __device__ void propose(int pass) {
    float share = 0.5f;
    if (pass < 8 || pass % 2 == 0) {
      share = __fdividef(static_cast<float>(rank - below_low) + 0.5f,
                         static_cast<float>(below_end - below_low) + 1.0f);
    }
    uint32_t offset = __float2uint_rz(static_cast<float>(last - low) * share);
    if (rank == below_end) offset = last - low;
    pivot = low + min(max(offset, 1u), last - low);
  }

  __device__ void learn(int32_t below) {
    if (below == rank) {
      found = true;
    } else if (below < rank) {
      low = pivot, below_low = below;
    } else {
      last = pivot - 1, below_end = below;
    }
  }

  // No pivot separates: the keys equal to `low` straddle the boundary.
  __device__ bool is_tie() const { return !found && low == last; }
  __device__ bool is_done() const { return found || low == last; }
};

// What a row masks. Below the first bound are the masked keys, below the second the kept or random
// ones, below the third the kept; without kept or random ones only the first is there.
template <int kRanks>
struct RowBounds {
  KeyBound bound[kRanks];

  __device__ bool any_tied() const {
    bool tied = false;
#pragma unroll
    for (int j = 0; j < kRanks; ++j) tied |= is_tied(bound[j]);
    return tied;
  }

  // Enough to know where no bound is tied.
  __device__ uint32_t pivot(int j) const { return static_cast<uint32_t>(bound[j] >> 32); }
};

// How many keys of the whole row equal one, of those that may be masked.
template <int kHeld>
__device__ uint32_t count_equal(const Tiles<kHeld>& tiles, uint32_t key) {
  uint32_t count = 0;
  for (int32_t tile = 0; tile < tiles.all(); ++tile) {
    const Keys keys = tiles.keys(tile);
    const uint32_t can_mask = tiles.maskable(tile);
#pragma unroll
    for (int i = 0; i < kItems; ++i) count += keys[i] == key && can_mask >> i & 1;
  }
  return __reduce_add_sync(kAllLanes, count);
}

// Behind which position the `wanted`-th key is that equals one. Every warp goes through the whole
// row by itself.
template <int kHeld>
__device__ uint32_t end_of_equal(const Tiles<kHeld>& tiles, int lane, uint32_t key,
                                 uint32_t wanted) {
  for (int32_t tile = 0;; ++tile) {
    const Keys keys = tiles.keys(tile);
    const uint32_t can_mask = tiles.maskable(tile);
#pragma unroll
    for (int item = 0; item < kItems; item += 2) {  // pairs of all lanes, then the next pairs
      const bool equal0 = keys[item] == key && can_mask >> item & 1;
      const bool equal1 = keys[item + 1] == key && can_mask >> (item + 1) & 1;
      const uint32_t all0 = __ballot_sync(kAllLanes, equal0);
      const uint32_t all1 = __ballot_sync(kAllLanes, equal1);
      const uint32_t here = __popc(all0) + __popc(all1);
      if (here < wanted) {
        wanted -= here;
        continue;
      }
      const uint32_t lanes_before = (1u << lane) - 1;
      const uint32_t before = __popc(all0 & lanes_before) + __popc(all1 & lanes_before);
      const uint32_t position = static_cast<uint32_t>(position_of(tile, lane, item));
      uint32_t end = 0;
      if (equal0 && before + 1 == wanted) end = position + 1;
      if (equal1 && before + equal0 + 1 == wanted) end = position + 2;
      return __reduce_max_sync(kAllLanes, end);
    }
  }
}

// Rare: equal keys straddle the boundary. The bound is behind the `wanted`-th of them, in the order
// of the view: from the first on, or from the last on.
template <int kHeld>
__device__ KeyBound tied_bound(const Tiles<kHeld>& tiles, int lane, uint32_t key, uint32_t wanted) {
  if (!tiles.from_last()) {
    return KeyBound{key} << 32 | end_of_equal(tiles, lane, key, wanted);
  }
  const uint32_t equal = count_equal(tiles, key);
  const uint32_t end = end_of_equal(tiles, lane, key, equal - wanted + 1);
  return (KeyBound{key} << 32 | ~(end - 1)) + 1;
}

// The value of a rank for the lane that follows it, the first for all others.
template <int kRanks, typename T>
__device__ T of_lane(int lane, const T (&values)[kRanks]) {
  // All are read before one is chosen: otherwise they would move to memory, to be indexed.
  const T first = values[0], second = values[kRanks > 1], third = values[kRanks - 1];
  return lane == 1 ? second : lane == 2 ? third : first;
}

// Bounds of the `ranks[j]` smallest of n keys. Each lane follows one of the ranks.
template <int kRanks, int kHeld>
__device__ RowBounds<kRanks> select_keys(const Tiles<kHeld>& tiles, Team& team,
                                         const int32_t (&ranks)[kRanks], int32_t n) {
  PivotSearch search(of_lane(team.lane, ranks), n);
  for (int pass = 0; !__all_sync(kAllLanes, search.is_done()); ++pass) {
    if (!search.is_done()) search.propose(pass);
    uint32_t pivot[kRanks], below[kRanks] = {};
#pragma unroll
    for (int j = 0; j < kRanks; ++j) pivot[j] = __shfl_sync(kAllLanes, search.pivot, j);
    tiles.each([&](int32_t, const Keys& keys) {
#pragma unroll
      for (int j = 0; j < kRanks; ++j) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) below[j] += keys[i] < pivot[j];
      }
    });
    team.sum(below);
    if (!search.is_done()) search.learn(of_lane(team.lane, below));
  }
  // Each lane its own bound; those of ties by the whole warp, one after the other.
  KeyBound bound = KeyBound{search.pivot} << 32;
  uint32_t tied = __ballot_sync(kAllLanes, search.is_tie()) & ((1u << kRanks) - 1);
  for (; tied != 0; tied &= tied - 1) {
    const int j = __ffs(tied) - 1;
    const uint32_t key = __shfl_sync(kAllLanes, search.low, j);
    const int32_t wanted = __shfl_sync(kAllLanes, search.rank - search.below_low, j);
    const KeyBound behind = tied_bound(tiles, team.lane, key, wanted);
    if (team.lane == j) bound = behind;
  }
  RowBounds<kRanks> bounds;
#pragma unroll
  for (int j = 0; j < kRanks; ++j) bounds.bound[j] = __shfl_sync(kAllLanes, bound, j);
  return bounds;
}

// The tiles of any row, also of one with tied bounds: its keys are 0, 1, ... for those below the
// last bound, the one before it, and so on, so that plain pivots tell them apart. None are held.
template <int kRanks>
class RankedTiles {
 public:
  __device__ RankedTiles(const KernelArgs& a, const Row& row, const Team& team,
                         const RowBounds<kRanks>& bounds)
      : tiles_(a, row, team), bounds_(bounds) {
    tiles_.load_ahead();
  }

  __device__ RowBounds<kRanks> bounds() const {
    RowBounds<kRanks> plain;
#pragma unroll
    for (int j = 0; j < kRanks; ++j) plain.bound[j] = static_cast<KeyBound>(kRanks - j) << 32;
    return plain;
  }

  __device__ int32_t first() const { return tiles_.first(); }

  template <typename Use>
  __device__ void each(Use use) const {
    tiles_.each([&](int32_t tile, const Keys& keys) { use(tile, ranked(tile, keys)); });
  }

  template <typename Use>
  __device__ void each_with_ids(Use use) {
    tiles_.each_with_ids([&](int32_t tile, const Keys& keys, const Ids& ids) {
      use(tile, ranked(tile, keys), ids);
    });
  }

 private:
  __device__ Keys ranked(int32_t tile, Keys keys) const {
    const uint32_t can_mask = tiles_.maskable(tile);  // an excluded key may be at a boundary
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const KeyBound own = KeyBound{keys[i]} << 32 | tiles_.order(tile, i);
      keys.key[i] = 0;
#pragma unroll
      for (int j = 0; j < kRanks; ++j) {
        keys.key[i] += own >= bounds_.bound[j] || !(can_mask >> i & 1);
      }
    }
    return keys;
  }

  Tiles<0> tiles_;
  const RowBounds<kRanks> bounds_;
};

// How many keys of a warp are below a pivot.
template <typename Tiles>
__device__ uint32_t count_below(const Tiles& tiles, uint32_t pivot) {
  uint32_t count = 0;
  tiles.each([&](int32_t, const Keys& keys) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) count += keys[i] < pivot;
  });
  return __reduce_add_sync(kAllLanes, count);
}

}  // namespace
}  // namespace nar
