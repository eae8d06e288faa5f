// The k smallest of random keys, as a bound to compare with instead of a sort.
#pragma once

#include <cstdint>

#include "runtime/host_device.h"

namespace nar {

// Position i belongs to the k smallest iff (key[i] << 32 | i) < bound. When no key equals the one
// at the boundary, the low half is 0 and `key < bound >> 32` decides alone.
using KeyBound = uint64_t;

NAR_HOST_DEVICE inline bool is_tied(KeyBound bound) { return static_cast<uint32_t>(bound) != 0; }

constexpr int kNumRanks = 3;

}  // namespace nar
