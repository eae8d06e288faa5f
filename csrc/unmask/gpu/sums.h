// Sums of exponentials of a row on a GPU, in fixed point: exact in any order.
#pragma once

#include <cuda_runtime.h>

#include "unmask/gpu/row.h"

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

// exp(d) in units, where d = logit - largest, for bfloat16 logits of the kSize magnitudes up to one
// that no logit that counts has. Smaller magnitudes, next to 0, are rare.
struct ExpTable {
  // Beside a row of V = 50304, such that two of both fit into a multiprocessor of sm_90.
  static constexpr uint32_t kSize = 1760;
  static constexpr uint32_t kBytes = 2 * kSize * sizeof(uint32_t);
  // Where |d| is larger, exp(d) is less than half a unit.
  static constexpr float kMostGap = 21.5f;

  uint32_t* middle;  // entries of positive logits begin here; those of negative ones end here
  uint32_t top;      // bits of the last magnitude, at most those of infinity

  __device__ uint32_t lowest() const { return top - kSize + 1; }

  // At an offset in bytes from the middle.
  __device__ uint32_t entry(int at) const {
    return *reinterpret_cast<const uint32_t*>(reinterpret_cast<const unsigned char*>(middle) + at);
  }

  template <typename Team>
  __device__ void build(const Team& team, float largest) {
    const uint32_t most = bits_as<uint32_t>(fmaxf(largest, kMostGap - largest)) >> 16;
    top = min(most + 2, NarrowType<__nv_bfloat16>::kInfinity);  // above is NaN
#pragma unroll 1
    for (int i = static_cast<int>(team.thread()); i < static_cast<int>(kSize);
         i += static_cast<int>(team.num_threads())) {
      const float magnitude = bits_as<float>((lowest() + i) << 16);
      middle[i] = units(exp_of_small_negative(gap_of(magnitude, largest)));
      middle[-1 - i] = units(exp_of_small_negative(gap_of(-magnitude, largest)));
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
      if (with_gap) {
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) terms[j] = units(e[j] * fminf(-gap[j], 87.0f));
        add<kAtOnce>(terms, &exp_times_gap);
      }
    }
  }

  // `column`: of the chunk.
  template <typename Row>
  __device__ void add(const ExpTable& table, const Chunk& c, const Row& row, uint32_t column,
                      float largest) {
    using L = Logits<__nv_bfloat16>;
    constexpr uint32_t kSigns = 0x80008000;
    const uint32_t least = kSigns | table.top * 0x10001u, lowest = table.lowest() * 0x10001u;
    int at[L::kItems];  // offsets in bytes: one instruction makes each
    uint32_t reached[L::kItems / 2];
#pragma unroll
    for (int i = 0; i < L::kItems / 2; ++i) {
      // NaN is ignored: it becomes the least one.
      const __nv_bfloat162 x = __hmax2(L::two(c.word[i]), L::two(least));
      // For each half: a sign that is left if the magnitude is not below the lowest, and how far it
      // is above.
      reached[i] = (bits_as<uint32_t>(x) | kSigns) - lowest;
      // Without that sign, and complements for negative logits.
      const int both = static_cast<int>(reached[i] ^ kSigns ^ __hlt2_mask(x, L::two(0)));
      at[2 * i] = __dp2a_lo(both, sizeof(uint32_t), 0);
      at[2 * i + 1] = __dp2a_lo(both, sizeof(uint32_t) << 8, 0);
    }
    const uint32_t all = reached[0] & reached[1] & reached[2] & reached[3] & kSigns;
    if (__any_sync(kAllLanes, all != kSigns))
      return add_some_low(table, at, reached, row, column, largest);
    uint32_t terms[L::kItems];
#pragma unroll
    for (int j = 0; j < L::kItems; ++j) terms[j] = table.entry(at[j]);
    add<L::kItems>(terms, &exp);
  }

  template <typename Row>
  __device__ void add_some_low(const ExpTable& table, const int* at, const uint32_t* reached,
                               const Row& row, uint32_t column, float largest) {
    uint32_t low = 0;
#pragma unroll
    for (int j = 0; j < Row::L::kItems; ++j) {
      if (reached[j / 2] >> (j % 2 ? 31 : 15) & 1) {
        exp += table.entry(at[j]);
      } else {
        low |= 1u << j;
      }
    }
    for (; low; low &= low - 1) {
      const float x = row.at(column + __ffs(low) - 1);
      exp += units(exp_of_small_negative(gap_of(x, largest)));
    }
  }
};

}  // namespace
}  // namespace nar
