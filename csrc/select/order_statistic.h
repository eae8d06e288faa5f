// The k smallest of random keys, as a bound to compare with instead of a sort.
#pragma once

#include <cstdint>

#include "rng/philox.h"

namespace nar {

// Position i belongs to the k smallest iff (key[i] << 32 | i) < bound. When no key equals the one
// at the boundary, the low half is 0 and `key < bound >> 32` decides alone.
using KeyBound = uint64_t;

NAR_HOST_DEVICE inline bool is_tied(KeyBound bound) { return static_cast<uint32_t>(bound) != 0; }

constexpr int kNumRanks = 3;

// Compiled once per instruction set (see levels/kernels.h).
namespace {

// A bracket around a pivot with exactly `rank` keys below it.
struct PivotSearch {
  int32_t rank;
  uint64_t low = 0, high = uint64_t{1} << 32;  // the pivot lies in [low, high)
  int32_t below_low = 0, below_high;           // keys below either end
  uint32_t pivot = 0;
  bool found = false;

  NAR_HOST_DEVICE PivotSearch(int32_t rank, int32_t num_keys) : rank(rank), below_high(num_keys) {
    found = rank == 0;
  }

  // Random keys are nearly evenly spread, so interpolation homes in within about five passes. A
  // bisection every other pass after that bounds the number of passes for any keys.
  NAR_HOST_DEVICE void propose(int pass) {
    const uint64_t width = high - low;
    float at = 0.5f;
    if (pass < 8 || pass % 2 == 0) {
      at = (static_cast<float>(rank - below_low) + 0.5f) /
           (static_cast<float>(below_high - below_low) + 1.0f);
    }
    uint64_t offset = static_cast<uint64_t>(static_cast<float>(width) * at);
    if (rank == below_high) offset = width - 1;
    if (offset < 1) offset = 1;
    if (offset > width - 1) offset = width - 1;
    pivot = static_cast<uint32_t>(low + offset);
  }

  NAR_HOST_DEVICE void learn(int32_t below) {
    if (below == rank) {
      found = true;
    } else if (below < rank) {
      low = pivot, below_low = below;
    } else {
      high = pivot, below_high = below;
    }
  }

  // No pivot separates: the keys equal to `low` straddle the boundary.
  NAR_HOST_DEVICE bool is_tie() const { return !found && high - low == 1; }
  NAR_HOST_DEVICE bool is_done() const { return found || high - low == 1; }
};

}  // namespace
}  // namespace nar
