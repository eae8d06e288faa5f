// Times of all draws of a batch, and where the windows of its slots begin, before its rows.
#pragma once

#include <algorithm>
#include <vector>

#include "corrupt/corrupt.h"
#include "rng/permutation_cpu.h"

namespace nar {

// Compiled once per instruction set (see levels/kernels.h).
namespace {

// The 16-bit times of all draws.
std::vector<uint32_t> draw_times(const CorruptArgs& a) {
  const Division& d = a.division;
  const int64_t num_slots = a.windows.batch * d.num_blocks;
  std::vector<uint32_t> t16(d.views * num_slots + kWordsAtPadding);
  std::vector<int64_t> slots(num_slots + kWordsAtPadding);  // padded for first_words
  for (int64_t v = 0; v < d.views; ++v) {
    uint32_t* times = t16.data() + v * num_slots;
    if (a.view_times) {
      std::fill(times, times + num_slots, static_cast<uint32_t>(a.view_times[v]));
      continue;
    }
    if (v > 0 && d.pairing != Pairing::kIndependent) {  // the views of a pair share theirs
      std::copy(t16.data(), t16.data() + num_slots, times);
      continue;
    }
    for (int64_t row = 0, at = 0; row < a.windows.batch; ++row) {
      const int64_t first = static_cast<int64_t>(a.slot(Draw{row, 0, v}));
      for (int64_t j = 0; j < d.num_blocks; ++j) slots[at++] = first + j;
    }
    const View view = d.view(v);
    first_words(times, slots.data(), num_slots, a.seed, view.stream(kTime));
    if (a.stratified) {
      const uint64_t strata = a.num_strata();
      permute_slots(slots.data(), num_slots, static_cast<int64_t>(strata), a.seed,
                    view.stream(kStratum));
      for (int64_t i = 0; i < num_slots; ++i) {
        times[i] = stratified_time(static_cast<uint64_t>(slots[i]), times[i], strata);
      }
    } else {
      for (int64_t i = 0; i < num_slots; ++i) times[i] >>= 16;
    }
  }
  return t16;
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
