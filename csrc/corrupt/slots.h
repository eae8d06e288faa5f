// Times of all draws of a batch, and where the windows of its slots begin, before its rows.
#pragma once

#include <algorithm>
#include <vector>

#include "corrupt/corrupt.h"
#include "rng/permutation_cpu.h"

namespace nar {

// Compiled once per instruction set (see levels/kernels.h).
namespace {

// The 16-bit times of up to kDrawsAtOnce draws from `first` on, all of one view.
void draw_times(const CorruptArgs& a, int64_t first, int64_t count, uint32_t* t16) {
  const Draw draw = a.division.draw(first, a.windows.batch);
  if (a.view_times) {
    return std::fill(t16, t16 + count, static_cast<uint32_t>(a.view_times[draw.view]));
  }
  const View view = a.division.view(draw.view);
  // Padded for first_words.
  int64_t slots[kDrawsAtOnce + kWordsAtPadding];
  uint32_t words[kDrawsAtOnce + kWordsAtPadding];
  int64_t row = draw.row, block = draw.block;
  for (int64_t i = 0; i < count; ++row, block = 0) {
    const int64_t slot = static_cast<int64_t>(a.slot(Draw{row, 0, draw.view}));
    const int64_t here = std::min(a.division.num_blocks - block, count - i);
    for (int64_t j = 0; j < here; ++j) slots[i + j] = slot + block + j;
    i += here;
  }
  first_words(words, slots, count, a.seed, view.stream(kTime));
  if (!a.stratified) {
    for (int64_t i = 0; i < count; ++i) t16[i] = words[i] >> 16;
    return;
  }
  const int64_t strata = static_cast<int64_t>(a.num_strata());
  permute_slots(slots, count, strata, a.seed, view.stream(kStratum));
  for (int64_t i = 0; i < count; ++i) {
    // As stratified_time: a quotient below 2^16 of numbers below 2^48 and 2^32 is so far from the
    // next whole number that a division of doubles does not reach it.
    const int64_t at = (slots[i] << 16) + (words[i] >> 16);
    t16[i] = static_cast<uint32_t>(static_cast<double>(at) / static_cast<double>(strata));
  }
  for (int64_t i = 0; i < count; ++i) __builtin_prefetch(a.ratio_table + t16[i]);
}

// Where the windows of the slots begin, in the order of their epochs.
std::vector<int64_t> ordered_starts(const CorruptArgs& a) {
  std::vector<int64_t> slots(a.windows.batch);
  for (int64_t b = 0; b < a.windows.batch; ++b) slots[b] = static_cast<int64_t>(a.slot(b));
  if (a.order.shuffle) {
    permute_slots(slots.data(), a.windows.batch, a.order.num_windows, a.seed, kWindowOrder);
  } else {
    for (int64_t& slot : slots) slot %= a.order.num_windows;
  }
  for (int64_t& slot : slots) slot = a.order.start(static_cast<uint64_t>(slot));
  return slots;
}

}  // namespace
}  // namespace nar
