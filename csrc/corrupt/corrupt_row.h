// One row of `corrupt`, top to bottom. Compiled once per instruction set (see levels/kernels.h):
// most loops are plain C++ that compilers vectorise; steps where they do badly have intrinsics, in
// headers of their own.
#pragma once

#include <algorithm>

#include "corrupt/corrupt_cpu.h"
#include "corrupt/write_row.h"
#include "rng/philox_simd.h"
#include "select/key_bounds.h"
#include "select/set_positions.h"

namespace nar {
namespace {

template <typename T>
void differ_from(const void* values, T given, int64_t first, int64_t length, uint8_t* can_mask) {
  const T* of_row = static_cast<const T*>(values) + first;
  for (int64_t i = 0; i < length; ++i) can_mask[i] = of_row[i] != given;
}

// Which positions of a row may be masked, whatever their ids. The loss mask of a corpus says
// nothing of ends of sequence that are added, which may.
void find_maskable(const CorruptArgs& a, int64_t b, const Span& span, void* scratch,
                   uint8_t* can_mask) {
  const int64_t length = span.length, first = span.begin;
  switch (a.maskable ? a.maskable_bytes : 0) {
    case 0: std::fill(can_mask, can_mask + length, uint8_t{1}); break;
    case 1: differ_from<uint8_t>(a.maskable, 0, first, length, can_mask); break;
    case 4: differ_from<int32_t>(a.maskable, kIgnoreIndex, first, length, can_mask); break;
    default: differ_from<int64_t>(a.maskable, kIgnoreIndex, first, length, can_mask);
  }
  if (a.has_loss_mask()) {
    const uint8_t* flags = locate_flags(a.windows, a.loss_mask, b, scratch);
    for (int64_t i = 0; i < span.stored; ++i) can_mask[i] &= flags[i] != 0;
  }
  if (!a.prompt_lengths) return;
  const int64_t prompt = std::min(std::max(a.prompt_lengths[b], int64_t{0}), length);
  std::fill(can_mask, can_mask + prompt, uint8_t{0});
}

// Finds the maskable positions and returns their number. The other keys become the largest, so
// that no bound selects them.
int64_t exclude_keys(const CorruptArgs& a, int64_t b, const Span& span, const RowScratch& scratch) {
  const int64_t length = span.length;
  const int32_t* clean = scratch.clean;
  uint8_t* can_mask = scratch.can_mask;
  uint32_t* keys = scratch.keys;
  find_maskable(a, b, span, scratch.window, can_mask);
  for (int64_t i = 0; a.never_mask && i < length; ++i) can_mask[i] &= !a.never_mask[clean[i]];
  for (int64_t i = 0; i < length; ++i) keys[i] |= can_mask[i] - 1u;
  return count_set(can_mask, length);
}

// Key bounds of a row: the kept are below the first, the kept or random below the second, the
// masked below the third.
struct RowBounds {
  KeyBound keep, replace, mask;
};

RowBounds row_bounds(const CorruptArgs& a, int64_t b, int64_t length, uint32_t t16,
                     const RowScratch& scratch, const uint8_t* can_mask, int64_t n) {
  const CorruptionShares shares = corruption_shares(a, a.seed, a.sample(b));
  const uint64_t ratio = a.ratio_table[t16];
  if (!a.exact) {
    return {(ratio * shares.keep >> 31) << 32, (ratio * shares.replace >> 31) << 32, ratio << 32};
  }
  const int32_t k = exact_count(a, t16, n);
  const int32_t ranks[kNumRanks] = {shares.of_count(shares.keep, k),
                                    shares.of_count(shares.replace, k), k};
  KeyBound bounds[kNumRanks];
  key_bounds(scratch.keys, can_mask, length, n, ranks, scratch.upper, bounds);
  return {bounds[0], bounds[1], bounds[2]};
}

// A second pass over the few positions that get a random token, so that only they draw words.
template <typename Id>
void randomise_row(const CorruptArgs& a, const RowBounds& bounds, uint64_t sample, int64_t end,
                   const uint32_t* __restrict keys, Id* __restrict input_ids) {
  constexpr int64_t kBlock = 512;
  uint8_t chosen[kBlock];
  int64_t positions[kBlock + kWordsAtPadding];
  uint32_t words[kBlock + kWordsAtPadding];
  const uint32_t keep = bounds.keep >> 32, width = (bounds.replace >> 32) - keep;
  for (int64_t first = 0; first < end; first += kBlock) {
    const int64_t length = std::min(kBlock, end - first);
    for (int64_t i = 0; i < length; ++i) chosen[i] = keys[first + i] - keep < width;
    const int64_t count = set_positions(chosen, length, first, positions, kBlock + kWordsAtPadding);
    words_at(words, positions, count, a.seed, kRandomToken, sample);
    for (int64_t j = 0; j < count; ++j) {
      input_ids[positions[j]] = random_token(words[j], a.windows.num_tokens, a.windows.mask_id);
    }
  }
}

// Rare: keys tie at a bound, and position decides.
template <typename Id>
void write_tied_row(const CorruptArgs& a, const RowBounds& bounds, uint64_t sample, int64_t length,
                    const uint32_t* keys, const int32_t* clean, const uint8_t* can_mask,
                    RowOutput<Id> out) {
  for (int64_t i = 0; i < length; ++i) {
    const uint64_t key = uint64_t{keys[i]} << 32 | static_cast<uint32_t>(i);
    const bool is_masked = key < bounds.mask && (!can_mask || can_mask[i]);
    Id id = clean[i];
    if (is_masked && key >= bounds.replace) {
      id = static_cast<Id>(a.windows.mask_id);
    } else if (is_masked && key >= bounds.keep) {
      const uint32_t word = random_word(a.seed, kRandomToken, sample, i);
      id = random_token(word, a.windows.num_tokens, a.windows.mask_id);
    }
    out.input_ids[i] = id;
    out.labels[i] = is_masked ? clean[i] : static_cast<Id>(kIgnoreIndex);
    out.masked[i] = is_masked;
  }
}

template <typename Id>
RowOutput<Id> outputs_of(const CorruptArgs& a, int64_t at, const RowScratch& scratch) {
  return {static_cast<Id*>(a.input_ids) + at,
          a.labels ? static_cast<Id*>(a.labels) + at : static_cast<Id*>(scratch.labels),
          a.masked_indices ? a.masked_indices + at : scratch.masked};
}

// Behind the end of a sample.
template <typename Id>
void write_padding(const CorruptArgs& a, const Span& span, RowOutput<Id> out) {
  std::fill(out.input_ids + span.length, out.input_ids + span.space, a.windows.spans.pad_id);
  std::fill(out.labels + span.length, out.labels + span.space, static_cast<Id>(kIgnoreIndex));
  std::fill(out.masked + span.length, out.masked + span.space, uint8_t{0});
}

// Returns where the masks of the row are.
template <typename Id>
const uint8_t* write_outputs(const CorruptArgs& a, int64_t b, const Span& span,
                             const RowScratch& scratch, const RowBounds& bounds,
                             const uint8_t* can_mask) {
  const RowOutput<Id> out = outputs_of<Id>(a, span.begin, scratch);
  if (is_tied(bounds.keep) || is_tied(bounds.replace) || is_tied(bounds.mask)) {
    write_tied_row(a, bounds, a.sample(b), span.length, scratch.keys, scratch.clean, can_mask, out);
  } else {
    write_row(bounds.keep >> 32, bounds.mask >> 32, span.length, a.windows.mask_id, scratch.keys,
              scratch.clean, out);
    if (bounds.replace != bounds.keep) {
      randomise_row(a, bounds, a.sample(b), span.length, scratch.keys, out.input_ids);
    }
  }
  write_padding(a, span, out);
  return out.masked;
}

void corrupt_row(const CorruptArgs& a, int64_t b, uint32_t t16, const RowScratch& scratch,
                 InvalidTokens* invalid) {
  const Span span = a.windows.span(b);
  const int64_t length = span.length;
  load_row(a.windows, b, scratch.clean, scratch.window, invalid);
  std::fill(scratch.clean + span.stored, scratch.clean + length, a.windows.spans.eos_id);
  fill_words(scratch.keys, length, a.seed, kMaskKey, a.sample(b));
  const bool all_maskable = !is_restricted(a);
  const uint8_t* can_mask = all_maskable ? nullptr : scratch.can_mask;
  const int64_t n = all_maskable ? length : exclude_keys(a, b, span, scratch);
  const RowBounds bounds = row_bounds(a, b, length, t16, scratch, can_mask, n);
  const uint8_t* masked = a.narrow ? write_outputs<int32_t>(a, b, span, scratch, bounds, can_mask)
                                   : write_outputs<int64_t>(a, b, span, scratch, bounds, can_mask);
  write_scalars(a, b, t16, n, a.exact ? exact_count(a, t16, n) : count_set(masked, length));
}

int64_t count_row(const CorruptArgs& a, int64_t b, uint32_t t16) {
  const int64_t length = a.windows.span(b).length;
  if (a.exact) return exact_count(a, t16, static_cast<int32_t>(length));
  constexpr int64_t kBlock = 1024;
  uint32_t keys[kBlock];
  const uint32_t bound = a.ratio_table[t16];
  int64_t count = 0;
  for (int64_t first = 0; first < length; first += kBlock) {
    const int64_t block = std::min(kBlock, length - first);
    fill_words(keys, block, a.seed, kMaskKey, a.sample(b), first);
    int32_t below = 0;
    for (int64_t i = 0; i < block; ++i) below += keys[i] < bound;
    count += below;
  }
  return count;
}

void write_rows(const CorruptArgs& a, int64_t b, const uint8_t* masked, int64_t first,
                int64_t room) {
  const Span span = a.windows.span(b);
  const int64_t length = span.length, base = span.begin;
  if (a.narrow) {
    set_positions(masked, length, base, static_cast<int32_t*>(a.row_buffer) + first, room);
  } else {
    set_positions(masked, length, base, static_cast<int64_t*>(a.row_buffer) + first, room);
  }
}

}  // namespace
}  // namespace nar
