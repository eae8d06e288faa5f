// Ids of a row, a tile of 128 positions at a time: four to a lane.
#pragma once

#include <cstddef>
#include <cstdint>

#include "corrupt/corrupt_cuda.h"
#include "corrupt/gpu/block.h"

namespace nar {
namespace {

constexpr int kItems = 4;
constexpr int kTile = kWarp * kItems;

// A draw: a sample or a block of it, in one view.
struct Row {
  int64_t b, start, begin;  // its number; where it is in the corpus, and in the outputs
  uint64_t slot, seed;
  int32_t stored, length, space;  // as of Span: equal without spans
  View view;
  bool is_divided;  // a constant: whether there are blocks or views
};

template <bool kDivided>
__device__ Draw draw_at(const CorruptArgs& a, int64_t b) {
  if constexpr (!kDivided) return {b, 0, 0};
  return a.division.draw(b, a.windows.batch);
}

// A block in one of the views of its sample, of which the first view has this span.
__device__ inline Span part_of(const CorruptArgs& a, const Draw& draw, const Span& span) {
  const int64_t of_block = a.division.block_length, first = draw.block * of_block;
  const auto in_block = [&](int64_t count) {
    return min(max(count - first, int64_t{0}), of_block);
  };
  return {span.begin + draw.view * a.windows.num_positions() + first, in_block(span.stored),
          in_block(span.length), in_block(span.space)};
}

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
// is a valid id, of an end of sequence where there are any.
__device__ inline Ids load_ids(const KernelArgs& a, const Row& row, const char* first,
                               int32_t position) {
  Ids ids;
  bool is_inside[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    ids.word[i] = static_cast<uint32_t>(a.windows.spans.eos_id);
    is_inside[i] = position + item_offset(i) < row.stored;
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
                                                        int32_t stored, int32_t tile, int lane) {
  uint32_t wide = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int32_t position = position_of(tile, lane, i);
    if (position >= stored) continue;
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
  bool bad = a.id_bytes == 8 && find_wide(a, row.start, row.stored, tile, lane);
#pragma unroll
  for (uint32_t word : ids.word) bad |= is_bad(a, word);
  return bad;
}

// Replaces the bad ids of a lane by a valid one; returns which they were, as bits.
__device__ inline uint32_t replace_bad(const KernelArgs& a, int64_t start, int32_t stored,
                                       int32_t tile, int lane, Ids* ids) {
  uint32_t bad = a.id_bytes == 8 ? find_wide(a, start, stored, tile, lane) : 0;
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

// Rare: the ids of a tile, with the bad ones replaced, and recorded in one of the views.
__device__ __attribute__((noinline)) Ids mend(const KernelArgs& a, int64_t start, int32_t stored,
                                              int32_t tile, int lane, bool counts, Ids ids) {
  const uint32_t bad = replace_bad(a, start, stored, tile, lane, &ids);
  if (counts) record_bad(a, start, tile, lane, bad);
  return ids;
}

// Whether position i of a row may be masked, whatever its id.
template <bool kDivided>
__device__ bool may_mask(const CorruptArgs& a, const Row& row, const Draw& draw, int64_t i) {
  const int64_t in_sample = kDivided ? draw.block * a.division.block_length + i : i;
  if (a.prompt_lengths && in_sample < a.prompt_lengths[draw.row]) return false;
  if (a.loss_mask.flat && i < row.stored &&
      !static_cast<const uint8_t*>(a.loss_mask.flat)[row.start + i]) {
    return false;
  }
  if (!a.maskable) return true;
  const int64_t at = row.begin + i - (kDivided ? draw.view * a.windows.num_positions() : 0);
  switch (a.maskable_bytes) {
    case 1: return static_cast<const uint8_t*>(a.maskable)[at] != 0;
    case 4: return static_cast<const int32_t*>(a.maskable)[at] != kIgnoreIndex;
    default: return static_cast<const int64_t*>(a.maskable)[at] != kIgnoreIndex;
  }
}

// Where a draw lies.
template <bool kDivided>
__device__ Span span_of(const CorruptArgs& a, const Draw& draw) {
  const Span span = a.windows.span(draw.row);
  return kDivided ? part_of(a, draw, span) : span;
}

// Without what its keys are drawn from.
template <bool kDivided>
__device__ Row row_at(const CorruptArgs& a, int64_t b, const Draw& draw, int64_t start) {
  const Span span = span_of<kDivided>(a, draw);
  return {b,
          start,
          span.begin,
          0,
          0,
          static_cast<int32_t>(span.stored),
          static_cast<int32_t>(span.length),
          static_cast<int32_t>(span.space),
          kDivided ? a.division.view(draw.view) : View{},
          kDivided};
}

// Which positions may be masked, as bits.
template <bool kDivided>
__device__ __attribute__((noinline)) uint32_t find_maskable(const KernelArgs& a, int64_t b,
                                                            int64_t start, int32_t tile, int lane) {
  const Draw draw = draw_at<kDivided>(a, b);
  const Row row = row_at<kDivided>(a, b, draw, start);
  Ids ids = {};
  if (a.never_mask) {
    const int32_t position = position_of(tile, lane, 0);
    ids = load_ids(a, row, address_of(a, start + position), position);
    replace_bad(a, start, row.stored, tile, lane, &ids);
  }
  uint32_t can_mask = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int32_t position = position_of(tile, lane, i);
    bool can = position < row.length;
    if (can) can = may_mask<kDivided>(a, row, draw, position);
    if (can && a.never_mask) can = !a.never_mask[ids[i]];
    can_mask |= static_cast<uint32_t>(can) << i;
  }
  return can_mask;
}

}  // namespace
}  // namespace nar
