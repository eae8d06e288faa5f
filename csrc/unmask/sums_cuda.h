// Sums of exponentials of a row on a GPU, in fixed point: exact in any order.
#pragma once

#include <cuda_runtime.h>

#include "unmask/row_cuda.h"

namespace nar {
namespace {

// x in [0, 1] in units of 2**-30.
__device__ inline uint32_t units(float x) { return static_cast<uint32_t>(x * 0x1p30f + 0.5f); }
__device__ inline float from_units(uint64_t sum) {
  return static_cast<float>(static_cast<int64_t>(sum)) * 0x1p-30f;
}

// logit - largest, and -88 for what is less: exp of both is less than half a unit. NaN is -88, and
// infinity 0, as the largest float would be.
__device__ inline float gap_of(float logit, float largest) {
  return fminf(fmaxf(logit - largest, -88.0f), 0.0f);
}

// exp(d) in units for bfloat16 logits of the kSize magnitudes up to one that no logit that counts has,
// where d = logit - largest. Smaller magnitudes, next to 0, are rare and marked.
struct ExpTable {
  // Beside a row of V = 50304, such that two of both fit into a multiprocessor of sm_90.
  static constexpr uint32_t kSize = 1760;
  static constexpr uint32_t kBytes = 2 * kSize * sizeof(uint32_t);
  static constexpr uint32_t kMark = 0x80000000;
  // Where |d| is larger, exp(d) is less than half a unit.
  static constexpr float kReach = 21.5f;

  uint32_t* middle;  // entries of positive logits begin here; those of negative ones end here
  uint32_t top;      // bits of the last magnitude, whose entries are 0

  __device__ uint32_t lowest() const { return top - kSize + 1; }

  template <typename Team>
  __device__ void build(const Team& team, float largest) {
    top = (bits_as<uint32_t>(fmaxf(largest, kReach - largest)) >> 16) + 2;
    for (int i = static_cast<int>(team.thread()); i < static_cast<int>(kSize);
         i += static_cast<int>(team.num_threads())) {
      const float magnitude = bits_as<float>((lowest() + i) << 16);
      const uint32_t positive = units(exp_of_small_negative(gap_of(magnitude, largest)));
      const uint32_t negative = units(exp_of_small_negative(gap_of(-magnitude, largest)));
      const bool is_top = i == kSize - 1;
      middle[i] = i == 0 ? kMark : is_top ? 0 : positive;
      middle[-1 - i] = i == 0 ? kMark : is_top ? 0 : negative;
    }
  }
};

struct Sums {
  uint64_t exp = 0;            // of exp(d)
  uint64_t exp_times_gap = 0;  // of exp(d) |d|

  // Three terms at a time are less than 2**32.
  template <int kCount>
  __device__ static void add(const uint32_t* terms, uint64_t* sum) {
#pragma unroll
    for (int j = 0; j < kCount; j += 3) {
      *sum += terms[j] + (j + 1 < kCount ? terms[j + 1] : 0) + (j + 2 < kCount ? terms[j + 2] : 0);
    }
  }

  template <typename L>
  __device__ void add(const Chunk& c, float largest, bool with_gap) {
    constexpr int kAtOnce = 4;
#pragma unroll
    for (int first = 0; first < L::kItems; first += kAtOnce) {
      uint32_t terms[kAtOnce];
      float gap[kAtOnce], e[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        gap[j] = gap_of(L::item(c, first + j), largest);
        e[j] = exp_of_small_negative(gap[j]);
        terms[j] = units(e[j]);
      }
      add<kAtOnce>(terms, &exp);
      if (!with_gap) continue;
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) terms[j] = units(e[j] * fminf(-gap[j], 87.0f));
      add<kAtOnce>(terms, &exp_times_gap);
    }
  }

  // `column`: of the chunk.
  template <typename Row>
  __device__ void add(const ExpTable& table, const Chunk& c, const Row& row, uint32_t column,
                      float largest) {
    using L = Logits<__nv_bfloat16>;
    const uint32_t top = table.top * 0x10001u, lowest = table.lowest() * 0x10001u;
    const unsigned char* middle = reinterpret_cast<const unsigned char*>(table.middle);
    uint32_t terms[L::kItems], marks = 0;
#pragma unroll
    for (int i = 0; i < L::kItems / 2; ++i) {
      const __nv_bfloat162 x = L::two(c.word[i]);
      const __nv_bfloat162 magnitude = __hmax2(__hmin2(__habs2(x), L::two(top)), L::two(lowest));
      // Offsets in bytes, signed 16-bit numbers; 4 times the complement for negative logits.
      const uint32_t at = (bits_as<uint32_t>(magnitude) * 4 - lowest * 4) ^
                          (__hlt2_mask(x, L::two(0)) & 0xFFFCFFFC);
      const int first = static_cast<int16_t>(at & 0xFFFF), second = static_cast<int32_t>(at) >> 16;
      terms[2 * i] = *reinterpret_cast<const uint32_t*>(middle + first);
      terms[2 * i + 1] = *reinterpret_cast<const uint32_t*>(middle + second);
      marks |= terms[2 * i] | terms[2 * i + 1];
    }
    if (!__any_sync(kAllLanes, marks & ExpTable::kMark)) {
      add<L::kItems>(terms, &exp);
      return;
    }
    uint32_t marked = 0;
#pragma unroll
    for (int j = 0; j < L::kItems; ++j) {
      marked |= terms[j] >> 31 << j;
      exp += terms[j] & ~ExpTable::kMark;
    }
    for (; marked; marked &= marked - 1) {
      const float x = row.at(column + __ffs(marked) - 1);
      exp += units(exp_of_small_negative(gap_of(x, largest)));
    }
  }
};

}  // namespace
}  // namespace nar
