// One row of `nll`, top to bottom. Included by one file per instruction set.
#pragma once

#include <cmath>
#include <cstring>

#include "nll/nll.h"
#include "runtime/float_math.h"

namespace nar {
namespace {

// Float32 partial sums are accurate enough over this many logits; beyond, they add up in double.
constexpr int64_t kBlock = 256 * kFloats;

inline float max_of(Floats v) {
  float m = v[0];
  for (int i = 1; i < kFloats; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

inline double sum_of(Floats v) {
  double sum = 0;
  for (int i = 0; i < kFloats; ++i) sum += v[i];
  return sum;
}

// The tail of a row, padded with -inf to a vector.
inline Floats load_tail(const float* from, int64_t count) {
  Floats v = spread(-INFINITY);
  std::memcpy(&v, from, static_cast<size_t>(count) * sizeof(float));
  return v;
}

// Float32 to bfloat16, round to nearest even. The NaNs made here stay NaN: they are quiet.
inline void narrow(const float* floats, int64_t count, uint16_t* bfloats) {
  int64_t i = 0;
  for (; i + kFloats <= count; i += kFloats) {
    const UInts bits = load<UInts>(floats + i);
    store(bfloats + i, __builtin_convertvector((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, Shorts));
  }
  for (; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, floats + i, sizeof bits);
    bfloats[i] = static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
  }
}

// Adds the bias, if there is one, and returns the largest logit.
inline float add_bias(float* row, const float* bias, int64_t count) {
  Floats largest = spread(-INFINITY);
  float last = -INFINITY;
  int64_t i = 0;
  for (; i + kFloats <= count; i += kFloats) {
    Floats v = load<Floats>(row + i);
    if (bias) store(row + i, v += load<Floats>(bias + i));
    largest = v > largest ? v : largest;
  }
  for (; i < count; ++i) {
    if (bias) row[i] += bias[i];
    last = row[i] > last ? row[i] : last;
  }
  const float rest = max_of(largest);
  return last > rest ? last : rest;
}

// The sum of exp(row - largest). With kKeep, the terms replace the row.
template <bool kKeep>
inline double sum_exp(float* row, float largest, int64_t count) {
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = begin + kBlock < count ? begin + kBlock : count;
    Floats sum = {};
    int64_t i = begin;
    for (; i + kManyFloats <= end; i += kManyFloats) {
      Floats e[kManyVectors];
      for (int j = 0; j < kManyVectors; ++j) e[j] = load<Floats>(row + i + j * kFloats) - largest;
      exp_of_negative(e);
      for (int j = 0; j < kManyVectors; ++j) {
        if (kKeep) store(row + i + j * kFloats, e[j]);
        sum += e[j];
      }
    }
    for (; i + kFloats <= end; i += kFloats) {
      const Floats e = exp_of_negative(load<Floats>(row + i) - largest);
      if (kKeep) store(row + i, e);
      sum += e;
    }
    if (i < end) {
      const Floats e = exp_of_negative(load_tail(row + i, end - i) - largest);
      if (kKeep) std::memcpy(row + i, &e, static_cast<size_t>(end - i) * sizeof(float));
      sum += e;
    }
    total += sum_of(sum);
  }
  return total;
}

inline void scale(float* row, float by, int64_t count) {
  int64_t i = 0;
  for (; i + kFloats <= count; i += kFloats) store(row + i, load<Floats>(row + i) * by);
  for (; i < count; ++i) row[i] *= by;
}

void nll_row(const NllArgs& a, int64_t r, float* row) {
  const int64_t count = a.vocabulary, label = a.labels[r];
  const bool valid = label >= 0 && label < count;  // else the loss is NaN: row[label] is not there
  const bool is_narrow = a.logit_type == LogitType::kBfloat16;
  const float weight = a.weight ? a.weight[r] : 1.0f;
  if (!valid && weight == 0) {
    const int64_t size = is_narrow ? sizeof(uint16_t) : sizeof(float);
    if (a.gradient)
      std::memset(static_cast<char*>(a.logits) + r * a.stride * size, 0, count * size);
    a.nll[r] = 0;
    return;
  }
  uint16_t* narrow_row = nullptr;
  if (is_narrow) {
    narrow_row = static_cast<uint16_t*>(a.logits) + r * a.stride;
    widen(narrow_row, count, row);
  } else {
    row = static_cast<float*>(a.logits) + r * a.stride;
  }
  const float largest = add_bias(row, a.bias, count);
  const float at_label = valid ? row[label] : NAN;
  if (!a.gradient) {
    a.nll[r] =
        static_cast<float>(std::log(sum_exp<false>(row, largest, count))) + (largest - at_label);
    return;
  }
  const double sum = sum_exp<true>(row, largest, count);
  a.nll[r] = static_cast<float>(std::log(sum)) + (largest - at_label);
  scale(row, static_cast<float>(weight / sum), count);
  if (valid) row[label] -= weight;
  if (narrow_row) narrow(row, count, narrow_row);
}

}  // namespace
}  // namespace nar
