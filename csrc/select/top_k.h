// The k largest of a row of floats, by a search for the last of them rather than a sort.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "runtime/float_math.h"
#include "select/key_bounds.h"

namespace nar {
namespace {

// 16-bit lanes of a vector.
constexpr int kHalves = 2 * kFloats;
typedef int16_t Halves __attribute__((vector_size(4 * kFloats)));

// Calls f(lane) for each lane that is set.
template <typename F>
inline void for_each_lane(Halves chosen, F f) {
#if defined(__AVX512F__)
  for (uint32_t left = _mm512_movepi16_mask((__m512i)chosen); left; left &= left - 1) {
    f(__builtin_ctz(left));
  }
#elif defined(__AVX2__)
  constexpr uint32_t kFirstOfTwo = 0x55555555;  // a bit for each byte
  const uint32_t bytes = static_cast<uint32_t>(_mm256_movemask_epi8((__m256i)chosen));
  for (uint32_t left = bytes & kFirstOfTwo; left; left &= left - 1) f(__builtin_ctz(left) / 2);
#else
  for (int lane = 0; lane < kHalves; ++lane) {
    if (chosen[lane]) f(lane);
  }
#endif
}

// An order-reversing map of floats to signed integers; -0 must have been made 0.
inline int32_t descending(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits < 0 ? bits ^ INT32_MIN : ~bits;
}

// Numbers in the order of falling floats; of equal ones, the lower index comes first.
inline uint64_t order_of(float x, int64_t index) {
  return uint64_t{static_cast<uint32_t>(descending(x)) ^ 0x80000000u} << 32 |
         static_cast<uint32_t>(index);
}

// Inverse of `descending`.
inline float float_of(int32_t number) {
  const int32_t bits = number < 0 ? ~number : number ^ INT32_MIN;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The upper half of `descending` of each float, as `count_below` takes it.
inline Halves upper_halves(Floats a, Floats b) {
#if defined(__AVX512F__)
  Halves odd;
  for (int i = 0; i < kHalves; ++i) odd[i] = static_cast<int16_t>(2 * i + 1);
  const Halves bits = (Halves)_mm512_permutex2var_epi16((__m512i)a, (__m512i)odd, (__m512i)b);
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)((UInts)a >> 16), (__m256i)((UInts)b >> 16));
  const Halves bits = (Halves)_mm256_permute4x64_epi64(packed, _MM_SHUFFLE(3, 1, 2, 0));
#else
  Halves bits;
  for (int i = 0; i < kFloats; ++i) {
    bits[i] = static_cast<int16_t>(((UInts)a)[i] >> 16);
    bits[i + kFloats] = static_cast<int16_t>(((UInts)b)[i] >> 16);
  }
#endif
  return bits ^ (~(bits >> 15) | INT16_MIN);
}
constexpr int16_t kUpperOfMinusInfinity = 0x7F80;

constexpr int kSamples = 256;
constexpr int64_t kWorthSampling = 2048;  // floats

// How many samples fall into the top `share` of the floats, plus so many standard deviations.
inline int samples_of_share(double share, double sigmas) {
  const double spread = std::abs(sigmas) * std::sqrt(share * (1 - share) * kSamples) + 1;
  return static_cast<int>(share * kSamples + (sigmas < 0 ? -spread : spread));
}

// The largest upper halves with at most so many samples below them.
inline Int4 quantiles(const int16_t samples[kSamples], Int4 most) {
  Int4 pivots = {};
  for (int32_t bit = 0x8000; bit > 0; bit >>= 1) {
    const Int4 higher = pivots + bit;
    pivots = count_below<3>(samples, kSamples, higher) <= most ? higher : pivots;
  }
  return pivots;
}

// Three pivots that bracket the k-th float with high probability, from a sample.
inline Int4 bracket(const int16_t* upper, int64_t length, int64_t k) {
  constexpr double kSigmas = 2.5;
  int16_t samples[kSamples];
  const int64_t stride = length / kSamples;
  for (int i = 0; i < kSamples; ++i) samples[i] = upper[i * stride];
  const double share = static_cast<double>(k) / static_cast<double>(length);
  const Int4 most = {samples_of_share(share, -kSigmas), static_cast<int>(share * kSamples),
                     samples_of_share(share, kSigmas), 0};
  return quantiles(samples, most);
}

// The upper halves in [low, high) of what may be the k-th float, and how many floats are below
// either end.
struct Bracket {
  int64_t k;
  int32_t low, high;
  int64_t below_low, below_high;

  int32_t width() const { return high - low; }

  void learn(int32_t pivot, int64_t below) {
    if (below < k) {
      if (pivot > low) low = pivot, below_low = below;
    } else if (pivot < high) {
      high = pivot, below_high = below;
    }
  }

  // Around where the k-th would be if floats were spread evenly, or quarters.
  Int4 pivots(bool interpolate) const {
    int32_t middle = width() / 2, step = width() / 4;
    if (interpolate) {
      const double at = static_cast<double>(k - below_low) - 0.5;
      middle = static_cast<int32_t>(at / static_cast<double>(below_high - below_low) * width());
      step = width() / 8;
    }
    const Int4 offsets = Int4{} + middle + Int4{-1, 0, 1, 0} * std::max(step, 1);
    const Int4 last = Int4{} + width() - 1;
    const Int4 at_least = offsets < 1 ? Int4{} + 1 : offsets;
    return low + (at_least > last ? last : at_least);
  }
};

// A float, and where it is.
struct Ranked {
  float value;
  int64_t index;
};

// The k-th largest of `num_finite` floats; of equal ones, those that come first are larger.
// 0 < k <= num_finite. `upper` are their upper halves.
inline Ranked kth_largest(const float* logits, const int16_t* upper, int64_t length, int64_t k,
                          int64_t num_finite) {
  Bracket b = {k, 0, kUpperOfMinusInfinity + kFlip, 0, num_finite};
  const bool samples = length >= kWorthSampling;
  const int64_t few = 16 + length / 256;  // few enough for nth_element
  for (int pass = 0; b.below_high - b.below_low > few && b.width() > 1; ++pass) {
    // Every third pass takes quarters, which bounds the number of passes.
    const Int4 pivots =
        samples && pass == 0 ? bracket(upper, length, k) : b.pivots(samples && pass % 3 != 0);
    const Int4 below = count_below<3>(upper, length, pivots);
    for (int j = 0; j < 3; ++j) b.learn(pivots[j], below[j]);
  }

  std::vector<OrderedKey> ordered;
  ordered.reserve(b.below_high - b.below_low);
  const Halves low = Halves{} + static_cast<int16_t>(b.low - kFlip);
  const Halves last = Halves{} + static_cast<int16_t>(b.high - 1 - kFlip);
  for (int64_t i = 0; i < length; i += kHalves) {
    const Halves half = load<Halves>(upper + i);
    for_each_lane(~((half < low) | (half > last)),
                  [&](int lane) { ordered.push_back({order_of(logits[i + lane], i + lane)}); });
  }
  const auto kth = ordered.begin() + (k - b.below_low - 1);
  std::nth_element(ordered.begin(), kth, ordered.end());
  return {float_of(static_cast<int32_t>(static_cast<uint32_t>(kth->value >> 32) ^ 0x80000000u)),
          static_cast<int64_t>(kth->value & 0xFFFFFFFF)};
}

// Stores the chosen lanes of two vectors side by side, and garbage after them. Returns how many.
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

}  // namespace
}  // namespace nar
