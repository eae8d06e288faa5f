// Times and window starts of all sample slots of a batch, drawn before its rows.
#pragma once

#include <vector>

#include "corrupt/corrupt.h"
#include "rng/permutation_cpu.h"

namespace nar {

// Compiled once per instruction set (see levels/kernels.h).
namespace {

// Padded for first_words.
std::vector<int64_t> sample_slots(const CorruptArgs& a) {
  std::vector<int64_t> slots(a.windows.batch + kWordsAtPadding);
  for (int64_t b = 0; b < a.windows.batch; ++b) slots[b] = static_cast<int64_t>(a.sample(b));
  return slots;
}

// The 16-bit times of the batch.
std::vector<uint32_t> draw_times(const CorruptArgs& a) {
  std::vector<int64_t> slots = sample_slots(a);
  std::vector<uint32_t> t16(slots.size());
  first_words(t16.data(), slots.data(), a.windows.batch, a.seed, kTime);
  if (a.stratified) {
    const uint64_t global_batch = static_cast<uint64_t>(a.global_batch);
    permute_slots(slots.data(), a.windows.batch, a.global_batch, a.seed, kStratum);
    for (int64_t b = 0; b < a.windows.batch; ++b) {
      t16[b] = stratified_time(static_cast<uint64_t>(slots[b]), t16[b], global_batch);
    }
  } else {
    for (uint32_t& word : t16) word >>= 16;
  }
  return t16;
}

// Where the windows of the slots begin, in the order of their epochs.
std::vector<int64_t> ordered_starts(const CorruptArgs& a) {
  std::vector<int64_t> slots = sample_slots(a);
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
