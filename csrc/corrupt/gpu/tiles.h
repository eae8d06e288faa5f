// Keys of a row, by tiles, and the tiles of a warp with their ids.
#pragma once

#include "corrupt/gpu/ids.h"

namespace nar {
namespace {

// Tiles whose ids are on their way from memory while a warp of many works; one of few has registers
// for one.
constexpr int kAheadOfMany = 4;

// Round keys that stay in registers: the compiler would rather make them again for every tile.
__device__ inline RoundKeys held_round_keys(uint64_t seed) {
  RoundKeys keys(seed);
#ifdef __CUDA_ARCH__
#pragma unroll
  for (int i = 0; i < 10; ++i) asm volatile("" : "+r"(keys.low[i]), "+r"(keys.high[i]));
#endif
  return keys;
}

// The random words at a lane's positions. Lanes 2j and 2j + 1 make the blocks j and 16 + j, of four
// neighbours each, and swap halves.
__device__ inline Words4 tile_words(const RoundKeys& keys, uint32_t stream, uint64_t sample,
                                    int32_t tile, int lane) {
  const bool odd = lane & 1;
  const uint32_t block = tile * kWarp + (lane >> 1) + (odd ? 16 : 0);
  const Words4 own = random_block(keys, stream, sample, block);
  const uint32_t a = __shfl_xor_sync(kAllLanes, odd ? own.word[0] : own.word[2], 1);
  const uint32_t b = __shfl_xor_sync(kAllLanes, odd ? own.word[1] : own.word[3], 1);
  return odd ? Words4{{a, b, own.word[2], own.word[3]}} : Words4{{own.word[0], own.word[1], a, b}};
}

struct Keys {
  uint32_t key[kItems];

  __device__ uint32_t operator[](int item) const { return key[item]; }

  // The largest: those are below no bound, but for a bound of ties (KeyBound).
  __device__ void exclude(uint32_t can_mask) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (!(can_mask >> i & 1)) key[i] = 0xFFFFFFFF;
    }
  }
};

// Of all positions of the row, whether they may be masked or not; behind its end the largest.
__device__ inline Keys make_keys(const RoundKeys& round_keys, const Row& row, int32_t tile,
                                 int lane) {
  const Words4 words = tile_words(round_keys, row.view.stream(kMaskKey), row.slot, tile, lane);
  Keys keys;
#pragma unroll
  for (int i = 0; i < kItems; ++i) keys.key[i] = row.view.key(words.word[i]);
  if (!is_whole(row, tile)) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (position_of(tile, lane, i) >= row.length) keys.key[i] = 0xFFFFFFFF;
    }
  }
  return keys;
}

// The tiles of a warp: kHeld in registers, or, where that is 0, as many as there are, each made
// again in every pass, which costs less than to store and read them. Only keys are held; of the ids
// those of a few tiles are on their way.
template <int kHeld>
class Tiles {
 public:
  // Makes the keys, for which the window need not be known.
  __device__ Tiles(const KernelArgs& a, const Row& row, const Team& team)
      : a_(a), row_(row), lane_(team.lane) {
    RoundKeys round_keys(row.seed);
    // With few tiles it costs less to make them again than to spare the registers.
    if constexpr (kHeld > kFewTiles) round_keys = held_round_keys(row.seed);
    const int32_t all = num_tiles(row);
    const int32_t share = (all + team.num_warps - 1) / team.num_warps;
    first_ = min(team.warp * share, all);
    end_ = min(first_ + share, all);
#pragma unroll
    for (int t = 0; t < kHeld; ++t) {
      if (is_mine(t)) keys_[t] = make_keys(round_keys, row, first_ + t, lane_);
    }
  }

  // Once the window is known, and long before its ids are needed.
  __device__ void load_ahead() {
    next_ = address_of(a_, row_.start + position_of(first_, lane_, 0));
#pragma unroll
    for (int t = 0; t < kAhead; ++t) {
      if (is_mine(t)) ids_[t] = load_next(first_ + t);
    }
  }

  __device__ int32_t first() const { return first_; }
  __device__ int32_t all() const { return num_tiles(row_); }  // of the row

  // Takes positions that may not be masked out of the keys; returns how many the lane has left.
  __device__ uint32_t exclude() {
    uint32_t count = 0;
#pragma unroll
    for (int t = 0; t < kHeld; ++t) {
      if (!is_mine(t)) continue;
      const uint32_t can_mask = maskable(first_ + t);
      keys_[t].exclude(can_mask);
      count += __popc(can_mask);
    }
    for (int32_t tile = first_; kHeld == 0 && tile < end_; ++tile) {
      count += __popc(maskable(tile));
    }
    return count;
  }

  // Calls use(tile, keys) for each.
  template <typename Use>
  __device__ void each(Use use) const {
#pragma unroll
    for (int t = 0; t < kHeld; ++t) {
      if (is_mine(t)) use(first_ + t, keys_[t]);
    }
    if constexpr (kHeld == 0) each_made([&](int32_t tile, const Keys& keys) { use(tile, keys); });
  }

  // Calls use(tile, keys, ids) for each, whose ids are checked. Once, after load_ahead().
  template <typename Use>
  __device__ void each_with_ids(Use use) {
#pragma unroll
    for (int t = 0; t < kHeld; ++t) {
      if (is_mine(t)) use(first_ + t, keys_[t], take_ids(first_ + t, ids_[t % kAhead]));
    }
    if constexpr (kHeld == 0) {
      each_made([&](int32_t tile, const Keys& keys) { use(tile, keys, take_ids(tile, ids_[0])); });
    }
  }

  // Any tile of the row, also of other warps: which of its positions may be masked, and its keys.
  __device__ uint32_t maskable(int32_t tile) const {
    return row_.is_divided ? find_maskable<true>(a_, row_.b, row_.start, tile, lane_)
                           : find_maskable<false>(a_, row_.b, row_.start, tile, lane_);
  }

  __device__ uint32_t order(int32_t tile, int item) const {
    return row_.view.order(position_of(tile, lane_, item));
  }

  __device__ bool from_last() const { return row_.view.is_rest; }

  __device__ Keys keys(int32_t tile) const { return keys(tile, RoundKeys(row_.seed)); }

 private:
  static constexpr int kAhead = kHeld > kFewTiles ? kAheadOfMany : 1;

  __device__ bool is_mine(int t) const { return first_ + t < end_; }

  __device__ Keys keys(int32_t tile, const RoundKeys& round_keys) const {
    Keys made = make_keys(round_keys, row_, tile, lane_);
    if (a_.restricted) made.exclude(maskable(tile));
    return made;
  }

  // Calls use(tile, keys) for each, with keys that are made for it.
  template <typename Use>
  __device__ void each_made(Use use) const {
    const RoundKeys round_keys = held_round_keys(row_.seed);
    for (int32_t tile = first_; tile < end_; ++tile) use(tile, keys(tile, round_keys));
  }

  __device__ Ids load_next(int32_t tile) {
    const Ids ids = load_ids(a_, row_, next_, position_of(tile, lane_, 0));
    next_ += kTile * a_.id_bytes;
    return ids;
  }

  // The ids of a tile, checked; those of another one are loaded in their place.
  __device__ Ids take_ids(int32_t tile, Ids& loaded) {
    Ids ids = loaded;
    if (tile + kAhead < end_) loaded = load_next(tile + kAhead);
    if (__any_sync(kAllLanes, any_bad(a_, row_, tile, lane_, ids))) {
      const bool counts = !row_.is_divided || a_.division.counts_ids(row_.view);
      ids = mend(a_, row_.start, row_.stored, tile, lane_, counts, ids);
    }
    return ids;
  }

  const KernelArgs& a_;
  const Row& row_;
  const int lane_;
  int32_t first_, end_;
  Keys keys_[kHeld ? kHeld : 1];
  const char* next_;  // the lane's ids of the tile to be loaded next
  Ids ids_[kAhead];
};

}  // namespace
}  // namespace nar
