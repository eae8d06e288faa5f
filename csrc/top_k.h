// The k largest of a row of floats, by a search for the last of them rather than a sort.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "float_math.h"
#include "key_bounds.h"

namespace nar {
namespace {

// Numbers that ascend, as signed integers, while floats descend; -0 must have been made 0.
inline Ints descending(Floats x) {
  const Ints bits = (Ints)x;
  return bits ^ ~(bits >> 31 | INT32_MIN) ^ INT32_MIN;
}

inline int32_t descending(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits ^ ~(bits >> 31 | INT32_MIN) ^ INT32_MIN;
}

// The upper half of the number of each float, as `count_below` takes it.
inline void store_upper(int16_t* to, Floats x) {
  store(to, __builtin_convertvector(descending(x) >> 16, Shorts));
}
constexpr int16_t kUpperOfMinusInfinity = 0x7F80;

// A float is kept if its number is below `key`, or equal to it at an index of at most `last_tie`.
struct KeptBound {
  int32_t key;
  int64_t last_tie;

  bool keeps(float x, int64_t index) const {
    return descending(x) < key || (descending(x) == key && index <= last_tie);
  }
};

// Brackets the upper half with k floats up to it by what a sample of the row shows.
inline void bracket(const int16_t* upper, int64_t length, int64_t k, int32_t quantiles[2]) {
  constexpr int kSamples = 256;
  constexpr double kSigmas = 2.5;
  int16_t samples[kSamples];
  const int64_t stride = length / kSamples;
  for (int i = 0; i < kSamples; ++i) samples[i] = upper[i * stride];
  const double share = static_cast<double>(k) / static_cast<double>(length);
  const double spread = kSigmas * std::sqrt(share * (1 - share) * kSamples);
  for (int side = 0; side < 2; ++side) {
    // The largest number with at most so many samples below it.
    const int most = static_cast<int>(share * kSamples + (side ? spread + 1 : -spread - 1));
    int32_t low = 0;
    for (int32_t bit = 0x8000; bit > 0; bit >>= 1) {
      if (count_below<1>(samples, kSamples, Int4{} + (low + bit))[0] <= most) low += bit;
    }
    quantiles[side] = low;
  }
}

// What keeps the k largest of `num_finite` floats; of equal ones, those that come first.
// 0 < k < num_finite.
inline KeptBound kept_bound(const float* logits, const int16_t* upper, int64_t length, int64_t k,
                            int64_t num_finite) {
  const auto to_key = [](int32_t upper_half) {
    return static_cast<int32_t>(static_cast<uint32_t>(upper_half) << 16) ^ INT32_MIN;
  };
  // The upper half of the last one kept is in [low, high).
  int32_t low = 0, high = kUpperOfMinusInfinity + kFlip;
  int64_t below_low = 0, below_high = num_finite;
  const auto learn = [&](int32_t pivot, int64_t below) {
    if (below < k) {
      if (pivot > low) low = pivot, below_low = below;
    } else if (pivot < high) {
      high = pivot, below_high = below;
    }
  };

  constexpr int64_t kWorthSampling = 2048;
  const bool samples = length >= kWorthSampling;
  if (samples) {
    int32_t quantiles[2];
    bracket(upper, length, k, quantiles);
    const Int4 pivots = {quantiles[0], quantiles[1], quantiles[1], 0};
    const Int4 below = count_below<3>(upper, length, pivots);
    for (int side = 0; side < 2; ++side) learn(quantiles[side], below[side]);
  }
  const int64_t few = 16 + length / 128;  // to look at each of them
  for (int pass = 0; below_high - below_low > few && high - low > 1; ++pass) {
    double at = 0.5;  // bisection every other time bounds the number of passes
    if (samples && pass % 2 == 0) {
      at = (static_cast<double>(k - below_low) - 0.5) / static_cast<double>(below_high - below_low);
    }
    const int32_t width = high - low;
    const int32_t pivot = low + std::clamp(static_cast<int32_t>(at * width), 1, width - 1);
    const int64_t below = count_below<1>(upper, length, Int4{} + pivot)[0];
    if (below == k) return {to_key(pivot), -1};
    learn(pivot, below);
  }

  constexpr int64_t kBlock = 512;
  uint8_t chosen[kBlock];
  int64_t positions[kBlock + 8];
  std::vector<OrderedKey> ordered;
  ordered.reserve(below_high - below_low);
  const int16_t first_half = static_cast<int16_t>(low - kFlip);
  const uint16_t width = static_cast<uint16_t>(high - low);
  for (int64_t first = 0; first < length; first += kBlock) {
    const int64_t count = std::min(kBlock, length - first);
    for (int64_t i = 0; i < count; ++i) {
      chosen[i] = static_cast<uint16_t>(upper[first + i] - first_half) < width;
    }
    const int64_t found = set_positions(chosen, count, first, positions, kBlock + 8);
    for (int64_t j = 0; j < found; ++j) {
      const uint32_t key = static_cast<uint32_t>(descending(logits[positions[j]]) ^ INT32_MIN);
      ordered.push_back({uint64_t{key} << 32 | static_cast<uint32_t>(positions[j])});
    }
  }
  const auto last = ordered.begin() + (k - below_low - 1);
  std::nth_element(ordered.begin(), last, ordered.end());
  return {static_cast<int32_t>(static_cast<uint32_t>(last->value >> 32) ^ 0x80000000u),
          static_cast<int64_t>(last->value & 0xFFFFFFFF)};
}

// Moves the chosen lanes of a vector to the front; how many they are.
inline int compress(Ints chosen, Floats x, Ints id, float* logits, int32_t* ids) {
#if defined(__AVX512F__)
  const __mmask16 mask = _mm512_movepi32_mask((__m512i)chosen);
  _mm512_storeu_ps(logits, _mm512_maskz_compress_ps(mask, (__m512)x));
  _mm512_storeu_si512(ids, _mm512_maskz_compress_epi32(mask, (__m512i)id));
  return _mm_popcnt_u32(mask);
#elif defined(__AVX2__)
  const int mask = _mm256_movemask_ps((__m256)chosen);
  int64_t order;
  std::memcpy(&order, kSetBits.bit[mask], sizeof order);
  const __m256i lanes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(order));
  _mm256_storeu_ps(logits, _mm256_permutevar8x32_ps((__m256)x, lanes));
  store(ids, (Ints)_mm256_permutevar8x32_epi32((__m256i)id, lanes));
  return _mm_popcnt_u32(static_cast<uint32_t>(mask));
#else
  int count = 0;
  for (int j = 0; j < kFloats; ++j) {
    logits[count] = x[j], ids[count] = id[j];
    count -= chosen[j];
  }
  return count;
#endif
}

// Moves the floats that are kept to the front, in place, and their indices to `ids`. Returns how
// many; whole vectors are padded with -inf.
inline int64_t keep_only(KeptBound bound, float* logits, int64_t length, int32_t* ids) {
  Ints id;
  for (int j = 0; j < kFloats; ++j) id[j] = j;
  const Ints last_tie = Ints{} + static_cast<int32_t>(bound.last_tie);
  int64_t count = 0;
  for (int64_t i = 0; i < length; i += kFloats, id += kFloats) {
    const Floats x = load<Floats>(logits + i);
    const Ints number = descending(x);
    const Ints chosen = (number < bound.key) | ((number == bound.key) & (id <= last_tie));
    count += compress(chosen, x, id, logits + count, ids + count);
  }
  const int64_t end = (count + kFloats - 1) / kFloats * kFloats;
  std::fill(logits + count, logits + end, -INFINITY);
  return count;
}

}  // namespace
}  // namespace nar
