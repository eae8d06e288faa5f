// Ids and keys of a row, a tile of 128 positions at a time: four to a lane.
#pragma once

#include <cstddef>
#include <cstdint>

#include "corrupt/corrupt_cuda.h"
#include "corrupt/gpu/block.h"

namespace nar {
namespace {

constexpr int kItems = 4;
constexpr int kTile = kWarp * kItems;

// Tiles whose ids are on their way from memory while a warp works.
constexpr int kMostAhead = 4;

struct Row {
  int64_t b, start;
  uint64_t sample, seed;
  int32_t length;
};

// Lane l has the positions 2l, 2l + 1, 64 + 2l and 65 + 2l of a tile, so that a warp reads and
// writes whole lines, 16 bytes a lane where ids are int64.
__device__ constexpr int32_t item_offset(int item) { return (item & 2) * kWarp + (item & 1); }

__device__ inline int32_t position_of(int32_t tile, int lane, int item) {
  return tile * kTile + 2 * lane + item_offset(item);
}

// The length may be up to the largest int32: what is added to it is unsigned.
__device__ inline int32_t num_tiles(const Row& row) {
  return static_cast<int32_t>((static_cast<uint32_t>(row.length) + kTile - 1) / kTile);
}

__device__ inline bool is_whole(const Row& row, int32_t tile) {
  return (static_cast<uint32_t>(tile) + 1) * kTile <= static_cast<uint32_t>(row.length);
}

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

// The ids of a lane, unchecked: of those of 8 bytes the lower half. What was loaded is not touched
// until the tile is written: a conversion here would wait for memory.
struct Ids {
  uint32_t word[kItems];

  __device__ int32_t operator[](int item) const { return static_cast<int32_t>(word[item]); }
};

template <typename Word, int kStep = 1>
__device__ void load_words(const char* first, const bool (&is_inside)[kItems], Ids* ids) {
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (is_inside[i]) ids->word[i] = reinterpret_cast<const Word*>(first)[kStep * item_offset(i)];
  }
}

// The ids of a lane from `first`, its position in a tile, on. What lies behind the end of the row
// is a valid id.
__device__ inline Ids load_ids(const KernelArgs& a, const Row& row, const char* first,
                               int32_t position) {
  Ids ids;
  bool is_inside[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    ids.word[i] = static_cast<uint32_t>(a.windows.safe_id());
    is_inside[i] = position + item_offset(i) < row.length;
  }
  switch (a.id_bytes) {
    case 1: load_words<uint8_t>(first, is_inside, &ids); break;
    case 2: load_words<uint16_t>(first, is_inside, &ids); break;
    case 4: load_words<uint32_t>(first, is_inside, &ids); break;
    default: load_words<uint32_t, 2>(first, is_inside, &ids);
  }
  return ids;
}

__device__ inline const char* address_of(const KernelArgs& a, int64_t offset) {
  return static_cast<const char*>(a.windows.tokens) + offset * a.id_bytes;
}

// Which of a lane's ids have 8 bytes and more than their lower halves, as bits.
__device__ __attribute__((noinline)) uint32_t find_wide(const KernelArgs& a, int64_t start,
                                                        int32_t tile, int lane) {
  uint32_t wide = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int32_t position = position_of(tile, lane, i);
    if (position >= a.windows.seq_len) continue;
    const uint64_t id = static_cast<const uint64_t*>(a.windows.tokens)[start + position];
    wide |= static_cast<uint32_t>(id >> 32 != 0) << i;
  }
  return wide;
}

// Negative ids are large as words.
__device__ inline bool is_bad(const KernelArgs& a, uint32_t word) {
  return word >= a.id_limit || word == static_cast<uint32_t>(a.windows.mask_id);
}

__device__ inline bool any_bad(const KernelArgs& a, const Row& row, int32_t tile, int lane,
                               const Ids& ids) {
  bool bad = a.id_bytes == 8 && find_wide(a, row.start, tile, lane);
#pragma unroll
  for (uint32_t word : ids.word) bad |= is_bad(a, word);
  return bad;
}

// Replaces the bad ids of a lane by a valid one; returns which they were, as bits.
__device__ inline uint32_t replace_bad(const KernelArgs& a, int64_t start, int32_t tile, int lane,
                                       Ids* ids) {
  uint32_t bad = a.id_bytes == 8 ? find_wide(a, start, tile, lane) : 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    bad |= static_cast<uint32_t>(is_bad(a, ids->word[i])) << i;
    if (bad >> i & 1) ids->word[i] = static_cast<uint32_t>(a.windows.safe_id());
  }
  return bad;
}

constexpr uint32_t kNone = 0xFFFFFFFF;

// Adds the bad ids of a tile to the record, which is the same for any order of warps: they take
// turns, by a lock.
__device__ inline void record_bad(const KernelArgs& a, int64_t start, int32_t tile, int lane,
                                  uint32_t bad) {
  const uint32_t count = __reduce_add_sync(kAllLanes, __popc(bad));
  const uint32_t mine =
      bad ? static_cast<uint32_t>(position_of(tile, lane, __ffs(bad) - 1)) : kNone;
  if (mine != __reduce_min_sync(kAllLanes, mine)) return;
  const int64_t offset = start + mine;
  int64_t token = 0;
  visit_tokens(a.windows.tokens, a.windows.token_type,
               [&](const auto* tokens) { token = tokens[offset]; });

  using Atomic = unsigned long long;
  Atomic* record = reinterpret_cast<Atomic*>(a.invalid);
  Atomic* lock = record + kLock;
  while (atomicCAS(lock, 0, 1) != 0) __nanosleep(100);
  __threadfence();
  const Atomic others = atomicAdd(&record[0], count);
  if (others == 0 || static_cast<Atomic>(offset) < atomicAdd(&record[1], 0)) {
    atomicExch(&record[1], static_cast<Atomic>(offset));
    atomicExch(&record[2], static_cast<Atomic>(token));
  }
  __threadfence();
  atomicExch(lock, 0);
}

// Rare: the ids of a tile, with the bad ones recorded and replaced.
__device__ __attribute__((noinline)) Ids mend(const KernelArgs& a, int64_t start, int32_t tile,
                                              int lane, Ids ids) {
  const uint32_t bad = replace_bad(a, start, tile, lane, &ids);
  record_bad(a, start, tile, lane, bad);
  return ids;
}

// Which positions may be masked, as bits.
__device__ __attribute__((noinline)) uint32_t find_maskable(const KernelArgs& a, int64_t b,
                                                            int64_t start, int32_t tile, int lane) {
  const Row row = {b, start, 0, 0, static_cast<int32_t>(a.windows.seq_len)};
  Ids ids = {};
  if (a.never_mask) {
    const int32_t position = position_of(tile, lane, 0);
    ids = load_ids(a, row, address_of(a, start + position), position);
    replace_bad(a, start, tile, lane, &ids);
  }
  uint32_t can_mask = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int32_t position = position_of(tile, lane, i);
    bool can = position < row.length;
    if (can) can = may_mask(a, row.b, position);
    if (can && a.never_mask) can = !a.never_mask[ids[i]];
    can_mask |= static_cast<uint32_t>(can) << i;
  }
  return can_mask;
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
  const Words4 words = tile_words(round_keys, kMaskKey, row.sample, tile, lane);
  Keys keys;
#pragma unroll
  for (int i = 0; i < kItems; ++i) keys.key[i] = words.word[i];
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
    const RoundKeys round_keys = held_round_keys(row.seed);
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
    return find_maskable(a_, row_.b, row_.start, tile, lane_);
  }

  __device__ uint32_t position(int32_t tile, int item) const {
    return static_cast<uint32_t>(position_of(tile, lane_, item));
  }

  __device__ Keys keys(int32_t tile) const { return keys(tile, RoundKeys(row_.seed)); }

 private:
  static constexpr int kAhead = kHeld == 0 ? 1 : kHeld < kMostAhead ? kHeld : kMostAhead;

  __device__ bool is_mine(int t) const { return first_ + t < end_; }

  __device__ Keys keys(int32_t tile, const RoundKeys& round_keys) const {
    Keys made = make_keys(round_keys, row_, tile, lane_);
    if (is_restricted(a_)) made.exclude(maskable(tile));
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
      ids = mend(a_, row_.start, tile, lane_, ids);
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
