// The k smallest of random keys, as a bound to compare with instead of a sort.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <cstdint>

#include "philox.h"

namespace nar {

// Position i belongs to the k smallest iff (key[i] << 32 | i) < bound. When no key equals the one
// at the boundary, the low half is 0 and `key < bound >> 32` decides alone.
using KeyBound = uint64_t;

NAR_HOST_DEVICE inline bool is_tied(KeyBound bound) { return static_cast<uint32_t>(bound) != 0; }

constexpr int kNumRanks = 3;

// The files that include this are compiled once per instruction set, so everything here must stay
// local to the translation unit: a shared copy could be the one that this CPU cannot run.
namespace {

// A bracket around a pivot with exactly `rank` keys below it.
struct PivotSearch {
  int32_t rank;
  uint64_t low = 0, high = uint64_t{1} << 32;  // the pivot lies in [low, high)
  int32_t below_low = 0, below_high;           // keys below either end
  uint32_t pivot = 0;
  bool found = false;

  NAR_HOST_DEVICE PivotSearch(int32_t rank, int32_t num_keys) : rank(rank), below_high(num_keys) {
    found = rank == 0;
  }

  // Random keys are nearly evenly spread, so interpolation homes in within about five passes. A
  // bisection every other pass after that bounds the number of passes for any keys.
  NAR_HOST_DEVICE void propose(int pass) {
    const uint64_t width = high - low;
    float at = 0.5f;
    if (pass < 8 || pass % 2 == 0) {
      at = (static_cast<float>(rank - below_low) + 0.5f) /
           (static_cast<float>(below_high - below_low) + 1.0f);
    }
    uint64_t offset = static_cast<uint64_t>(static_cast<float>(width) * at);
    if (rank == below_high) offset = width - 1;
    if (offset < 1) offset = 1;
    if (offset > width - 1) offset = width - 1;
    pivot = static_cast<uint32_t>(low + offset);
  }

  NAR_HOST_DEVICE void learn(int32_t below) {
    if (below == rank) {
      found = true;
    } else if (below < rank) {
      low = pivot, below_low = below;
    } else {
      high = pivot, below_high = below;
    }
  }

  // No pivot separates: the keys equal to `low` straddle the boundary.
  NAR_HOST_DEVICE bool is_tie() const { return !found && high - low == 1; }
  NAR_HOST_DEVICE bool is_done() const { return found || high - low == 1; }
};

#if defined(__AVX512F__)
inline uint32_t count_of_64(const uint32_t* keys, uint32_t pivot) {
  const __m512i p = _mm512_set1_epi32(static_cast<int>(pivot));
  uint64_t below = 0;
  for (int j = 0; j < 4; ++j) {
    const __m512i k = _mm512_loadu_si512(keys + 16 * j);
    below |= static_cast<uint64_t>(_mm512_cmplt_epu32_mask(k, p)) << (16 * j);
  }
  return static_cast<uint32_t>(_mm_popcnt_u64(below));
}
#endif

inline void count_below(const uint32_t* __restrict keys, int64_t n, const PivotSearch* search,
                        int32_t* below) {
  const uint32_t p0 = search[0].pivot, p1 = search[1].pivot, p2 = search[2].pivot;
  uint32_t n0 = 0, n1 = 0, n2 = 0;
  int64_t i = 0;
#if defined(__AVX512F__)
  // Masks and their population count: compilers subtract vectors of -1 and sum those up at the end.
  for (; i + 64 <= n; i += 64) {
    n0 += count_of_64(keys + i, p0);
    n1 += count_of_64(keys + i, p1);
    n2 += count_of_64(keys + i, p2);
  }
#endif
  for (; i < n; ++i) {
    n0 += keys[i] < p0;
    n1 += keys[i] < p1;
    n2 += keys[i] < p2;
  }
  below[0] = n0, below[1] = n1, below[2] = n2;
}

inline void count_below_one(const uint32_t* __restrict keys, int64_t n, uint32_t pivot,
                            int32_t* below) {
  uint32_t count = 0;
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 64 <= n; i += 64) count += count_of_64(keys + i, pivot);
#endif
  for (; i < n; ++i) count += keys[i] < pivot;
  *below = count;
}

// Bounds of the `ranks[j]` smallest among the keys whose position may be taken.
//
// `can_take` is null when all may. Otherwise the keys of the others must be 0xFFFFFFFF, which keeps
// them out of every count; `num_keys` counts only those that may. 0 <= rank <= num_keys.
inline void key_bounds(const uint32_t* keys, const uint8_t* can_take, int64_t length,
                       int32_t num_keys, const int32_t* ranks, KeyBound* bounds) {
  PivotSearch search[kNumRanks] = {
      {ranks[0], num_keys}, {ranks[1], num_keys}, {ranks[2], num_keys}};
  const bool one_rank =
      (ranks[0] == 0 || ranks[0] == ranks[2]) && (ranks[1] == 0 || ranks[1] == ranks[2]);
  for (int pass = 0;; ++pass) {
    bool open = false;
    for (PivotSearch& s : search) {
      if (s.is_done()) continue;
      s.propose(pass);
      open = true;
    }
    if (!open) break;
    int32_t below[kNumRanks];
    if (one_rank) {
      count_below_one(keys, length, search[2].pivot, &below[2]);
      below[0] = below[1] = below[2];
    } else {
      count_below(keys, length, search, below);
    }
    for (int j = 0; j < kNumRanks; ++j) {
      if (!search[j].is_done()) search[j].learn(below[j]);
    }
  }
  for (int j = 0; j < kNumRanks; ++j) {
    const PivotSearch& s = search[j];
    bounds[j] = KeyBound{s.pivot} << 32;
    if (s.found) continue;
    int32_t wanted = s.rank - s.below_low;
    int64_t i = 0;
    for (;; ++i) {
      const bool equal = keys[i] == static_cast<uint32_t>(s.low) && (!can_take || can_take[i]);
      if (equal && --wanted == 0) break;
    }
    bounds[j] = s.low << 32 | static_cast<uint32_t>(i + 1);
  }
}

}  // namespace
}  // namespace nar
