// One row of `bernoulli_mask`. Included by one file per instruction set.
#pragma once

#include "bernoulli/bernoulli.h"
#include "rng/philox_simd.h"

namespace nar {
namespace {

void bernoulli_row(const BernoulliArgs& a, int64_t b, uint32_t* words) {
  fill_words(words, a.length, a.seed, a.stream, static_cast<uint64_t>(a.sample_ids[b]));
  const int64_t* bounds = a.bounds + b * a.row_stride;
  uint8_t* mask = a.mask + b * a.length;
  if (a.stride != 0) {
    for (int64_t i = 0; i < a.length; ++i) mask[i] = words[i] < bounds[i];
  } else if (bounds[0] >> 32 != 0) {  // the only bound that has no 32 bits
    for (int64_t i = 0; i < a.length; ++i) mask[i] = 1;
  } else {
    const uint32_t bound = static_cast<uint32_t>(bounds[0]);
    for (int64_t i = 0; i < a.length; ++i) mask[i] = words[i] < bound;
  }
}

}  // namespace
}  // namespace nar
