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

struct Row {
  int64_t b, start;
  uint64_t sample, seed;
  int32_t length;
};

// Lane l has the positions 2l, 2l + 1, 64 + 2l and 65 + 2l of a tile, so that a warp reads and
// writes whole lines, 16 bytes a lane where ids are int64.
__device__ inline int32_t position_of(int32_t tile, int lane, int item) {
  return tile * kTile + 2 * lane + (item & 2) * kWarp + (item & 1);
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

// Two neighbours, moved at once where addresses allow and no pair lies across the end of the row.
template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};

template <typename T>
__device__ bool is_paired(const T* row, int32_t length) {
  return reinterpret_cast<uintptr_t>(row) % sizeof(Pair<T>) == 0 && length % 2 == 0;
}

// The ids of a lane, unchecked: what is below 2**32 is its own lower half.
struct Ids {
  uint64_t word[kItems];

  __device__ int32_t operator[](int item) const { return static_cast<int32_t>(word[item]); }
};

template <typename Word>
__device__ void load_words(const Word* window, const Row& row, int32_t tile, int lane, Ids* ids) {
  const bool paired = is_paired(window, row.length);
#pragma unroll
  for (int i = 0; i < kItems; i += 2) {
    const int32_t position = position_of(tile, lane, i);
    if (paired) {
      if (position < row.length) {
        const auto two = *reinterpret_cast<const Pair<Word>*>(window + position);
        ids->word[i] = two.first, ids->word[i + 1] = two.second;
      }
    } else {
      if (position < row.length) ids->word[i] = window[position];
      if (position + 1 < row.length) ids->word[i + 1] = window[position + 1];
    }
  }
}

// What lies behind the end of the row is a valid id.
__device__ inline Ids load_ids(const KernelArgs& a, const Row& row, int32_t tile, int lane) {
  Ids ids;
#pragma unroll
  for (uint64_t& word : ids.word) word = a.windows.safe_id();
  const auto load = [&](auto word) {
    load_words(static_cast<const decltype(word)*>(a.windows.tokens) + row.start, row, tile, lane,
               &ids);
  };
  switch (a.id_bytes) {
    case 1: load(uint8_t{}); break;
    case 2: load(uint16_t{}); break;
    case 4: load(uint32_t{}); break;
    default: load(uint64_t{});
  }
  return ids;
}

// Negative ids are large as words.
__device__ inline bool is_bad(const KernelArgs& a, uint64_t word) {
  const uint32_t low = static_cast<uint32_t>(word);
  return word >> 32 || low >= a.id_limit || low == static_cast<uint32_t>(a.windows.mask_id);
}

__device__ inline bool any_bad(const KernelArgs& a, const Ids& ids) {
  uint64_t all = 0;
  bool bad = false;
#pragma unroll
  for (uint64_t word : ids.word) {
    all |= word;
    bad |= is_bad(a, static_cast<uint32_t>(word));
  }
  return bad || all >> 32;
}

// Replaces the bad ids of a lane by a valid one; returns which they were, as bits.
__device__ inline uint32_t replace_bad(const KernelArgs& a, Ids* ids) {
  uint32_t bad = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (!is_bad(a, ids->word[i])) continue;
    ids->word[i] = a.windows.safe_id();
    bad |= 1u << i;
  }
  return bad;
}

constexpr uint32_t kNone = 0xFFFFFFFF;

// Rare: adds the bad ids of a tile to the record, which is the same for any order of warps: they
// take turns, by a lock.
__device__ __attribute__((noinline)) void record_bad(const KernelArgs& a, int64_t start,
                                                     int32_t tile, int lane, uint32_t bad) {
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

// Which positions may be masked, as bits.
__device__ __attribute__((noinline)) uint32_t find_maskable(const KernelArgs& a, int64_t b,
                                                            int64_t start, int32_t tile, int lane) {
  const Row row = {b, start, 0, 0, static_cast<int32_t>(a.windows.seq_len)};
  Ids ids = {};
  if (a.never_mask) {
    ids = load_ids(a, row, tile, lane);
    replace_bad(a, &ids);
  }
  uint32_t can_mask = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int32_t position = position_of(tile, lane, i);
    bool can = position < row.length;
    if (can && a.maskable) can = a.maskable[row.b * row.length + position];
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
// again in every pass, which costs less than to store and read them. Only keys are held. Ids are
// read when they are written, and loaded into the cache before.
template <int kHeld>
class Tiles {
 public:
  // Makes the keys, for which the window need not be known.
  __device__ Tiles(const KernelArgs& a, const Row& row, const Team& team)
      : a_(a), row_(row), lane_(team.lane), round_keys_(held_round_keys(row.seed)) {
    const int32_t all = num_tiles(row);
    const int32_t share = (all + team.num_warps - 1) / team.num_warps;
    first_ = min(team.warp * share, all);
    end_ = min(first_ + share, all);
#pragma unroll
    for (int t = 0; t < kHeld; ++t) {
      if (is_mine(t)) keys_[t] = make_keys(round_keys_, row, first_ + t, lane_);
    }
  }

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
    for (int32_t tile = first_; kHeld == 0 && tile < end_; ++tile) use(tile, keys(tile));
  }

  // Calls use(tile, keys, ids) for each, whose ids are checked.
  template <typename Use>
  __device__ void each_with_ids(Use use) const {
    if (first_ == end_) return;
    Ids next = load_ids(a_, row_, first_, lane_);
    each([&](int32_t tile, const Keys& keys) {
      Ids ids = next;
      if (tile + 1 < end_) next = load_ids(a_, row_, tile + 1, lane_);
      if (__any_sync(kAllLanes, any_bad(a_, ids))) {
        record_bad(a_, row_.start, tile, lane_, replace_bad(a_, &ids));
      }
      use(tile, keys, ids);
    });
  }

  // Any tile of the row, also of other warps: which of its positions may be masked, and its keys.
  __device__ uint32_t maskable(int32_t tile) const {
    return find_maskable(a_, row_.b, row_.start, tile, lane_);
  }

  __device__ uint32_t position(int32_t tile, int item) const {
    return static_cast<uint32_t>(position_of(tile, lane_, item));
  }

  __device__ Keys keys(int32_t tile) const {
    Keys made = make_keys(round_keys_, row_, tile, lane_);
    if (a_.maskable || a_.never_mask) made.exclude(maskable(tile));
    return made;
  }

 private:
  __device__ bool is_mine(int t) const { return first_ + t < end_; }

  const KernelArgs& a_;
  const Row& row_;
  const int lane_;
  const RoundKeys round_keys_;
  int32_t first_, end_;
  Keys keys_[kHeld ? kHeld : 1];
};

}  // namespace
}  // namespace nar
