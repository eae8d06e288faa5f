// The candidates of a row of logits: the ids that `unmask` may draw, the k largest logits of those
// that are allowed.
#pragma once

#include "runtime/float_math.h"
#include "select/top_k.h"
#include "unmask/unmask.h"

namespace nar {
namespace {

// NaN becomes -inf, +inf the largest float, and -0 becomes 0: as keys the two would differ.
inline Floats clean(Floats x) {
  return smaller(larger(x, spread(-INFINITY)), spread(3.40282347e38f)) + 0.0f;
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

// Terms of sums, numbers from 0 to 1, in fixed point.
inline Ints units(Floats x) {
  return __builtin_convertvector(x * static_cast<float>(kWhole) + 0.5f, Ints);
}

// Sums of terms in two halves of 15 bits, for up to kMost terms a lane.
struct LaneSums {
  static constexpr int64_t kMost = 32768;
  Ints high = {}, low = {};

  void add(Ints term) {
    high += term >> 15;
    low += term & 0x7FFF;
  }

  int64_t total() const {
    int64_t sum = 0;
    for (int j = 0; j < kFloats; ++j) sum += (int64_t{high[j]} << 15) + low[j];
    return sum;
  }
};

inline Floats widened(const float* from) { return load<Floats>(from); }
inline Floats widened(const uint16_t* from) {
  return (Floats)(__builtin_convertvector(load<Shorts>(from), UInts) << 16);
}

// The logits of a row, T is float or uint16_t for bfloat16.
template <typename T>
struct Row {
  const T* from;
  int64_t count;

  // Calls take(index, vector, next vector) up to `padded`, a multiple of kRowPadding; past the row
  // it gets -inf. Prefetches by hand: the hardware starts too late and stops at page boundaries.
  static constexpr int64_t kAhead = 1024;
  template <typename Take>
  void for_each_pair(int64_t padded, Take take) const {
    int64_t i = 0;
    for (; i + kHalves <= count; i += kHalves) {
      __builtin_prefetch(from + i + kAhead, 0, 2);
      take(i, clean(widened(from + i)), clean(widened(from + i + kFloats)));
    }
    for (; i < padded; i += kHalves) {
      T last[kHalves] = {};
      if (i < count) std::memcpy(last, from + i, static_cast<size_t>(count - i) * sizeof(T));
      Floats x = clean(widened(last)), next = clean(widened(last + kFloats));
      for (int j = 0; j < kFloats; ++j) {
        if (i + j >= count) x[j] = -INFINITY;
        if (i + j + kFloats >= count) next[j] = -INFINITY;
      }
      take(i, x, next);
    }
  }
};

constexpr float kLowestFloat = -3.40282347e38f;

// A sampled lower bound on the k-th largest logit (3 sigma), or the lowest float where a sample
// does not pay.
template <typename T>
float likely_bound(const Row<T>& row, int64_t k) {
  constexpr double kSigmas = 3;
  if (row.count < kWorthSampling || k >= row.count) return kLowestFloat;
  const int most =
      samples_of_share(static_cast<double>(k) / static_cast<double>(row.count), kSigmas);
  if (most >= kSamples) return kLowestFloat;
  T chosen[kSamples];
  const int64_t stride = row.count / kSamples;
  for (int i = 0; i < kSamples; ++i) chosen[i] = row.from[i * stride];
  int16_t samples[kSamples];
  for (int i = 0; i < kSamples; i += kHalves) {
    const Floats x = widened(chosen + i), next = widened(chosen + i + kFloats);
    store(samples + i, upper_halves(clean(x), clean(next)));
  }
  const int32_t upper = quantiles(samples, Int4{} + most)[0] - kFlip;
  // The smallest float with this upper half.
  return upper < kUpperOfMinusInfinity ? float_of(upper * 65536 + 65535) : kLowestFloat;
}

// What a token is drawn among; a logit of -inf is never drawn.
struct Candidates {
  float* logits;  // padded with -inf to kManyFloats
  int32_t* ids;   // ascending; null for all ids
  int64_t count;

  int64_t id(int64_t i) const { return ids ? ids[i] : i; }

  // Index of an id, or -1.
  int64_t find(int64_t id) const {
    if (!ids) return id < count ? id : -1;
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      (ids[middle] < id ? low : high) = ids[middle] < id ? middle + 1 : middle;
    }
    return low < count && ids[low] == id ? low : -1;
  }

  // Masks the forbidden ids; returns how many had logits above -inf.
  int64_t forbid(const int64_t* forbidden, int64_t num_forbidden) const {
    int64_t found = 0;
    for (int64_t f = 0; f < num_forbidden; ++f) {
      const int64_t at = find(forbidden[f]);
      if (at >= 0 && logits[at] > -INFINITY) logits[at] = -INFINITY, ++found;
    }
    return found;
  }

  float largest() const {
    Floats v = spread(-INFINITY);
    for (int64_t i = 0; i < count; i += kFloats) v = larger(load<Floats>(logits + i), v);
    float x = -INFINITY;
    for (int j = 0; j < kFloats; ++j) x = std::max(x, v[j]);
    return x;
  }
};

// Appends the logits that reach the bound, with their ids.
inline void append(Floats x, Ints ids, float bound, Candidates* c) {
  c->count += compress(x >= bound, x, ids, c->logits + c->count, c->ids + c->count);
}

void pad(const Candidates& c) {
  for (int j = 0; j < kManyVectors; ++j) {
    store(c.logits + c.count + j * kFloats, spread(-INFINITY));
  }
}

// Keeps candidates of which is_kept(logits, ids) says so, a vector at a time. `ids`: memory for
// those of all, which may have them.
template <typename IsKept>
void keep_if(IsKept is_kept, int32_t* ids, Candidates* c) {
  Ints all;
  for (int j = 0; j < kFloats; ++j) all[j] = j;
  Candidates kept = {c->logits, ids, 0};
  for (int64_t i = 0; i < c->count; i += kFloats, all += kFloats) {
    const Floats x = load<Floats>(c->logits + i);
    const Ints id = c->ids ? load<Ints>(c->ids + i) : all;
    kept.count += compress(is_kept(x, id), x, id, kept.logits + kept.count, kept.ids + kept.count);
  }
  pad(kept);
  *c = kept;
}

// Keeps larger logits than the last one, and equal ones up to its id.
void keep_up_to(float last, int64_t last_id, int32_t* ids, Candidates* c) {
  const Ints up_to = Ints{} + static_cast<int32_t>(last_id);
  keep_if([&](Floats x, Ints id) { return (x > last) | ((x == last) & (id <= up_to)); }, ids, c);
}

// Keeps the k largest of num_finite > k candidates.
void keep_largest(int64_t k, int64_t num_finite, int16_t* upper, Candidates* c) {
  const int64_t length = (c->count + kHalves - 1) / kHalves * kHalves;
  for (int64_t i = 0; i < length; i += kHalves) {
    const Floats x = load<Floats>(c->logits + i), next = load<Floats>(c->logits + i + kFloats);
    store(upper + i, upper_halves(x, next));
  }
  const Ranked last = kth_largest(c->logits, upper, length, k, num_finite);
  keep_up_to(last.value, c->ids[last.index], c->ids, c);
}

// The k largest logits of a row, or as many as there are.
template <typename T>
Candidates find_candidates(const UnmaskArgs& a, const Row<T>& row, const UnmaskScratch& s) {
  const int64_t padded = padded_row(a.vocabulary);
  if (a.top_k >= a.vocabulary) {
    row.for_each_pair(padded, [&](int64_t i, Floats x, Floats next) {
      store(s.logits + i, x), store(s.logits + i + kFloats, next);
    });
    const Candidates all = {s.logits, nullptr, padded};
    all.forbid(a.forbidden, a.num_forbidden);
    return all;
  }
  for (float bound = likely_bound(row, a.top_k + a.num_forbidden);; bound = kLowestFloat) {
    Candidates c = {s.logits, s.ids, 0};
    Ints ids;
    for (int j = 0; j < kFloats; ++j) ids[j] = j;
    row.for_each_pair(padded, [&](int64_t, Floats x, Floats next) {
      append(x, ids, bound, &c), append(next, ids + kFloats, bound, &c);
      ids += kHalves;
    });
    pad(c);
    const int64_t num_finite = c.count - c.forbid(a.forbidden, a.num_forbidden);
    if (num_finite < a.top_k && bound != kLowestFloat) continue;  // the sample misled
    if (num_finite > a.top_k) keep_largest(a.top_k, num_finite, s.upper, &c);
    return c;
  }
}

}  // namespace
}  // namespace nar
