// One row of `unmask`, top to bottom. Included by one file per instruction set.
#pragma once

#include "float_math.h"
#include "key_bounds.h"
#include "philox_simd.h"
#include "unmask.h"

namespace nar {
namespace {

// A logit of -inf is one that cannot be sampled.
struct LogitStats {
  int64_t num_allowed;
  float largest;
};

// The row in float32, padded with -inf; no NaN, nothing above the largest finite number.
LogitStats load_logits(const UnmaskArgs& a, int64_t r, int64_t padded, float* logits) {
  const int64_t count = a.vocabulary;
  if (a.logit_type == LogitType::kBfloat16) {
    widen(static_cast<const uint16_t*>(a.logits) + r * a.stride, count, logits);
  } else {
    std::memcpy(logits, static_cast<const float*>(a.logits) + r * a.stride,
                static_cast<size_t>(count) * sizeof(float));
  }
  std::fill(logits + count, logits + padded, -INFINITY);
  for (int64_t i = 0; i < a.num_forbidden; ++i) logits[a.forbidden[i]] = -INFINITY;

  Floats largest = spread(-INFINITY);
  Ints num_allowed = {};
  for (int64_t i = 0; i < padded; i += kFloats) {
    Floats x = load<Floats>(logits + i);
    x = x == x ? x : spread(-INFINITY);
    x = x > 3.40282347e38f ? spread(3.40282347e38f) : x;
    store(logits + i, x + 0.0f);  // no -0: it would not equal the other one as a key
    largest = x > largest ? x : largest;
    num_allowed -= x > -INFINITY;
  }
  LogitStats stats = {0, -INFINITY};
  for (int i = 0; i < kFloats; ++i) {
    stats.num_allowed += num_allowed[i];
    stats.largest = std::max(stats.largest, largest[i]);
  }
  return stats;
}

// Leaves the k largest; of equal ones, those that come first.
void filter_top_k(int64_t k, int64_t num_allowed, int64_t padded, const UnmaskScratch& s) {
  for (int64_t i = 0; i < padded; i += kFloats) {
    const Floats x = load<Floats>(s.logits + i);
    const Ints bits = (Ints)x;
    const Ints descending = bits ^ ~((bits >> 31) | INT32_MIN);  // as an unsigned number
    store(s.keys + i, x == -INFINITY ? Ints{} - 1 : descending);
  }
  const int32_t rank = static_cast<int32_t>(k), ranks[kNumRanks] = {rank, rank, rank};
  KeyBound bounds[kNumRanks];
  key_bounds(s.keys, nullptr, padded, static_cast<int32_t>(num_allowed), ranks, s.upper, bounds);
  const uint32_t first_out = static_cast<uint32_t>(bounds[0] >> 32);
  if (is_tied(bounds[0])) {
    for (int64_t i = 0; i < padded; ++i) {
      const KeyBound key = KeyBound{s.keys[i]} << 32 | static_cast<uint32_t>(i);
      s.logits[i] = key < bounds[0] ? s.logits[i] : -INFINITY;
    }
    return;
  }
  for (int64_t i = 0; i < padded; ++i) {
    s.logits[i] = s.keys[i] < first_out ? s.logits[i] : -INFINITY;
  }
}

// The sum of exp(logit - largest) in units of 2**-30: integers, so that no order of summing
// matters.
int64_t sum_of_exp(const float* logits, float largest, int64_t padded) {
  // In halves of 15 bits, of which a lane of 32 bits holds the sum of so many.
  constexpr int64_t kTerms = 32768;
  int64_t sum = 0;
  for (int64_t first = 0; first < padded; first += kTerms * kFloats) {
    const int64_t end = std::min(padded, first + kTerms * kFloats);
    Ints high = {}, low = {};
    for (int64_t i = first; i < end; i += kFloats) {
      const Floats e = exp_of_negative(load<Floats>(logits + i) - largest);
      const Ints term = __builtin_convertvector(e * 0x1p30f + 0.5f, Ints);
      high += term >> 15;
      low += term & 0x7FFF;
    }
    for (int j = 0; j < kFloats; ++j) sum += (int64_t{high[j]} << 15) + low[j];
  }
  return sum;
}

// Standard Gumbel noise of random words: -log(E), where E = -log(1 - u) and u = (word + 1/2) /
// 2**32. Small words, which decide, keep all their bits; large ones are rounded to 31.
Floats gumbel(Ints words) {
  const Ints is_small = ((words >> 30) & 3) == 0;  // u < 1/4: 1 - u would lose its bits
  const Floats u = (__builtin_convertvector(words & 0x3FFFFFFF, Floats) + 0.5f) * 0x1p-32f;
  const Ints complement = (~words >> 1) & 0x7FFFFFFF;
  const Floats rest = (__builtin_convertvector(complement, Floats) + 0.5f) * 0x1p-31f;
  const Floats log_of_rest = is_small ? log_of_parts(Floats{}, -u) : log_of_positive(rest);
  return -log_of_positive(-log_of_rest);
}

inline bool any(Ints v) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)v) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)v, (__m256i)v);
#else
  int64_t halves[2];
  std::memcpy(halves, &v, sizeof v);
  return (halves[0] | halves[1]) != 0;
#endif
}

// The first of the largest (logit - largest) / temperature + noise. Noise is made of a word, and
// for few words in full: the position of its first bit says how large it can be.
int64_t sample(const UnmaskArgs& a, int64_t slot, float largest, int64_t padded,
               const float* logits) {
  constexpr int64_t kBlock = 1024;
  constexpr float kLn2 = 0.693147181f, kSlack = 1e-3f;  // for roundings
  uint32_t words[kBlock];
  float best = -INFINITY;
  int64_t best_id = 0;
  for (int64_t first = 0; first < padded; first += kBlock) {
    const int64_t length = std::min(kBlock, padded - first);
    fill_words(words, length, a.seed, kDecodeNoise, static_cast<uint64_t>(slot), first);
    for (int64_t i = 0; i < length; i += kFloats) {
      const Floats scaled = (load<Floats>(logits + first + i) - largest) * a.inverse_temperature;
      const Ints word = load<Ints>(words + i);
      const Ints upper = (word >> 8) & 0xFFFFFF;
      // u >= 2**(exponent - 24), so noise is at most (24 - exponent) ln 2.
      const Ints exponent = ((Ints) __builtin_convertvector(upper | 1, Floats) >> 23) - 127;
      const Floats room = __builtin_convertvector(24 - exponent, Floats) * kLn2 + kSlack;
      const Ints may_win = (scaled + room > best) | (upper == 0);
      if (!any(may_win)) continue;
      const Floats score = scaled + gumbel(word);
      for (int j = 0; j < kFloats; ++j) {
        if (score[j] > best) best = score[j], best_id = first + i + j;
      }
    }
  }
  return best_id;
}

int64_t first_of(const float* logits, float value) {
  int64_t i = 0;
  while (logits[i] != value) ++i;
  return i;
}

void unmask_row(const UnmaskArgs& a, int64_t r, const UnmaskScratch& s) {
  const int64_t padded = (a.vocabulary + kWordPadding - 1) / kWordPadding * kWordPadding;
  const LogitStats stats = load_logits(a, r, padded, s.logits);
  const bool is_given = a.given && a.given[r] >= 0;
  if (stats.num_allowed == 0) {
    a.tokens[r] = is_given ? a.given[r] : a.fallback;
    a.log_prob[r] = -INFINITY;
    return;
  }
  if (a.top_k < stats.num_allowed) filter_top_k(a.top_k, stats.num_allowed, padded, s);
  const int64_t token = is_given ? a.given[r]
                        : a.inverse_temperature == 0
                            ? first_of(s.logits, stats.largest)
                            : sample(a, a.noise_slots[r], stats.largest, padded, s.logits);
  const int64_t sum = sum_of_exp(s.logits, stats.largest, padded);
  const Floats log_of_sum = log_of_positive(spread(static_cast<float>(sum) * 0x1p-30f));
  a.tokens[r] = token;
  const float logit = token < a.vocabulary ? s.logits[token] : -INFINITY;
  a.log_prob[r] = (logit - stats.largest) - log_of_sum[0];
}

}  // namespace
}  // namespace nar
