// How the samples of a batch fall into blocks, each with a time of its own, and how many masks of
// them there are.
#pragma once

#include <cstdint>

#include "rng/philox.h"

namespace nar {

// Values are those of Pairing in nar_kernels/ops/views.py.
enum class Pairing : int {
  kIndependent,
  kComplement,  // what is drawn, and what could be masked, but is not
  kCoupled,     // everything, what is drawn, and its complement
};

// What is drawn in one view of a sample.
struct View {
  uint32_t streams;  // to be added to the number of a stream
  bool is_rest;      // the complement: the largest keys are masked
  bool is_all;       // everything is masked

  NAR_HOST_DEVICE uint32_t stream(Stream use) const { return use + streams; }

  // Masked are the smallest of these, in any view.
  NAR_HOST_DEVICE uint32_t key(uint32_t word) const { return is_rest ? ~word : word; }

  // Of equal keys, that at the lowest of these comes first.
  NAR_HOST_DEVICE uint32_t order(int64_t position) const {
    return key(static_cast<uint32_t>(position));
  }
};

constexpr int kViewShift = 8;  // as in nar_kernels/spec/philox.py

// One block of a sample in one of its views.
struct Draw {
  int64_t row, block, view;
};

struct Division {
  int64_t block_length, num_blocks;  // of a row
  int64_t blocks_per_slot;           // block j of slot g is drawn from slot g * that + j
  int64_t views, first_view;
  Pairing pairing;

  // Whether there is one mask of each sample, drawn from its slot.
  NAR_HOST_DEVICE bool is_trivial() const {
    return num_blocks == 1 && blocks_per_slot == 1 && views == 1 && first_view == 0;
  }

  NAR_HOST_DEVICE int64_t num_draws(int64_t batch) const { return views * batch * num_blocks; }

  // Of less than 2^31 draws: a GPU divides numbers of 32 bits in fewer registers.
  NAR_HOST_DEVICE Draw draw(int64_t index, int64_t batch) const {
    const uint32_t at = static_cast<uint32_t>(index), samples = static_cast<uint32_t>(batch);
    const uint32_t sample = at / static_cast<uint32_t>(num_blocks), view = sample / samples;
    return {sample - view * samples, at - sample * static_cast<uint32_t>(num_blocks), view};
  }

  NAR_HOST_DEVICE View view(int64_t index) const {
    if (pairing == Pairing::kIndependent) {
      return {static_cast<uint32_t>(first_view + index) << kViewShift, false, false};
    }
    return {0, index == views - 1, pairing == Pairing::kCoupled && index == 0};
  }

  // True of one of the views: a bad id counts once.
  NAR_HOST_DEVICE bool counts_ids(const View& view) const {
    if (pairing != Pairing::kIndependent) return view.is_rest;
    return view.streams == static_cast<uint32_t>(first_view) << kViewShift;
  }
};

}  // namespace nar
