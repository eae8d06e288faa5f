// What a warp writes of a tile: ids, labels, mask, and the indices of its masked positions.
#pragma once

#include "corrupt/gpu/select.h"

namespace nar {
namespace {

// Where the outputs of a row begin.
template <typename Id>
struct RowOutputs {
  Id* input_ids;
  Id* labels;
  uint8_t* masked;

  __device__ RowOutputs(const KernelArgs& a, const Row& row)
      : input_ids(static_cast<Id*>(a.input_ids) + row.b * row.length),
        labels(static_cast<Id*>(a.labels) + row.b * row.length),
        masked(a.masked_indices + row.b * row.length) {}
};

template <typename T>
__device__ void store_pair(T* at, T first, T second) {
  *reinterpret_cast<Pair<T>*>(at) = {first, second};
}

struct Below {
  bool item[kItems];

  __device__ Below(const Keys& keys, uint32_t pivot) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) item[i] = keys[i] < pivot;
  }

  __device__ bool operator[](int i) const { return item[i]; }
};

// Of the masked positions, some keep their token and some get a random one.
__device__ inline void corrupt_ids(const KernelArgs& a, const Row& row, int32_t tile, int lane,
                                   const Keys& keys, const Ids& clean,
                                   const RowBounds<kNumRanks>& bounds, int32_t* ids) {
  const Below replace(keys, bounds.pivot(1)), keep(keys, bounds.pivot(2));
  const Words4 random = tile_words(RoundKeys(row.seed), kRandomToken, row.sample, tile, lane);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int32_t token = random_token(random.word[i], static_cast<int32_t>(a.windows.num_tokens),
                                       static_cast<int32_t>(a.windows.mask_id));
    ids[i] = keep[i] ? clean[i] : replace[i] ? token : ids[i];
  }
}

template <bool kInPairs, typename Id>
__device__ void write_positions(const RowOutputs<Id>& out, const Row& row, int32_t tile, int lane,
                                const Below& masked, const int32_t* ids, const Ids& clean) {
  Id labels[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) labels[i] = masked[i] ? clean[i] : Id{kIgnoreIndex};
#pragma unroll
  for (int i = 0; i < kItems; i += kInPairs ? 2 : 1) {
    const int32_t at = position_of(tile, lane, i);
    if (at >= row.length) continue;
    if constexpr (kInPairs) {
      store_pair<Id>(out.input_ids + at, ids[i], ids[i + 1]);
      store_pair<Id>(out.labels + at, labels[i], labels[i + 1]);
      store_pair<uint8_t>(out.masked + at, masked[i], masked[i + 1]);
    } else {
      out.input_ids[at] = ids[i];
      out.labels[at] = labels[i];
      out.masked[at] = masked[i];
    }
  }
}

// The indices of the masked positions from `rows` on, by stream compaction. Returns how many.
template <typename Id>
__device__ int write_rows(int64_t base, int32_t tile, int lane, const Below& masked, Id* rows) {
  int count = 0;
  const uint32_t lanes_before = (1u << lane) - 1;
#pragma unroll
  for (int i = 0; i < kItems; i += 2) {
    const uint32_t first = __ballot_sync(kAllLanes, masked[i]);
    const uint32_t second = __ballot_sync(kAllLanes, masked[i + 1]);
    Id* to = rows + (count + __popc(first & lanes_before) + __popc(second & lanes_before));
    const Id at = static_cast<Id>(base + position_of(tile, lane, i));
    if (masked[i]) *to++ = at;
    if (masked[i + 1]) *to = at + 1;
    count += __popc(first) + __popc(second);
  }
  return count;
}

// Everything of a row. `tiles` is such that pivots tell its keys apart.
template <typename Id, bool kInPairs, int kRanks, typename Tiles>
__device__ void write_row(const KernelArgs& a, const Row& row, const Team& team, const Tiles& tiles,
                          const RowBounds<kRanks>& bounds) {
  const RowOutputs<Id> out(a, row);
  const int64_t base = row.b * row.length;
  Id* rows = static_cast<Id*>(a.row_buffer) + team.memory.rows_before[team.row];
  rows += team.masked_before();
  tiles.each_with_ids([&](int32_t tile, const Keys& keys, const Ids& clean) {
    const Below masked(keys, bounds.pivot(0));
    int32_t ids[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      ids[i] = masked[i] ? static_cast<int32_t>(a.windows.mask_id) : clean[i];
    }
    if constexpr (kRanks > 1) corrupt_ids(a, row, tile, team.lane, keys, clean, bounds, ids);
    write_positions<kInPairs>(out, row, tile, team.lane, masked, ids, clean);
    rows += write_rows(base, tile, team.lane, masked, rows);
  });
}

}  // namespace
}  // namespace nar
