// One row of `unmask`, top to bottom. Included by one file per instruction set.
#pragma once

#include "rng/philox_simd.h"
#include "runtime/float_math.h"
#include "unmask/candidates.h"
#include "unmask/top_p.h"
#include "unmask/unmask.h"

namespace nar {
namespace {

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

// Sums over the candidates in fixed point, units of 2**-30: exact in any order.
template <bool kWithGap>
Sums sum_of_exp(const Candidates& c, float largest) {
  constexpr int64_t kMost = LaneSums::kMost * kFloats;
  Sums sums = {};
  for (int64_t first = 0; first < c.count; first += kMost) {
    const int64_t end = std::min(c.count, first + kMost);
    LaneSums of_exp, of_exp_times_gap;
    for (int64_t i = first; i < end; i += kManyFloats) {
      Floats gap[kManyVectors], e[kManyVectors];
      for (int j = 0; j < kManyVectors; ++j) {
        e[j] = gap[j] = load<Floats>(c.logits + i + j * kFloats) - largest;
      }
      exp_of_negative(e);
      for (int j = 0; j < kManyVectors; ++j) {
        of_exp.add(units(e[j]));
        if (kWithGap) {
          of_exp_times_gap.add(units(e[j] * (gap[j] < -87.0f ? spread(87.0f) : -gap[j])));
        }
      }
    }
    sums.exp += of_exp.total();
    sums.exp_times_gap += of_exp_times_gap.total();
  }
  return sums;
}

inline float from_units(int64_t sum) { return static_cast<float>(sum) * 0x1p-30f; }

// The second-largest logit; the largest itself if it occurs twice.
float second_largest(const Candidates& c, float largest) {
  Floats second = spread(-INFINITY);
  Ints num_largest = {};
  for (int64_t i = 0; i < c.count; i += kFloats) {
    const Floats x = load<Floats>(c.logits + i);
    num_largest -= x == largest;
    second = x < largest && x > second ? x : second;
  }
  int64_t ties = 0;
  float result = -INFINITY;
  for (int j = 0; j < kFloats; ++j) {
    ties += num_largest[j];
    result = std::max(result, second[j]);
  }
  return ties > 1 ? largest : result;
}

// Candidates per batch of random words.
constexpr int64_t kChunk = 512;

// Random words of candidates [first, first + count). Philox makes four words at once, so where
// candidates are dense, all words of their span are generated.
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

// Gumbel-max: the index of the candidate with the largest (logit - largest) / temperature + noise,
// the lowest on ties. A cheap upper bound on the noise rules out nearly all of them first.
int64_t sample(const UnmaskArgs& a, uint64_t slot, const Candidates& c, float largest) {
  constexpr float kLn2 = 0.693147181f, kSlack = 1e-3f;  // slack for rounding errors
  uint32_t words[kChunk + kWordPadding];
  // Starts from a likely winner, so that the bound rules out most others.
  int64_t best_index = first_of(c.logits, largest);
  const uint32_t word = random_word(a.seed, kDecodeNoise, slot, c.id(best_index));
  float best = gumbel(Ints{} + static_cast<int32_t>(word))[0];
  for (int64_t first = 0; first < c.count; first += kChunk) {
    const int64_t count = std::min(kChunk, c.count - first);
    candidate_words(a, slot, c, first, count, words);
    for (int64_t i = 0; i < count; i += kFloats) {
      const Floats scaled = (load<Floats>(c.logits + first + i) - largest) * a.inverse_temperature;
      const UInts word = load<UInts>(words + i);
      // Noise is at most -log(u), and the bits of a float x are less than 2**23 (127 + log2(x)).
      const Ints bits = (Ints) __builtin_convertvector((Ints)(word >> 1), Floats);
      const Floats log_u = __builtin_convertvector(bits, Floats) * (0x1p-23f * kLn2);
      if (!any(scaled - log_u > best - ((127 + 31) * kLn2 + kSlack))) continue;
      const Floats score = scaled + gumbel((Ints)word);
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

template <typename T>
void unmask_row(const UnmaskArgs& a, int64_t r, const UnmaskScratch& s) {
  const Row<T> row = {static_cast<const T*>(a.logits) + r * a.stride, a.vocabulary};
  Candidates candidates = find_candidates(a, row, s);
  const float largest = candidates.largest();
  const bool is_given = a.given && a.given[r] >= 0;
  if (largest == -INFINITY) {
    a.tokens[r] = is_given ? a.given[r] : a.fallback;
    a.log_prob[r] = -INFINITY;
    if (a.confidence) a.confidence[r] = -INFINITY;
    return;
  }
  if (a.top_p < kWhole) {
    const float scale = a.inverse_temperature > 0 ? a.inverse_temperature : 1;
    keep_top_p(a.top_p, {largest, scale}, s.ids, &candidates);
  }

  int64_t index;
  if (is_given) {
    index = candidates.find(a.given[r]);
  } else if (a.inverse_temperature == 0) {
    index = first_of(candidates.logits, largest);
  } else {
    index = sample(a, static_cast<uint64_t>(a.noise_slots[r]), candidates, largest);
  }
  const float logit = index < 0 ? -INFINITY : candidates.logits[index];

  const bool with_gap = a.confidence && a.confidence_type == ConfidenceType::kEntropy;
  const Sums sums =
      with_gap ? sum_of_exp<true>(candidates, largest) : sum_of_exp<false>(candidates, largest);
  const float sum = from_units(sums.exp), log_of_sum = log_of_positive(spread(sum))[0];
  a.tokens[r] = is_given ? a.given[r] : candidates.id(index);
  a.log_prob[r] = (logit - largest) - log_of_sum;
  if (!a.confidence) return;
  if (with_gap) {
    a.confidence[r] = -(log_of_sum + from_units(sums.exp_times_gap) / sum);
  } else {
    const float gap = second_largest(candidates, largest) - largest;
    a.confidence[r] = (1.0f - exp_of_negative(spread(gap))[0]) / sum;
  }
}

void unmask_row(const UnmaskArgs& a, int64_t r, const UnmaskScratch& s) {
  if (a.logit_type == LogitType::kBfloat16) {
    unmask_row<uint16_t>(a, r, s);
  } else {
    unmask_row<float>(a, r, s);
  }
}

}  // namespace
}  // namespace nar
