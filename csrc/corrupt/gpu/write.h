// What a warp writes of a tile: ids, labels, mask, and the indices of its masked positions.
#pragma once

#include "corrupt/gpu/select.h"

namespace nar {
namespace {

// An output of ids of either width; null is not wanted.
class IdOutput {
 public:
  __device__ IdOutput(const KernelArgs& a, void* at, int64_t first)
      : narrow_(a.narrow), at_(static_cast<char*>(at) + (at ? first * (a.narrow ? 4 : 8) : 0)) {}

  __device__ bool is_wanted() const { return at_ != nullptr; }

  __device__ void store(int64_t i, int64_t id) const {
    if (narrow_) {
      reinterpret_cast<int32_t*>(at_)[i] = static_cast<int32_t>(id);
    } else {
      reinterpret_cast<int64_t*>(at_)[i] = id;
    }
  }

  // Two neighbours, from an even index on.
  __device__ void store_pair(int64_t i, int32_t first, int32_t second) const {
    if (narrow_) {
      reinterpret_cast<Pair<int32_t>*>(at_)[i / 2] = {first, second};
    } else {
      reinterpret_cast<Pair<int64_t>*>(at_)[i / 2] = {first, second};
    }
  }

 private:
  const bool narrow_;
  char* const at_;
};

// Where the outputs of a row begin.
struct RowOutputs {
  IdOutput input_ids, labels, rows;
  uint8_t* masked;

  __device__ RowOutputs(const KernelArgs& a, const Row& row, uint64_t first_row)
      : input_ids(a, a.input_ids, row.b * row.length),
        labels(a, a.labels, row.b * row.length),
        rows(a, a.row_buffer, static_cast<int64_t>(first_row)),
        masked(a.masked_indices ? a.masked_indices + row.b * row.length : nullptr) {}
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
  const Words4 random = tile_words(RoundKeys(row.seed), kRandomToken, row.sample, tile, lane);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int32_t token = random_token(random.word[i], static_cast<int32_t>(a.windows.num_tokens),
                                       static_cast<int32_t>(a.windows.mask_id));
    ids[i] = keep[i] ? clean[i] : replace[i] ? token : ids[i];
  }
}

template <bool kInPairs>
__device__ void write_positions(const RowOutputs& out, const Row& row, int32_t tile, int lane,
                                const Below& masked, const int32_t* ids, const Ids& clean) {
  int32_t labels[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) labels[i] = masked[i] ? clean[i] : int32_t{kIgnoreIndex};
#pragma unroll
  for (int i = 0; i < kItems; i += kInPairs ? 2 : 1) {
    const int32_t at = position_of(tile, lane, i);
    if (at >= row.length) continue;
    if constexpr (kInPairs) {
      out.input_ids.store_pair(at, ids[i], ids[i + 1]);
      if (out.labels.is_wanted()) out.labels.store_pair(at, labels[i], labels[i + 1]);
      if (out.masked) {
        *reinterpret_cast<Pair<uint8_t>*>(out.masked + at) = {masked[i], masked[i + 1]};
      }
    } else {
      out.input_ids.store(at, ids[i]);
      if (out.labels.is_wanted()) out.labels.store(at, labels[i]);
      if (out.masked) out.masked[at] = masked[i];
    }
  }
}

// The indices of the masked positions from number `first` of the row's on, by stream compaction.
// Returns how many.
__device__ inline int write_rows(const IdOutput& rows, int first, int64_t base, int32_t tile,
                                 int lane, const Below& masked) {
  int count = 0;
  const uint32_t lanes_before = (1u << lane) - 1;
#pragma unroll
  for (int i = 0; i < kItems; i += 2) {
    const uint32_t all0 = __ballot_sync(kAllLanes, masked[i]);
    const uint32_t all1 = __ballot_sync(kAllLanes, masked[i + 1]);
    const int to = first + count + __popc(all0 & lanes_before) + __popc(all1 & lanes_before);
    const int64_t at = base + position_of(tile, lane, i);
    if (masked[i]) rows.store(to, at);
    if (masked[i + 1]) rows.store(to + masked[i], at + 1);
    count += __popc(all0) + __popc(all1);
  }
  return count;
}

// Everything of a row. `tiles` is such that pivots tell its keys apart.
template <bool kInPairs, int kRanks, typename Tiles>
__device__ void write_row(const KernelArgs& a, const Row& row, const Team& team, const Tiles& tiles,
                          const RowBounds<kRanks>& bounds) {
  const RowOutputs out(a, row, team.memory.rows_before[team.row] + team.masked_before());
  int num_rows = 0;
  tiles.each_with_ids([&](int32_t tile, const Keys& keys, const Ids& clean) {
    const Below masked(keys, bounds.pivot(0));
    int32_t ids[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      ids[i] = masked[i] ? static_cast<int32_t>(a.windows.mask_id) : clean[i];
    }
    if constexpr (kRanks > 1) corrupt_ids(a, row, tile, team.lane, keys, clean, bounds, ids);
    write_positions<kInPairs>(out, row, tile, team.lane, masked, ids, clean);
    if (out.rows.is_wanted()) {
      num_rows += write_rows(out.rows, num_rows, row.b * row.length, tile, team.lane, masked);
    }
  });
}

}  // namespace
}  // namespace nar
