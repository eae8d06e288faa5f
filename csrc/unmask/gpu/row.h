// A row of logits, a vector of 16 bytes at a time: read from memory once, then held on the chip if
// it fits.
#pragma once

#include <cuda_fp16.h>

#include "unmask/gpu/block.h"
#include "unmask/gpu/float_math.h"
#include "unmask/unmask_cuda.h"

namespace nar {
namespace {

struct Float32 {
  using Word = uint32_t;
  static constexpr Word kNever = 0xFF800000;  // -inf
  static __device__ float widen(Word word) { return float_of_bits(word); }
};

struct Bfloat16 {
  using Word = uint16_t;
  static constexpr Word kNever = 0xFF80;
  static __device__ float widen(Word word) { return float_of_bits(uint32_t{word} << 16); }
};

struct Float16 {
  using Word = uint16_t;
  static constexpr Word kNever = 0xFC00;
  static __device__ float widen(Word word) { return __half2float(__ushort_as_half(word)); }
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
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(typename T::Word);
  typename T::Word word[kSize];
};

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
    for (int j = 0; j < kSize; ++j) largest = fmaxf(largest, T::widen(raw.word[j]));
    return fminf(largest, kLargestFloat) + 0.0f;
  }

  // Once more.
  __device__ Vector<T> vector(int i) const { return held_ ? held_[i] : from_memory(i); }

  // A single logit, by any thread: a finite number, or -inf where it is never drawn.
  __device__ float logit(int64_t id) const {
    if (id >= a_.vocabulary || is_forbidden(a_, static_cast<int>(id))) return -INFINITY;
    return clean(logits_[id]);
  }

  static __device__ float clean(typename T::Word word) {  // -0 would not equal 0 as a key
    return fminf(fmaxf(T::widen(word), -INFINITY), kLargestFloat) + 0.0f;
  }

  // clean(word) less the largest logit of the row, in fewer steps: where there is a +inf,
  // it is the largest.
  static __device__ float difference(typename T::Word word, float row_largest) {
    return fminf(fmaxf(T::widen(word), -INFINITY) - row_largest, 0.0f);
  }

 private:
  __device__ Vector<T> from_memory(int i) const {
    Vector<T> raw;
    if (is_aligned_ && (i + 1) * kSize <= a_.vocabulary) {
      raw = reinterpret_cast<const Vector<T>*>(logits_)[i];
    } else {
#pragma unroll 1
      for (int j = 0; j < kSize; ++j) {
        set(&raw, j, i * kSize + j < a_.vocabulary ? logits_[i * kSize + j] : T::kNever);
      }
    }
#pragma unroll 1
    for (int f = 0; f < a_.num_forbidden; ++f) {
      const int id = forbidden_id(a_, f);
      if (id / kSize == i) set(&raw, id % kSize, T::kNever);
    }
    return raw;
  }

  // By comparisons: an index would move the vector to memory.
  static __device__ void set(Vector<T>* vector, int at, typename T::Word word) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      if (j == at) vector->word[j] = word;
    }
  }

  const UnmaskKernelArgs& a_;
  const typename T::Word* const logits_;
  Vector<T>* const held_;
  const bool is_aligned_;
  const int count_;
};

}  // namespace
}  // namespace nar
