// The terms of a softmax over bfloat16 logits, exp(logit - largest) in units, by table: there are
// fewer values than logits in a row.
#pragma once

#include "unmask/gpu/row.h"

namespace nar {
namespace {

// Those of sizes in [2**-6, 2**6), of either sign. Of others the term is made.
struct TermTable {
  static constexpr uint32_t kFirst = (127 - 6) << 7, kCount = 12 << 7;
  static constexpr int kEntries = 2 * (kCount + 1);  // behind each sign one of all others, 0
  uint32_t term[kEntries];

  // kCount for all others.
  static __device__ uint32_t size_of(uint32_t lane, int half) {
    return min((lane >> 16 * half & 0x7FFF) - kFirst, kCount);
  }

  static __device__ uint32_t sign_of(uint32_t lane, int half) {
    return lane >> (16 * half + 15) & 1;
  }

  __device__ void fill(const Block& block, float largest) {
#pragma unroll 1
    for (int i = block.thread; i < kEntries; i += block.num_threads) {
      const uint32_t sign = i > static_cast<int>(kCount), size = i - sign * (kCount + 1);
      const float logit = float_of_bits((sign << 15 | (kFirst + size)) << 16);
      const float from_largest = Row<Bfloat16>::difference(logit, largest);
      term[i] = size == kCount ? 0 : units(exp_of_negative(from_largest));
    }
  }

  __device__ uint64_t sum(const Vector<Bfloat16>& vector, float largest) const {
    uint64_t total = 0;
    uint32_t most = 0;
#pragma unroll
    for (uint32_t lane : vector.lane) {
      const uint32_t size0 = size_of(lane, 0), size1 = size_of(lane, 1);
      // Two terms are less than 2**32.
      total += term[size0 + sign_of(lane, 0) * (kCount + 1)] +
               term[size1 + sign_of(lane, 1) * (kCount + 1)];
      most = max(most, max(size0, size1));
    }
    if (__any_sync(kAllLanes, most == kCount)) total += sum_of_others(vector, largest);
    return total;
  }

 private:
  static __device__ __attribute__((noinline)) uint64_t sum_of_others(const Vector<Bfloat16> vector,
                                                                     float largest) {
    uint64_t total = 0;
#pragma unroll
    for (uint32_t lane : vector.lane) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (size_of(lane, half) != kCount) continue;
        const float from_largest = Row<Bfloat16>::difference(Bfloat16::widen(lane, half), largest);
        total += units(exp_of_negative(from_largest));
      }
    }
    return total;
  }
};

}  // namespace
}  // namespace nar
