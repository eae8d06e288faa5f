// The selection of a few keys on the CPU, such as those of a block: as key_bounds, without branches
// that depend on the keys.
#pragma once

#include "select/key_bounds.h"

namespace nar {

// Up to how many keys it is faster.
constexpr int64_t kShort = 256;

// Compiled once per instruction set (see levels/kernels.h).
namespace {

// Of n upper halves, how many are below a pivot in [0, 65535].
struct UpperCounts {
#if defined(__AVX512F__)
  __m512i held[kShort / 32];
  int num_vectors;

  UpperCounts(const int16_t* upper, int64_t n) : num_vectors(static_cast<int>((n + 31) / 32)) {
    const __m512i largest = _mm512_set1_epi16(INT16_MAX);
    for (int v = 0; v < num_vectors; ++v) {
      const int64_t left = n - 32 * v;
      const __mmask32 there = left < 32 ? (1u << left) - 1 : ~0u;
      held[v] = _mm512_mask_loadu_epi16(largest, there, upper + 32 * v);
    }
  }

  int32_t below(int32_t pivot) const {
    const __m512i of_all = _mm512_set1_epi16(static_cast<int16_t>(pivot ^ kFlip));
    int32_t count = 0;
    for (int v = 0; v < num_vectors; ++v) {
      count += _mm_popcnt_u32(_mm512_cmplt_epi16_mask(held[v], of_all));
    }
    return count;
  }
#else
  const int16_t* upper;
  int64_t n;

  UpperCounts(const int16_t* upper, int64_t n) : upper(upper), n(n) {}

  int32_t below(int32_t pivot) const {
    const int16_t flipped = static_cast<int16_t>(pivot ^ kFlip);
    int16_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += upper[i] < flipped;
    return count;
  }
#endif
};

// Bounds of the `ranks[j]` smallest of `length` keys, at most kShort. Arguments as of key_bounds,
// but `upper` are their upper halves.
inline void short_bounds(const uint32_t* keys, const uint8_t* can_take, int64_t length,
                         const int32_t* ranks, const int16_t* upper, uint32_t flip,
                         KeyBound* bounds) {
  const UpperCounts counts(upper, length);
  for (int j = 0; j < kNumRanks; ++j) {
    if (j > 0 && ranks[j] == ranks[j - 1]) {
      bounds[j] = bounds[j - 1];
      continue;
    }
    bounds[j] = 0;
    if (ranks[j] == 0) continue;
    int32_t half = 0;  // that of the key of this rank: fewer are below it, but not below the next
    for (int32_t bit = 1 << 15; bit != 0; bit >>= 1) {
      half += counts.below(half + bit) < ranks[j] ? bit : 0;
    }
    const bool separates = half < 0xFFFF && counts.below(half + 1) == ranks[j];
    bounds[j] = separates ? static_cast<KeyBound>(half + 1) << 48
                          : bound_within(keys, can_take, length, upper, half,
                                         ranks[j] - counts.below(half), flip);
  }
}

}  // namespace
}  // namespace nar
