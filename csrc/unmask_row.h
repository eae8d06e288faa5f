// One row of `unmask`, top to bottom. Included by one file per instruction set.
#pragma once

#include "float_math.h"
#include "philox_simd.h"
#include "top_k.h"
#include "unmask.h"

namespace nar {
namespace {

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

// Among these a token is drawn. One of -inf cannot be.
struct Candidates {
  const float* logits;  // padded with -inf to whole vectors
  const int32_t* ids;   // ascending; null for all ids
  int64_t count;
  float largest;

  int64_t id(int64_t i) const { return ids ? ids[i] : i; }
};

struct LogitStats {
  int64_t num_finite;
  float largest;
};

// No NaN, nothing above the largest finite number, no -0: it would not equal the other one as a
// key.
inline Floats clean(Floats x) {
  x = x == x ? x : spread(-INFINITY);
  x = x > 3.40282347e38f ? spread(3.40282347e38f) : x;
  return x + 0.0f;
}

template <typename T>
inline Floats load_floats(const T* from) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return load<Floats>(from);
  } else {
    return (Floats)(__builtin_convertvector(load<Shorts>(from), UInts) << 16);
  }
}

// The row in float32, padded with -inf, with the upper halves of its keys if they are needed.
template <typename T>
LogitStats load_logits(const UnmaskArgs& a, int64_t r, int64_t padded, const UnmaskScratch& s) {
  const int64_t count = a.vocabulary;
  const T* row = static_cast<const T*>(a.logits) + r * a.stride;
  const bool selects = a.top_k < count;
  Floats largest = spread(-INFINITY);
  Ints num_finite = {};
  const auto take = [&](int64_t i, Floats x) {
    x = clean(x);
    store(s.logits + i, x);
    if (selects) store_upper(s.upper + i, x);
    largest = x > largest ? x : largest;
    num_finite -= x > -INFINITY;
  };
  int64_t i = 0;
  for (; i + kFloats <= count; i += kFloats) take(i, load_floats(row + i));
  if (i < count) {
    Floats tail = spread(-INFINITY);
    T last[kFloats] = {};
    std::memcpy(last, row + i, static_cast<size_t>(count - i) * sizeof(T));
    const Floats x = load_floats(last);
    for (int j = 0; j < count - i; ++j) tail[j] = x[j];
    take(i, tail);
    i += kFloats;
  }
  for (; i < padded; i += kFloats) take(i, spread(-INFINITY));

  LogitStats stats = {0, -INFINITY};
  for (int j = 0; j < kFloats; ++j) {
    stats.num_finite += num_finite[j];
    stats.largest = std::max(stats.largest, largest[j]);
  }
  bool lost_largest = false;
  for (int64_t f = 0; f < a.num_forbidden; ++f) {
    float& logit = s.logits[a.forbidden[f]];
    stats.num_finite -= logit > -INFINITY;
    lost_largest |= logit == stats.largest;
    logit = -INFINITY;
    if (selects) s.upper[a.forbidden[f]] = kUpperOfMinusInfinity;
  }
  if (lost_largest) stats.largest = *std::max_element(s.logits, s.logits + count);
  return stats;
}

int64_t first_of(const float* logits, float value) {
  int64_t i = 0;
  while (!any(load<Floats>(logits + i) == value)) i += kFloats;
  while (logits[i] != value) ++i;
  return i;
}

struct Sums {
  int64_t exp;            // of exp(d), where d = logit - largest
  int64_t exp_times_gap;  // of exp(d) |d|
};

// Sums over the candidates in units of 2**-30: integers, so that no order of summing matters.
template <bool kWithGap>
Sums sum_of_exp(const Candidates& c) {
  // In halves of 15 bits, of which a lane of 32 bits holds the sum of so many.
  constexpr int64_t kTerms = 32768;
  Sums sums = {};
  for (int64_t first = 0; first < c.count; first += kTerms * kFloats) {
    const int64_t end = std::min(c.count, first + kTerms * kFloats);
    Ints high[2] = {}, low[2] = {};
    const auto add = [&](int which, Floats x) {
      const Ints term = __builtin_convertvector(x * 0x1p30f + 0.5f, Ints);
      high[which] += term >> 15;
      low[which] += term & 0x7FFF;
    };
    for (int64_t i = first; i < end; i += kFloats) {
      const Floats d = load<Floats>(c.logits + i) - c.largest;
      const Floats e = exp_of_negative(d);
      add(0, e);
      if (kWithGap) add(1, e * (d < -87.0f ? spread(87.0f) : -d));
    }
    for (int j = 0; j < kFloats; ++j) {
      sums.exp += (int64_t{high[0][j]} << 15) + low[0][j];
      sums.exp_times_gap += (int64_t{high[1][j]} << 15) + low[1][j];
    }
  }
  return sums;
}

inline float from_units(int64_t sum) { return static_cast<float>(sum) * 0x1p-30f; }

// The largest logit but one; the largest itself if there are two.
float second_largest(const Candidates& c) {
  Floats second = spread(-INFINITY);
  Ints num_largest = {};
  for (int64_t i = 0; i < c.count; i += kFloats) {
    const Floats x = load<Floats>(c.logits + i);
    num_largest -= x == c.largest;
    second = x < c.largest && x > second ? x : second;
  }
  int64_t ties = 0;
  float result = -INFINITY;
  for (int j = 0; j < kFloats; ++j) {
    ties += num_largest[j];
    result = std::max(result, second[j]);
  }
  return ties > 1 ? c.largest : result;
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

// Candidates whose words are drawn together.
constexpr int64_t kChunk = 512;

// The words of `count` candidates from `first` on. Words come in blocks of four, so where most of
// a span are candidates, all of it is drawn.
void candidate_words(const UnmaskArgs& a, uint64_t slot, const Candidates& c, int64_t first,
                     int64_t count, uint32_t* out) {
  if (!c.ids) {
    fill_words(out, count, a.seed, kDecodeNoise, slot, first);
    return;
  }
  const int32_t* ids = c.ids + first;
  const int64_t begin = ids[0] & ~3, span = ids[count - 1] + 1 - begin;
  if (span <= 4 * count) {
    uint32_t words[4 * kChunk + kWordPadding];
    fill_words(words, span, a.seed, kDecodeNoise, slot, begin);
    for (int64_t j = 0; j < count; ++j) out[j] = words[ids[j] - begin];
    return;
  }
  int64_t positions[kChunk + kWordsAtPadding] = {};
  for (int64_t j = 0; j < count; ++j) positions[j] = ids[j];
  words_at(out, positions, count, a.seed, kDecodeNoise, slot);
}

// The index of the candidate with the largest (logit - largest) / temperature + noise, of the
// lowest id among equals. Noise is made of a word, and for few words in full: the position of its
// first bit says how large it can be.
int64_t sample(const UnmaskArgs& a, uint64_t slot, const Candidates& c) {
  constexpr float kLn2 = 0.693147181f, kSlack = 1e-3f;  // for roundings
  uint32_t words[kChunk + kWordPadding];
  // First a likely one, so that few others come into question.
  int64_t best_index = first_of(c.logits, c.largest);
  const uint32_t word = random_word(a.seed, kDecodeNoise, slot, c.id(best_index));
  float best = gumbel(Ints{} + static_cast<int32_t>(word))[0];
  for (int64_t first = 0; first < c.count; first += kChunk) {
    const int64_t count = std::min(kChunk, c.count - first);
    candidate_words(a, slot, c, first, count, words);
    for (int64_t i = 0; i < count; i += kFloats) {
      const Floats scaled =
          (load<Floats>(c.logits + first + i) - c.largest) * a.inverse_temperature;
      const Ints word = load<Ints>(words + i);
      const Ints upper = (word >> 8) & 0xFFFFFF;
      // u >= 2**(exponent - 24), so noise is at most (24 - exponent) ln 2.
      const Ints exponent = ((Ints) __builtin_convertvector(upper | 1, Floats) >> 23) - 127;
      const Floats room = __builtin_convertvector(24 - exponent, Floats) * kLn2 + kSlack;
      const Ints may_win = (scaled + room > best) | (upper == 0);
      if (!any(may_win)) continue;
      const Floats score = scaled + gumbel(word);
      for (int j = 0; j < kFloats; ++j) {
        const int64_t index = first + i + j;
        if (score[j] > best || (score[j] == best && index < best_index)) {
          best = score[j], best_index = index;
        }
      }
    }
  }
  return best_index;
}

void unmask_row(const UnmaskArgs& a, int64_t r, const UnmaskScratch& s) {
  const int64_t padded = padded_row(a.vocabulary);
  const LogitStats stats = a.logit_type == LogitType::kBfloat16
                               ? load_logits<uint16_t>(a, r, padded, s)
                               : load_logits<float>(a, r, padded, s);
  const bool is_given = a.given && a.given[r] >= 0;
  if (stats.num_finite == 0) {
    a.tokens[r] = is_given ? a.given[r] : a.fallback;
    a.log_prob[r] = -INFINITY;
    if (a.confidence) a.confidence[r] = -INFINITY;
    return;
  }

  int64_t token = is_given ? a.given[r] : first_of(s.logits, stats.largest);
  float logit = token < a.vocabulary ? s.logits[token] : -INFINITY;
  Candidates candidates = {s.logits, nullptr, padded, stats.largest};
  if (a.top_k < stats.num_finite) {
    const KeptBound bound = kept_bound(s.logits, s.upper, padded, a.top_k, stats.num_finite);
    if (!bound.keeps(logit, token)) logit = -INFINITY;
    candidates.count = keep_only(bound, s.logits, padded, s.ids);
    candidates.ids = s.ids;
  }
  if (!is_given && a.inverse_temperature != 0) {
    const int64_t index = sample(a, static_cast<uint64_t>(a.noise_slots[r]), candidates);
    token = candidates.id(index);
    logit = candidates.logits[index];
  }

  const bool with_gap = a.confidence && a.confidence_type == ConfidenceType::kEntropy;
  const Sums sums = with_gap ? sum_of_exp<true>(candidates) : sum_of_exp<false>(candidates);
  const float sum = from_units(sums.exp), log_of_sum = log_of_positive(spread(sum))[0];
  a.tokens[r] = token;
  a.log_prob[r] = (logit - stats.largest) - log_of_sum;
  if (!a.confidence) return;
  if (with_gap) {
    a.confidence[r] = -(log_of_sum + from_units(sums.exp_times_gap) / sum);
  } else {
    const float gap = second_largest(candidates) - stats.largest;
    a.confidence[r] = (1.0f - exp_of_negative(spread(gap))[0]) / sum;
  }
}

}  // namespace
}  // namespace nar
