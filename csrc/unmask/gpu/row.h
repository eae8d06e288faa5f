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

  // The first time that a thread reads a vector; it alone reads it again.
  __device__ void read(int i, float (&x)[kSize]) const {
    const Vector<T> raw = from_memory(i);
    if (held_) held_[i] = raw;
    clean(i, raw, x);
  }

  // Logits, -inf where never drawn: finite ones, but for the largest float in place of +inf.
  __device__ void load(int i, float (&x)[kSize]) const {
    clean(i, held_ ? held_[i] : from_memory(i), x);
  }

  // A single one, by any thread.
  __device__ float logit(int64_t id) const {
    if (id >= a_.vocabulary || is_forbidden(static_cast<int>(id))) return -INFINITY;
    return finite(T::widen(logits_[id]));
  }

 private:
  __device__ Vector<T> from_memory(int i) const {
    const int first = i * kSize;
    if (is_aligned_ && first + kSize <= a_.vocabulary) {
      return reinterpret_cast<const Vector<T>*>(logits_)[i];
    }
    Vector<T> raw;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      raw.word[j] = first + j < a_.vocabulary ? logits_[first + j] : T::kNever;
    }
    return raw;
  }

  static __device__ float finite(float x) {  // NaN becomes -inf, -0 becomes 0
    return fminf(fmaxf(x, -INFINITY), kLargestFloat) + 0.0f;
  }

  __device__ void clean(int i, const Vector<T>& raw, float (&x)[kSize]) const {
#pragma unroll
    for (int j = 0; j < kSize; ++j) x[j] = finite(T::widen(raw.word[j]));
    for (int f = 0; f < a_.num_forbidden; ++f) {
      const int id = forbidden(f);
      if (id / kSize != i) continue;
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        if (id % kSize == j) x[j] = -INFINITY;
      }
    }
  }

  __device__ int forbidden(int f) const {
    return f < kForbiddenArguments ? a_.forbidden[f] : a_.more_forbidden[f - kForbiddenArguments];
  }

  __device__ bool is_forbidden(int id) const {
    for (int f = 0; f < a_.num_forbidden; ++f) {
      if (forbidden(f) == id) return true;
    }
    return false;
  }

  const UnmaskKernelArgs& a_;
  const typename T::Word* const logits_;
  Vector<T>* const held_;
  const bool is_aligned_;
  const int count_;
};

}  // namespace
}  // namespace nar
