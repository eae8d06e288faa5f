// One row of `corrupt`, top to bottom. Included by one file per instruction set: the loops are
// plain C++ over 32-bit lanes that compilers vectorise, only Philox is written with intrinsics.
#pragma once

#include "corrupt_cpu.h"
#include "order_statistic.h"
#include "philox_simd.h"

namespace nar {
namespace {

// Which positions may be masked, and how many; keys of the others become the largest, so that they
// are below no bound.
int64_t exclude_keys(const CorruptArgs& a, int64_t b, const int32_t* clean, uint8_t* can_mask,
                     uint32_t* keys) {
  const uint8_t* maskable = a.maskable ? a.maskable + b * a.windows.seq_len : nullptr;
  int64_t n = 0;
  for (int64_t i = 0; i < a.windows.seq_len; ++i) {
    const bool can = (!maskable || maskable[i]) && !(a.never_mask && a.never_mask[clean[i]]);
    can_mask[i] = can;
    if (!can) keys[i] = 0xFFFFFFFF;
    n += can;
  }
  return n;
}

// Key bounds of a row: the kept are below the first, the kept or random below the second, the
// masked below the third.
struct RowBounds {
  KeyBound keep, replace, mask;
};

RowBounds row_bounds(const CorruptArgs& a, int64_t b, uint32_t t16, const RowScratch& scratch,
                     const uint8_t* can_mask, int64_t n) {
  const CorruptionShares shares = corruption_shares(a, a.seed, a.sample(b));
  const uint64_t ratio = a.ratio_table[t16];
  if (!a.exact) {
    return {(ratio * shares.keep >> 31) << 32, (ratio * shares.replace >> 31) << 32, ratio << 32};
  }
  const int32_t k = exact_count(a, t16, n);
  const int32_t ranks[kNumRanks] = {shares.of_count(shares.keep, k),
                                    shares.of_count(shares.replace, k), k};
  KeyBound bounds[kNumRanks];
  key_bounds(scratch.keys, can_mask, a.windows.seq_len, n, ranks, bounds);
  return {bounds[0], bounds[1], bounds[2]};
}

struct RowOutput {
  int64_t* __restrict input_ids;
  int64_t* __restrict labels;
  uint8_t* __restrict masked;
};

// The common case: keys alone decide.
int64_t write_row(const RowBounds& bounds, int64_t length, int32_t mask_id,
                  const uint32_t* __restrict keys, const int32_t* __restrict clean, RowOutput out) {
  const uint32_t keep = bounds.keep >> 32, mask = bounds.mask >> 32;
  uint32_t num_masked = 0;
  for (int64_t i = 0; i < length; ++i) {
    const bool is_masked = keys[i] < mask;
    out.input_ids[i] = is_masked & (keys[i] >= keep) ? mask_id : clean[i];
    out.labels[i] = is_masked ? clean[i] : static_cast<int32_t>(kIgnoreIndex);
    out.masked[i] = is_masked;
    num_masked += is_masked;
  }
  return num_masked;
}

// A second pass, since few positions get a random token.
void randomise_row(const RowBounds& bounds, int64_t length, int32_t num_tokens, int32_t mask_id,
                   const uint32_t* __restrict keys, const uint32_t* __restrict random,
                   int64_t* __restrict input_ids) {
  const uint32_t keep = bounds.keep >> 32, width = (bounds.replace >> 32) - keep;
  for (int64_t i = 0; i < length; ++i) {
    if (keys[i] - keep < width) input_ids[i] = random_token(random[i], num_tokens, mask_id);
  }
}

// The rare case of equal keys at a bound: position decides between them.
int64_t write_tied_row(const RowBounds& bounds, int64_t length, int32_t num_tokens, int32_t mask_id,
                       const uint32_t* keys, const uint32_t* random, const int32_t* clean,
                       const uint8_t* can_mask, RowOutput out) {
  int64_t num_masked = 0;
  for (int64_t i = 0; i < length; ++i) {
    const uint64_t key = uint64_t{keys[i]} << 32 | static_cast<uint32_t>(i);
    const bool is_masked = key < bounds.mask && (!can_mask || can_mask[i]);
    const int32_t id = key < bounds.keep      ? clean[i]
                       : key < bounds.replace ? random_token(random[i], num_tokens, mask_id)
                                              : mask_id;
    out.input_ids[i] = is_masked ? id : clean[i];
    out.labels[i] = is_masked ? clean[i] : kIgnoreIndex;
    out.masked[i] = is_masked;
    num_masked += is_masked;
  }
  return num_masked;
}

void corrupt_row(const CorruptArgs& a, int64_t b, uint32_t t16, const RowScratch& scratch,
                 InvalidTokens* invalid) {
  const uint64_t sample = a.sample(b);
  const int32_t mask_id = static_cast<int32_t>(a.windows.mask_id);
  const int32_t num_tokens = static_cast<int32_t>(a.windows.num_tokens);

  load_row(a.windows, b, scratch.clean, invalid);
  fill_words(scratch.keys, a.windows.seq_len, a.seed, kMaskKey, sample);
  const bool all_maskable = !a.maskable && !a.never_mask;
  const uint8_t* can_mask = all_maskable ? nullptr : scratch.can_mask;
  const int64_t n = all_maskable
                        ? a.windows.seq_len
                        : exclude_keys(a, b, scratch.clean, scratch.can_mask, scratch.keys);
  const RowBounds bounds = row_bounds(a, b, t16, scratch, can_mask, n);

  const RowOutput out = {a.input_ids + b * a.windows.seq_len, a.labels + b * a.windows.seq_len,
                         a.masked_indices + b * a.windows.seq_len};
  const bool tied = is_tied(bounds.keep) || is_tied(bounds.replace) || is_tied(bounds.mask);
  const bool randomise = bounds.replace != bounds.keep;
  if (randomise || tied)
    fill_words(scratch.random, a.windows.seq_len, a.seed, kRandomToken, sample);
  int64_t num_masked;
  if (tied) {
    num_masked = write_tied_row(bounds, a.windows.seq_len, num_tokens, mask_id, scratch.keys,
                                scratch.random, scratch.clean, can_mask, out);
  } else {
    num_masked = write_row(bounds, a.windows.seq_len, mask_id, scratch.keys, scratch.clean, out);
    if (randomise) {
      randomise_row(bounds, a.windows.seq_len, num_tokens, mask_id, scratch.keys, scratch.random,
                    out.input_ids);
    }
  }

  write_scalars(a, b, t16, n, num_masked);
}

void write_rows(const CorruptArgs& a, int64_t b, int64_t* __restrict rows) {
  const int64_t* first = rows;
  const uint8_t* __restrict masked = a.masked_indices + b * a.windows.seq_len;
  const int64_t base = b * a.windows.seq_len;
  int64_t i = 0;
#if defined(__AVX512F__)
  const __m512i step = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  for (; i + 64 <= a.windows.seq_len; i += 64) {
    const __m512i flags = _mm512_loadu_si512(masked + i);
    uint64_t bits = _mm512_test_epi8_mask(flags, flags);
    __m512i index = _mm512_add_epi64(step, _mm512_set1_epi64(base + i));
    for (int group = 0; group < 8; ++group, bits >>= 8) {
      const __mmask8 here = static_cast<__mmask8>(bits);
      const uint32_t count = _mm_popcnt_u32(here);
      _mm512_mask_storeu_epi64(rows, static_cast<__mmask8>((1u << count) - 1),
                               _mm512_maskz_compress_epi64(here, index));
      rows += count;
      index = _mm512_add_epi64(index, _mm512_set1_epi64(8));
    }
  }
#endif
  // No branch on the mask, and no store past the last row: the next may be another thread's.
  for (const int64_t* end = first + a.num_masked[b]; rows < end; ++i) {
    *rows = base + i;
    rows += masked[i];
  }
}

}  // namespace
}  // namespace nar
