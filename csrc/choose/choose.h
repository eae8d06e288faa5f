// `choose`: splits the candidate positions of each sequence into those of the highest scores and
// the others.
#pragma once

#include <cstdint>

namespace nar {

struct ChooseArgs {
  const float* score;  // [candidates], or [length] if `by_position`; null: the random words decide
  bool by_position;
  bool lowest_first;
  float noise_scale;      // 0 for none
  const int64_t* rows;    // [candidates], indices into the flat [sequences * length], ascending
  const int64_t* bounds;  // [sequences + 1]: whose candidates are which
  const int64_t* left_bounds;  // [sequences + 1]: likewise of those that are left
  int64_t sequences, length;
  uint64_t seed, first_slot, slot_stride;
  const int64_t* slots;  // [sequences], or null: they are `slot_stride` apart

  int64_t* kept;  // [candidates - left], ascending
  int64_t* left;  // [left], ascending

  int64_t num_candidates(int64_t b) const { return bounds[b + 1] - bounds[b]; }
  int64_t num_left(int64_t b) const { return left_bounds[b + 1] - left_bounds[b]; }
  uint64_t slot(int64_t b) const {
    if (slots) return static_cast<uint64_t>(slots[b]);
    return first_slot + static_cast<uint64_t>(b) * slot_stride;
  }
};

// Scratch memory of one thread: for a sequence, and kChoosePadding more.
struct ChooseScratch {
  int64_t* positions;
  float* scores;
  uint32_t *words, *keys;
  int16_t* upper;
};

// As much as runs of random words and whole vectors go beyond what is asked for.
constexpr int64_t kChoosePadding = 256;

// One sequence.
using ChooseRow = void (*)(const ChooseArgs&, int64_t sequence, const ChooseScratch&);

void choose_cpu(const ChooseArgs& args, int num_threads);

}  // namespace nar
