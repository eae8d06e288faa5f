// The selection of a row on the CPU: a search in the upper halves of the keys, twice as many to a
// vector, then among those alone whose upper half is at the boundary.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "runtime/blocks.h"
#include "select/order_statistic.h"
#include "select/set_positions.h"

namespace nar {
namespace {

// Vector extensions of GCC and clang.
typedef int32_t Int4 __attribute__((vector_size(16)));
typedef float Float4 __attribute__((vector_size(16)));

inline Float4 to_float(Int4 v) { return __builtin_convertvector(v, Float4); }

inline bool all_set(Int4 v) {
  int64_t halves[2];
  std::memcpy(halves, &v, sizeof v);
  return (halves[0] & halves[1]) == -1;
}

// Halves of keys are held with their sign bit flipped: x86 compares signed integers.
constexpr int32_t kFlip = 0x8000;

// Upper halves are counted in blocks of so many. What fills the last one up is below no pivot.
constexpr int64_t kUpperPadding = 64;

// Returns how many there are then.
inline int64_t upper_halves(const uint32_t* __restrict keys, int64_t n, int16_t* __restrict upper) {
  in_blocks<kUpperPadding>(n, [&](int64_t first, int64_t count) {
    for (int64_t i = first; i < first + count; ++i) {
      upper[i] = static_cast<int16_t>((keys[i] >> 16) ^ kFlip);
    }
  });
  const int64_t padded = (n + kUpperPadding - 1) & -kUpperPadding;
  std::fill(upper + n, upper + padded, INT16_MAX);
  return padded;
}

// As many keys as 16-bit counts can count.
constexpr int64_t kCountBlock = 32768;

// How many of n upper halves are below each of the first kPivots.
template <int kPivots>
inline Int4 count_below(const int16_t* __restrict upper, int64_t n, Int4 pivots) {
  int16_t p[kPivots];
  for (int j = 0; j < kPivots; ++j) p[j] = static_cast<int16_t>(pivots[j] ^ kFlip);
  Int4 below = {};
  for (int64_t first = 0; first < n; first += kCountBlock) {
    const int64_t end = std::min(first + kCountBlock, n);
    uint16_t count[kPivots] = {};
    for (int64_t i = first; i < end; ++i) {
      for (int j = 0; j < kPivots; ++j) count[j] += upper[i] < p[j];
    }
    for (int j = 0; j < kPivots; ++j) below[j] += count[j];
  }
  return below;
}

// PivotSearch for four ranks, one a lane: branch-free, since the branches are unpredictable.
struct UpperSearch {
  Int4 rank;
  Int4 low = {}, high = Int4{} + 65536, below_low = {}, below_high, pivot = {}, found, done;

  UpperSearch(Int4 rank, int32_t num_keys)
      : rank(rank), below_high(Int4{} + num_keys), found(rank == 0), done(found) {}

  void propose(int pass) {
    const Int4 width = high - low;
    Float4 at = Float4{} + 0.5f;
    // Random keys need five passes; those that are not spread evenly gain by bisection.
    if (pass < 6 || pass % 4 == 0) {
      at = (to_float(rank - below_low) + 0.5f) / (to_float(below_high - below_low) + 1.0f);
    }
    const Int4 last = width - 1;
    Int4 offset = __builtin_convertvector(to_float(width) * at, Int4);
    offset = rank == below_high || offset > last ? last : offset;
    offset = offset < 1 ? Int4{} + 1 : offset;
    pivot = done ? pivot : low + offset;
  }

  void learn(Int4 below) {
    const Int4 less = (below < rank) & ~done, more = (below > rank) & ~done;
    low = less ? pivot : low;
    below_low = less ? below : below_low;
    high = more ? pivot : high;
    below_high = more ? below : below_high;
    found |= below == rank;
    done = found | (high - low == 1);
  }
};

// A type local to this file, so that templates of the standard library instantiated with it are,
// too (see levels/kernels.h).
struct OrderedKey {
  uint64_t value;
  bool operator<(OrderedKey other) const { return value < other.value; }
};

// Of the keys whose upper half is `half` and whose position may be taken, the bound that has
// `wanted` below it; there must be as many. Of equal keys, the lowest `position ^ flip` comes
// first.
inline KeyBound bound_within(const uint32_t* keys, const uint8_t* can_take, int64_t length,
                             const int16_t* upper, int32_t half, int32_t wanted, uint32_t flip) {
  const int16_t flipped = static_cast<int16_t>(half ^ kFlip);
  constexpr int64_t kBlock = 512;
  uint8_t chosen[kBlock];
  int64_t positions[kBlock + 8];
  std::vector<OrderedKey> ordered;
  for (int64_t first = 0; first < length; first += kBlock) {
    const int64_t count = std::min(kBlock, length - first);
    for (int64_t i = 0; i < count; ++i) chosen[i] = upper[first + i] == flipped;
    const int64_t found = set_positions(chosen, count, first, positions, kBlock + 8);
    for (int64_t j = 0; j < found; ++j) {
      const int64_t at = positions[j];
      if (can_take && !can_take[at]) continue;
      ordered.push_back({KeyBound{keys[at]} << 32 | (static_cast<uint32_t>(at) ^ flip)});
    }
  }
  const auto last = ordered.begin() + (wanted - 1);
  std::nth_element(ordered.begin(), last, ordered.end());
  const uint32_t key = static_cast<uint32_t>(last->value >> 32);
  const bool is_tie = key == 0xFFFFFFFF || std::any_of(last + 1, ordered.end(), [&](OrderedKey k) {
                        return k.value >> 32 == key;
                      });
  return is_tie ? last->value + 1 : (KeyBound{key} + 1) << 32;
}

// Bounds of the `ranks[j]` smallest among the keys whose position may be taken.
//
// `can_take` is null when all may. Otherwise the keys of the others must be 0xFFFFFFFF, which keeps
// them out of every count; `num_keys` counts only those that may. 0 <= rank <= num_keys. `upper` is
// scratch for `length` numbers, rounded up to kUpperPadding. `flip`: as of bound_within.
// (Inlined also where there are several callers: a call costs a row 13 ns.)
__attribute__((always_inline)) inline void key_bounds(const uint32_t* keys, const uint8_t* can_take,
                                                      int64_t length, int32_t num_keys,
                                                      const int32_t* ranks, int16_t* upper,
                                                      KeyBound* bounds, uint32_t flip = 0) {
  const int64_t padded = upper_halves(keys, length, upper);
  const Int4 rank = {ranks[0], ranks[1], ranks[2], ranks[2]};
  const Int4 last = Int4{} + ranks[2];
  const bool one_rank = all_set((rank == 0) | (rank == last));
  UpperSearch search(rank, num_keys);
  for (int pass = 0; !all_set(search.done); ++pass) {
    search.propose(pass);
    if (one_rank) {
      const Int4 pivot = Int4{} + search.pivot[2];
      search.learn(Int4{} + count_below<1>(upper, padded, pivot)[0]);
    } else {
      Int4 below = count_below<3>(upper, padded, search.pivot);
      below[3] = below[2];
      search.learn(below);
    }
  }
  for (int j = 0; j < kNumRanks; ++j) {
    if (j > 0 && ranks[j] == ranks[j - 1]) {
      bounds[j] = bounds[j - 1];
      continue;
    }
    bounds[j] = search.found[j] ? static_cast<KeyBound>(search.pivot[j]) << 48
                                : bound_within(keys, can_take, length, upper, search.low[j],
                                               search.rank[j] - search.below_low[j], flip);
  }
}

}  // namespace
}  // namespace nar
