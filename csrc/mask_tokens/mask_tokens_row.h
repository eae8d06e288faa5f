// Rows of `mask_tokens`. Included by one file per instruction set.
#pragma once

#include <algorithm>

#include "mask_tokens/mask_tokens.h"
#include "rng/philox_simd.h"

namespace nar {
namespace {

// Positions from `first` on, counted over all rows. `bound_at(i)` is above the words of those that
// are masked.
template <typename Id, typename BoundAt>
void write_masked(const MaskTokensArgs& a, int64_t first, int64_t count,
                  const uint32_t* __restrict words, const BoundAt& bound_at) {
  const Id* __restrict tokens = static_cast<const Id*>(a.tokens) + first;
  Id* __restrict ids = static_cast<Id*>(a.ids) + first;
  uint8_t* __restrict mask = a.mask + first;
  const Id mask_id = static_cast<Id>(a.mask_id);
  for (int64_t i = 0; i < count; ++i) mask[i] = words[i] < bound_at(i);
  // Bits instead of conditions, of which compilers make branches.
  for (int64_t i = 0; i < count; ++i) {
    const Id masked = -static_cast<Id>(mask[i]);
    ids[i] = (mask_id & masked) | (tokens[i] & ~masked);
  }
}

template <typename Id>
void mask_row(const MaskTokensArgs& a, int64_t b, uint32_t* words) {
  fill_words(words, a.length, a.seed, a.stream, static_cast<uint64_t>(a.sample_ids[b]));
  const int64_t* bounds = a.bounds + b * a.row_stride;
  const auto write = [&](const auto& bound_at) {
    write_masked<Id>(a, b * a.length, a.length, words, bound_at);
  };
  if (a.stride != 0) return write([=](int64_t i) { return bounds[i]; });
  // The only bound that has no 32 bits.
  if (bounds[0] >> 32 != 0) return write([](int64_t) { return int64_t{1} << 32; });
  write([bound = static_cast<uint32_t>(bounds[0])](int64_t) { return bound; });
}

// Rows of one position, such as the class of a sample: their words are made together.
template <typename Id>
void mask_column(const MaskTokensArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t kRows = 512;
  int64_t samples[kRows + kWordsAtPadding] = {};
  uint32_t words[kRows + kWordsAtPadding];
  for (int64_t first = begin; first < end; first += kRows) {
    const int64_t count = std::min(kRows, end - first);
    std::copy(a.sample_ids + first, a.sample_ids + first + count, samples);
    first_words(words, samples, count, a.seed, a.stream);
    const int64_t* bounds = a.bounds + first * a.row_stride;
    const int64_t stride = a.row_stride;
    write_masked<Id>(a, first, count, words, [=](int64_t i) { return bounds[i * stride]; });
  }
}

template <typename Id>
void mask_rows(const MaskTokensArgs& a, int64_t begin, int64_t end, uint32_t* words) {
  if (a.length == 1) return mask_column<Id>(a, begin, end);
  for (int64_t b = begin; b < end; ++b) mask_row<Id>(a, b, words);
}

void mask_tokens_rows(const MaskTokensArgs& a, int64_t begin, int64_t end, uint32_t* words) {
  a.narrow ? mask_rows<int32_t>(a, begin, end, words) : mask_rows<int64_t>(a, begin, end, words);
}

}  // namespace
}  // namespace nar
