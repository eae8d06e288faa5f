// One row of `mask_tokens`. Included by one file per instruction set.
#pragma once

#include "mask_tokens/mask_tokens.h"
#include "rng/philox_simd.h"

namespace nar {
namespace {

// `bound_at(i)` is above the words of masked positions.
template <typename Id, typename BoundAt>
void write_masked(const MaskTokensArgs& a, int64_t b, const uint32_t* __restrict words,
                  const BoundAt& bound_at) {
  const Id* __restrict tokens = static_cast<const Id*>(a.tokens) + b * a.length;
  Id* __restrict ids = static_cast<Id*>(a.ids) + b * a.length;
  uint8_t* __restrict mask = a.mask + b * a.length;
  const Id mask_id = static_cast<Id>(a.mask_id);
  for (int64_t i = 0; i < a.length; ++i) mask[i] = words[i] < bound_at(i);
  // Bits instead of conditions, of which compilers make branches.
  for (int64_t i = 0; i < a.length; ++i) {
    const Id masked = -static_cast<Id>(mask[i]);
    ids[i] = (mask_id & masked) | (tokens[i] & ~masked);
  }
}

template <typename Id>
void mask_row(const MaskTokensArgs& a, int64_t b, uint32_t* words) {
  const int64_t* bounds = a.bounds + b * a.row_stride;
  if (a.stride != 0) return write_masked<Id>(a, b, words, [=](int64_t i) { return bounds[i]; });
  if (bounds[0] >> 32 != 0) {  // the only bound that has no 32 bits
    return write_masked<Id>(a, b, words, [](int64_t) { return int64_t{1} << 32; });
  }
  const uint32_t bound = static_cast<uint32_t>(bounds[0]);
  write_masked<Id>(a, b, words, [bound](int64_t) { return bound; });
}

void mask_tokens_row(const MaskTokensArgs& a, int64_t b, uint32_t* words) {
  fill_words(words, a.length, a.seed, a.stream, static_cast<uint64_t>(a.sample_ids[b]));
  a.narrow ? mask_row<int32_t>(a, b, words) : mask_row<int64_t>(a, b, words);
}

}  // namespace
}  // namespace nar
