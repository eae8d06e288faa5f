// One sequence of `choose`, top to bottom. Included by one file per instruction set.
#pragma once

#include <algorithm>

#include "choose/choose.h"
#include "rng/philox_simd.h"
#include "runtime/float_math.h"
#include "select/key_bounds.h"

namespace nar {
namespace {

static_assert(kChoosePadding >= kWordPadding + 4 && kChoosePadding >= kWordsAtPadding);

// Random words of `count` ascending positions, of which there is one at least. Philox makes four
// at once, so where positions are dense, all words of their span are generated.
void position_words(const ChooseArgs& a, uint64_t slot, int64_t count, const ChooseScratch& s,
                    uint32_t* out) {
  const int64_t begin = s.positions[0] & ~int64_t{3};
  const int64_t span = s.positions[count - 1] + 1 - begin;
  if (span > 4 * count) {
    std::fill_n(s.positions + count, kWordsAtPadding, 0);
    words_at(out, s.positions, count, a.seed, kCriticNoise, slot);
    return;
  }
  uint32_t* words = span == count ? out : s.keys;
  fill_words(words, span, a.seed, kCriticNoise, slot, begin);
  if (words == out) return;
  for (int64_t i = 0; i < count; ++i) out[i] = words[s.positions[i] - begin];
}

// Keys in reverse order of the scores: the smallest is NaN, then comes the highest score.
void score_keys(const ChooseArgs& a, int64_t count, const ChooseScratch& s) {
  const bool has_noise = a.noise_scale > 0;
  for (int64_t i = 0; i < count; i += kFloats) {
    Floats score = load<Floats>(s.scores + i);
    if (a.lowest_first) score = -score;
    if (has_noise) score = score + a.noise_scale * gumbel(load<Ints>(s.words + i));
    const Ints bits = (Ints)(score + 0.0f);  // -0 would not equal 0 as a key
    const Ints key = bits ^ (~(bits >> 31) & 0x7FFFFFFF);
    store(s.keys + i, score == score ? key : Ints{});
  }
}

// So many keys are compared with each other, which is quicker than a search: they are not spread
// evenly.
constexpr int64_t kFewKeys = 64;

// The bound that has `rank` of the keys below it, at least 1; of equal keys, the first come first.
KeyBound bound_of_few(const uint32_t* __restrict keys, int64_t count, int32_t rank) {
  int32_t below[kFewKeys] = {};
  for (int64_t j = 0; j < count; ++j) {
    const uint32_t key = keys[j];
    for (int64_t i = 0; i < count; ++i) below[i] += key < keys[i];
  }
  int32_t below_last = 0;  // the last key below the bound
  for (int64_t i = 0; i < count; ++i) {
    below_last = std::max(below_last, below[i] < rank ? below[i] : 0);
  }
  int32_t num_equal = rank - below_last;
  int64_t at = 0;
  while (below[at] != below_last || --num_equal > 0) ++at;
  return (KeyBound{keys[at]} << 32 | static_cast<uint32_t>(at)) + 1;
}

void choose_row(const ChooseArgs& a, int64_t b, const ChooseScratch& s) {
  const int64_t begin = a.bounds[b], count = a.num_candidates(b), num_left = a.num_left(b);
  const int64_t* rows = a.rows + begin;
  int64_t* kept = a.kept + (begin - a.left_bounds[b]);
  int64_t* left = a.left + a.left_bounds[b];
  if (num_left == 0 || num_left == count) {
    std::copy(rows, rows + count, num_left == 0 ? kept : left);
    return;
  }

  for (int64_t i = 0; i < count; ++i) s.positions[i] = rows[i] - b * a.length;
  if (!a.score) {
    position_words(a, a.slot(b), count, s, s.words);
    for (int64_t i = 0; i < count; ++i) s.keys[i] = ~s.words[i];
  } else {
    if (a.noise_scale > 0) position_words(a, a.slot(b), count, s, s.words);
    const float* scores = a.by_position ? a.score : a.score + begin;
    for (int64_t i = 0; i < count; ++i) {
      s.scores[i] = scores[a.by_position ? s.positions[i] : i];
    }
    score_keys(a, count, s);
  }

  const int32_t num_kept = static_cast<int32_t>(count - num_left);
  const int32_t ranks[kNumRanks] = {num_kept, num_kept, num_kept};
  KeyBound bounds[kNumRanks];
  if (count <= kFewKeys) {
    bounds[0] = bound_of_few(s.keys, count, num_kept);
  } else {
    key_bounds(s.keys, nullptr, count, static_cast<int32_t>(count), ranks, s.upper, bounds);
  }
  for (int64_t i = 0; i < count; ++i) {
    const bool is_kept = (KeyBound{s.keys[i]} << 32 | static_cast<uint32_t>(i)) < bounds[0];
    *(is_kept ? kept : left)++ = rows[i];
  }
}

}  // namespace
}  // namespace nar
