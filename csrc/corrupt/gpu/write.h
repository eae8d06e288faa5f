// What a warp writes of a tile: ids, labels, mask, and the indices of its masked positions.
#pragma once

#include "corrupt/gpu/select.h"

namespace nar {
namespace {

// Where a lane writes ids of either width; offsets from there are known to the compiler, so that
// nothing is computed for a store.
class IdOutput {
 public:
  __device__ IdOutput(const KernelArgs& a, void* base, int64_t first)
      : narrow_(a.narrow), at_(static_cast<char*>(base) + first * (a.narrow ? 4 : 8)) {}

  __device__ void advance(int items) { at_ += items * (narrow_ ? 4 : 8); }

  __device__ void store(int32_t offset, int64_t id) const {
    if (narrow_) {
      reinterpret_cast<int32_t*>(at_)[offset] = static_cast<int32_t>(id);
    } else {
      reinterpret_cast<int64_t*>(at_)[offset] = id;
    }
  }

  // Two neighbours, from an even index on. Nothing reads them again here, so that the cache may let
  // go of them first, not of the windows that other blocks are about to read.
  __device__ void store_pair(int32_t offset, int32_t first, int32_t second) const {
    if (narrow_) {
      __stcs(reinterpret_cast<int2*>(at_) + offset / 2, int2{first, second});
    } else {
      __stcs(reinterpret_cast<longlong2*>(at_) + offset / 2, longlong2{first, second});
    }
  }

 private:
  const bool narrow_;
  char* at_;
};

// Where a lane writes its tiles, one after the other. Those that are not wanted are not read.
struct LaneOutputs {
  int64_t index;  // of the lane's first position in the batch
  IdOutput input_ids, labels;
  uint8_t* masked;

  __device__ LaneOutputs(const KernelArgs& a, const Row& row, int32_t tile, int lane)
      : index(row.begin + position_of(tile, lane, 0)),
        input_ids(a, a.input_ids, index),
        labels(a, a.labels, index),
        masked(a.masked_indices + index) {}

  __device__ void next_tile() {
    index += kTile;
    input_ids.advance(kTile);
    labels.advance(kTile);
    masked += kTile;
  }
};

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
  const Words4 random =
      tile_words(RoundKeys(row.seed), row.view.stream(kRandomToken), row.slot, tile, lane);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int32_t token = random_token(random.word[i], static_cast<int32_t>(a.windows.num_tokens),
                                       static_cast<int32_t>(a.windows.mask_id));
    ids[i] = keep[i] ? clean[i] : replace[i] ? token : ids[i];
  }
}

template <bool kInPairs>
__device__ void write_positions(const KernelArgs& a, const LaneOutputs& out, const Row& row,
                                int32_t tile, int lane, const Below& masked, const int32_t* ids,
                                const Ids& clean) {
  int32_t labels[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) labels[i] = masked[i] ? clean[i] : int32_t{kIgnoreIndex};
#pragma unroll
  for (int i = 0; i < kItems; i += kInPairs ? 2 : 1) {
    if (position_of(tile, lane, i) >= row.length) continue;
    const int32_t at = item_offset(i);
    if constexpr (kInPairs) {
      out.input_ids.store_pair(at, ids[i], ids[i + 1]);
      if (a.labels) out.labels.store_pair(at, labels[i], labels[i + 1]);
      if (a.masked_indices) {
        reinterpret_cast<uchar2*>(out.masked)[at / 2] = {masked[i], masked[i + 1]};
      }
    } else {
      out.input_ids.store(at, ids[i]);
      if (a.labels) out.labels.store(at, labels[i]);
      if (a.masked_indices) out.masked[at] = masked[i];
    }
  }
}

// The indices of the masked positions of a tile, of which the lane's first has number `index`, by
// stream compaction. Returns how many.
__device__ inline int write_rows(const IdOutput& rows, int64_t index, int lane,
                                 const Below& masked) {
  int count = 0;
  const uint32_t lanes_before = (1u << lane) - 1;
#pragma unroll
  for (int i = 0; i < kItems; i += 2) {
    const uint32_t all0 = __ballot_sync(kAllLanes, masked[i]);
    const uint32_t all1 = __ballot_sync(kAllLanes, masked[i + 1]);
    const int to = count + __popc(all0 & lanes_before) + __popc(all1 & lanes_before);
    if (masked[i]) rows.store(to, index + item_offset(i));
    if (masked[i + 1]) rows.store(to + masked[i], index + item_offset(i + 1));
    count += __popc(all0) + __popc(all1);
  }
  return count;
}

// Behind the end of a row.
__device__ inline void write_padding(const KernelArgs& a, const Row& row, const Team& team) {
  const IdOutput input_ids(a, a.input_ids, row.begin), labels(a, a.labels, row.begin);
  const int32_t threads = team.num_warps * kWarp;
  for (int32_t i = row.length + team.warp * kWarp + team.lane; i < row.space; i += threads) {
    input_ids.store(i, a.windows.spans.pad_id);
    if (a.labels) labels.store(i, kIgnoreIndex);
    if (a.masked_indices) a.masked_indices[row.begin + i] = 0;
  }
}

// Everything of a row. `tiles` is such that pivots tell its keys apart.
template <bool kInPairs, int kRanks, typename Tiles>
__device__ void write_row(const KernelArgs& a, const Row& row, const Team& team, Tiles& tiles,
                          const RowBounds<kRanks>& bounds) {
  LaneOutputs out(a, row, tiles.first(), team.lane);
  const uint64_t before = team.memory.rows_before[team.row] + team.masked_before();
  IdOutput rows(a, a.row_buffer, static_cast<int64_t>(before));
  tiles.each_with_ids([&](int32_t tile, const Keys& keys, const Ids& clean) {
    const Below masked(keys, bounds.pivot(0));
    int32_t ids[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      ids[i] = masked[i] ? static_cast<int32_t>(a.windows.mask_id) : clean[i];
    }
    if constexpr (kRanks > 1) corrupt_ids(a, row, tile, team.lane, keys, clean, bounds, ids);
    write_positions<kInPairs>(a, out, row, tile, team.lane, masked, ids, clean);
    if (a.row_buffer) rows.advance(write_rows(rows, out.index, team.lane, masked));
    out.next_tile();
  });
}

}  // namespace
}  // namespace nar
