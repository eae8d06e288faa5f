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

// exp(d) in units for every bfloat16 whose magnitude is one of the `size` up to `top`, where d =
// logit - largest. Above are none that count; those below, few, are marked.
struct ExpTable {
  static constexpr uint32_t kMark = 0x80000000;
  // Below this, sums in units are 0.
  static constexpr float kReach = 21.5f;

  uint32_t* middle = nullptr;  // entries of positive logits begin here; those of negative end here
  uint32_t size = 0, top = 0;  // `top`: bits of the first magnitude that no logit that counts has

  __device__ uint32_t lowest() const { return top - size + 1; }

  __device__ void build(const Team& team, float largest) {
    top = (bits_as<uint32_t>(fmaxf(largest, kReach - largest)) >> 16) + 2;
    for (uint32_t i = team.thread(); i < 2 * size; i += team.num_threads()) {
      const bool is_negative = i < size;
      const uint32_t item = is_negative ? size - 1 - i : i - size;
      const float magnitude = bits_as<float>((lowest() + item) << 16);
      uint32_t entry = units(exp_of_small_negative(
          gap_of(is_negative ? -magnitude : magnitude, largest)));
      if (item == 0) entry = kMark;
      if (item == size - 1) entry = 0;
      middle[static_cast<int>(i - size)] = entry;
    }
  }
};

struct Sums {
  uint64_t exp = 0;            // of exp(d)
  uint64_t exp_times_gap = 0;  // of exp(d) |d|

  // Three terms at a time are less than 2**32.
  __device__ static void add(const uint32_t* terms, int count, uint64_t* sum) {
#pragma unroll
    for (int j = 0; j < count; j += 3) {
      *sum += terms[j] + (j + 1 < count ? terms[j + 1] : 0) + (j + 2 < count ? terms[j + 2] : 0);
    }
  }

  template <typename T>
  __device__ void add(const Chunk& c, float largest, bool with_gap) {
    using L = Logits<T>;
    uint32_t terms[L::kItems];
    float gap[L::kItems], e[L::kItems];
#pragma unroll
    for (int j = 0; j < L::kItems; ++j) {
      gap[j] = gap_of(L::item(c, j), largest);
      e[j] = exp_of_small_negative(gap[j]);
      terms[j] = units(e[j]);
    }
    add(terms, L::kItems, &exp);
    if (!with_gap) return;
#pragma unroll
    for (int j = 0; j < L::kItems; ++j) terms[j] = units(e[j] * fminf(-gap[j], 87.0f));
    add(terms, L::kItems, &exp_times_gap);
  }

  __device__ void add(const ExpTable& table, const Chunk& c, float largest) {
    using L = Logits<__nv_bfloat16>;
    const uint32_t top = table.top * 0x10001u, lowest = table.lowest() * 0x10001u;
    uint32_t terms[L::kItems], marks = 0;
#pragma unroll
    for (int i = 0; i < L::kItems / 2; ++i) {
      const __nv_bfloat162 x = L::two(c.word[i]);
      const __nv_bfloat162 magnitude = __hmax2(__hmin2(__habs2(x), L::two(top)), L::two(lowest));
      // Complements of negative ones: signed 16-bit indices.
      const uint32_t index = (bits_as<uint32_t>(magnitude) - lowest) ^ __hlt2_mask(x, L::two(0));
      terms[2 * i] = table.middle[static_cast<int16_t>(index & 0xFFFF)];
      terms[2 * i + 1] = table.middle[static_cast<int32_t>(index) >> 16];
      marks |= terms[2 * i] | terms[2 * i + 1];
    }
    if (__any_sync(kAllLanes, marks & ExpTable::kMark)) {  // next to 0: rare
#pragma unroll
      for (int j = 0; j < L::kItems; ++j) {
        const bool is_marked = terms[j] == ExpTable::kMark;
        if (!__any_sync(kAllLanes, is_marked)) continue;
        const uint32_t term = units(exp_of_small_negative(gap_of(L::item(c, j), largest)));
        if (is_marked) terms[j] = term;
      }
    }
    add(terms, L::kItems, &exp);
  }
};

}  // namespace
}  // namespace nar
