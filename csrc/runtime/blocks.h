// Loops over rows whose length is no multiple of a vector's.
#pragma once

#include <cstdint>

namespace nar {

// Compiled once per instruction set (see levels/kernels.h).
namespace {

// Calls `run(first, count)` so that it covers [0, length), with multiples of kBlock for count:
// compilers then vectorise its loop without an end of single steps, which in short rows takes
// longer than the rest. The last call overlaps the one before. Only a row shorter than kBlock is
// done step by step.
template <int64_t kBlock, typename Run>
inline void in_blocks(int64_t length, const Run& run) {
  const int64_t whole = length & -kBlock;
  if (whole > 0) {
    run(0, whole);
    if (whole < length) run(length - kBlock, kBlock);
  } else {
    run(0, length);
  }
}

}  // namespace
}  // namespace nar
