// A row of logits, a vector of 16 bytes at a time: read from memory once, then held on the chip if
// it fits.
#pragma once

#include <cuda_fp16.h>

#include "unmask/gpu/block.h"
#include "unmask/gpu/float_math.h"
#include "unmask/unmask_cuda.h"

namespace nar {
namespace {

// The types of logits: words of memory, of which a lane of 32 bits holds one or two.
struct Float32 {
  static constexpr bool kTabulates = false;  // terms of the softmax, see TermTable
  using Word = uint32_t;
  static constexpr Word kNever = 0xFF800000;  // -inf
  static __device__ float widen(uint32_t lane, int) { return float_of_bits(lane); }
};

struct Bfloat16 {
  static constexpr bool kTabulates = true;
  using Word = uint16_t;
  static constexpr Word kNever = 0xFF80;
  static __device__ float widen(uint32_t lane, int half) {
    return float_of_bits(half == 0 ? lane << 16 : lane & 0xFFFF0000u);
  }
};

struct Float16 {
  static constexpr bool kTabulates = false;
  using Word = uint16_t;
  static constexpr Word kNever = 0xFC00;
  static __device__ float widen(uint32_t lane, int half) {
    return __half2float(__ushort_as_half(static_cast<uint16_t>(lane >> 16 * half)));
  }
};

template <typename T>
struct alignas(16) Vector {
  static constexpr int kOfLane = 4 / sizeof(typename T::Word), kSize = 4 * kOfLane;
  uint32_t lane[4];

  __device__ void fill(typename T::Word word) {
    for (uint32_t& one : lane) one = kOfLane == 1 ? word : uint32_t{word} << 16 | word;
  }

  __device__ float operator[](int j) const { return T::widen(lane[j / kOfLane], j % kOfLane); }

  // By masks: an index would move the vector to memory.
  __device__ void set(int at, typename T::Word word) {
    constexpr int kBits = 32 / kOfLane;
    constexpr uint32_t kAll = kBits == 32 ? 0xFFFFFFFF : 0xFFFF;
    const int shift = at % kOfLane * kBits;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t mask = i == at / kOfLane ? kAll << shift : 0;
      lane[i] = (lane[i] & ~mask) | (uint32_t{word} << shift & mask);
    }
  }
};

__device__ inline int forbidden_id(const UnmaskKernelArgs& a, int f) {
  if (f < kForbiddenArguments) return a.forbidden[f];
  return static_cast<int>(a.more_forbidden[f - kForbiddenArguments]);
}

__device__ __attribute__((noinline)) bool is_forbidden(const UnmaskKernelArgs& a, int id) {
  for (int f = 0; f < a.num_forbidden; ++f) {
    if (forbidden_id(a, f) == id) return true;
  }
  return false;
}

template <typename T>
class Row {
 public:
  static constexpr int kSize = Vector<T>::kSize;

  __device__ Row(const UnmaskKernelArgs& a, int64_t index, Vector<T>* held)
      : a_(a),
        logits_(static_cast<const typename T::Word*>(a.logits) + index * a.stride),
        held_(held),
        is_aligned_(reinterpret_cast<uintptr_t>(logits_) % sizeof(Vector<T>) == 0),
        count_((static_cast<int>(a.vocabulary) + kSize - 1) / kSize) {}

  __device__ int num_vectors() const { return count_; }

  // The first time that a thread reads a vector, which it alone reads again. Returns the largest of
  // its logits; NaN is none.
  __device__ float read(int i) const {
    const Vector<T> raw = from_memory(i);
    if (held_) held_[i] = raw;
    float largest = -INFINITY;
#pragma unroll
    for (int j = 0; j < kSize; ++j) largest = fmaxf(largest, raw[j]);
    return fminf(largest, kLargestFloat) + 0.0f;
  }

  // Once more.
  __device__ Vector<T> vector(int i) const { return held_ ? held_[i] : from_memory(i); }

  // A single logit, by any thread: a finite number, or -inf where it is never drawn.
  __device__ float logit(int64_t id) const {
    if (id >= a_.vocabulary || is_forbidden(a_, static_cast<int>(id))) return -INFINITY;
    return clean(T::widen(logits_[id], 0));
  }

  static __device__ float clean(float logit) {  // -0 would not equal 0 as a key
    return fminf(fmaxf(logit, -INFINITY), kLargestFloat) + 0.0f;
  }

  // clean(logit) less the largest logit of the row, in fewer steps: where there is a +inf,
  // it is the largest.
  static __device__ float difference(float logit, float row_largest) {
    return fminf(fmaxf(logit, -INFINITY) - row_largest, 0.0f);
  }

 private:
  __device__ Vector<T> from_memory(int i) const {
    Vector<T> raw = {};
    if (is_aligned_ && (i + 1) * kSize <= a_.vocabulary) {
      raw = reinterpret_cast<const Vector<T>*>(logits_)[i];
    } else {
#pragma unroll 1
      for (int j = 0; j < kSize; ++j) {
        raw.set(j, i * kSize + j < a_.vocabulary ? logits_[i * kSize + j] : T::kNever);
      }
    }
#pragma unroll 1
    for (int f = 0; f < a_.num_forbidden; ++f) {
      const int id = forbidden_id(a_, f);
      if (id / kSize == i) raw.set(id % kSize, T::kNever);
    }
    return raw;
  }

  const UnmaskKernelArgs& a_;
  const typename T::Word* const logits_;
  Vector<T>* const held_;
  const bool is_aligned_;
  const int count_;
};

}  // namespace
}  // namespace nar
