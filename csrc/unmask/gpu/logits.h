// The logits of a lane, 16 bytes of a row, and what a GPU does with all of them at once. Types of
// 16 bits are compared and counted two to an instruction.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "unmask/gpu/float_math.h"

namespace nar {
namespace {

constexpr float kLargestFloat = 3.40282347e38f;

// NaN becomes -inf, +inf the largest float, and -0 becomes 0.
__device__ inline float clean(float x) { return fminf(fmaxf(x, -INFINITY), kLargestFloat) + 0.0f; }

struct alignas(16) Chunk {
  uint32_t word[4];
};

// Keys are integers in the order of logits, such that the next larger logit has the next key; NaN
// has none. Of a magnitude in `bits` bits:
__device__ inline uint32_t key_of_bits(uint32_t bits, uint32_t sign) {
  return bits & sign ? sign - (bits & ~sign) : sign + bits;
}
__device__ inline uint32_t bits_of_key(uint32_t key, uint32_t sign) {
  return key < sign ? sign | (sign - key) : key - sign;
}

// What of T the type of two is, and its bits of infinity.
template <typename T>
struct NarrowType;
template <>
struct NarrowType<__nv_bfloat16> {
  using Two = __nv_bfloat162;
  static constexpr uint32_t kInfinity = 0x7F80;
  static __device__ float widened(uint32_t bits) { return bits_as<float>(bits << 16); }
  // Of a float that has such a value, or is the largest float, which stands for infinity.
  static __device__ uint32_t narrowed(float x) {
    return x == kLargestFloat ? kInfinity : truncated(x);
  }
  static __device__ uint32_t truncated(float x) { return bits_as<uint32_t>(x) >> 16; }
};
template <>
struct NarrowType<__half> {
  using Two = __half2;
  static constexpr uint32_t kInfinity = 0x7C00;
  static __device__ float widened(uint32_t bits) {
    return __half2float(bits_as<__half>(static_cast<uint16_t>(bits)));
  }
  static __device__ uint32_t narrowed(float x) {
    return x == kLargestFloat ? kInfinity : truncated(x);
  }
  static __device__ uint32_t truncated(float x) { return bits_as<uint16_t>(__float2half_rz(x)); }
};

// Logits of a type of 16 bits. They stay as they are: NaN is ignored wherever it matters, and
// infinity is above all else.
template <typename T>
struct Logits {
  using Type = NarrowType<T>;
  using Two = typename Type::Two;
  static constexpr int kItems = 8;
  static constexpr uint32_t kSign = 0x8000;
  static constexpr uint32_t kTwoMinusInfinities = (kSign | Type::kInfinity) * 0x10001u;
  static constexpr uint32_t kKeyOfMinusInfinity = kSign - Type::kInfinity;

  static __device__ Two two(uint32_t word) { return bits_as<Two>(word); }

  static __device__ Chunk nothing() {
    return {{kTwoMinusInfinities, kTwoMinusInfinities, kTwoMinusInfinities, kTwoMinusInfinities}};
  }
  static __device__ void set(Chunk* c, int j, T x) {
    const uint32_t bits = bits_as<uint16_t>(x);
    uint32_t& word = c->word[j / 2];
    word = j % 2 ? (word & 0xFFFF) | bits << 16 : (word & 0xFFFF0000) | bits;
  }
  static __device__ T minus_infinity() {
    return bits_as<T>(static_cast<uint16_t>(kSign | Type::kInfinity));
  }
  static __device__ Chunk checked(Chunk c) { return c; }

  static __device__ float item(const Chunk& c, int j) {
    return Type::widened(j % 2 ? c.word[j / 2] >> 16 : c.word[j / 2] & 0xFFFF);
  }

  static __device__ Chunk larger(const Chunk& a, const Chunk& b) {
    Chunk c;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      c.word[i] = bits_as<uint32_t>(__hmax2(two(a.word[i]), two(b.word[i])));
    }
    return c;
  }
  // NaN if all are.
  static __device__ float largest(const Chunk& c) {
    const Two most =
        __hmax2(__hmax2(two(c.word[0]), two(c.word[1])), __hmax2(two(c.word[2]), two(c.word[3])));
    const uint32_t bits = bits_as<uint32_t>(most);
    return fmaxf(Type::widened(bits & 0xFFFF), Type::widened(bits >> 16));
  }

  static __device__ uint32_t key(float cleaned) {
    return key_of_bits(Type::narrowed(cleaned), kSign);
  }
  // Of a logit of a chunk; of NaN one that no other has.
  static __device__ uint32_t key_at(const Chunk& c, int j) {
    return key_of_bits(j % 2 ? c.word[j / 2] >> 16 : c.word[j / 2] & 0xFFFF, kSign);
  }
  // Of any float, that of a neighbour.
  static __device__ uint32_t key_near(float x) { return key_of_bits(Type::truncated(x), kSign); }
  static __device__ float value(uint32_t key) { return Type::widened(bits_of_key(key, kSign)); }

  // What logits are compared with, a key in each half.
  struct Pivot {
    uint32_t word;
  };
  static __device__ Pivot pivot(uint32_t key) { return {bits_of_key(key, kSign) * 0x10001u}; }

  // Whether any reaches the first but not the second.
  static __device__ bool any_between(const Chunk& c, Pivot p, Pivot q) {
    uint32_t any = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      any |= __hge2_mask(two(c.word[i]), two(p.word)) & ~__hge2_mask(two(c.word[i]), two(q.word));
    }
    return any != 0;
  }

  // How many of all chunks reach a pivot; of up to kMost chunks, counted in Two.
  struct Tally {
    static constexpr uint32_t kMost = 32;
    uint32_t word = 0;

    __device__ void add(const Chunk& c, Pivot p) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        word = bits_as<uint32_t>(__hadd2(two(word), __hge2(two(c.word[i]), two(p.word))));
      }
    }
    __device__ uint32_t total() const {
      return static_cast<uint32_t>(Type::widened(word & 0xFFFF) + Type::widened(word >> 16));
    }
  };

  // The logits that reach a pivot; -inf in place of the others.
  static __device__ Chunk kept(const Chunk& c, Pivot p) {
    Chunk result;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t reached = __hge2_mask(two(c.word[i]), two(p.word));
      result.word[i] = (c.word[i] & reached) | (kTwoMinusInfinities & ~reached);
    }
    return result;
  }
};

// Float32 logits, cleaned when they are loaded.
template <>
struct Logits<float> {
  static constexpr int kItems = 4;
  static constexpr uint32_t kSign = 0x80000000;
  static constexpr uint32_t kKeyOfMinusInfinity = kSign - 0x7F800000;

  static __device__ Chunk nothing() {
    const uint32_t bits = bits_as<uint32_t>(-INFINITY);
    return {{bits, bits, bits, bits}};
  }
  static __device__ void set(Chunk* c, int j, float x) { c->word[j] = bits_as<uint32_t>(x); }
  static __device__ float minus_infinity() { return -INFINITY; }
  static __device__ Chunk checked(Chunk c) {
#pragma unroll
    for (int i = 0; i < 4; ++i) c.word[i] = bits_as<uint32_t>(clean(bits_as<float>(c.word[i])));
    return c;
  }

  static __device__ float item(const Chunk& c, int j) { return bits_as<float>(c.word[j]); }

  static __device__ Chunk larger(const Chunk& a, const Chunk& b) {
    Chunk c;
#pragma unroll
    for (int i = 0; i < 4; ++i) c.word[i] = bits_as<uint32_t>(fmaxf(item(a, i), item(b, i)));
    return c;
  }
  static __device__ float largest(const Chunk& c) {
    return fmaxf(fmaxf(item(c, 0), item(c, 1)), fmaxf(item(c, 2), item(c, 3)));
  }

  static __device__ uint32_t key(float cleaned) {
    return key_of_bits(bits_as<uint32_t>(cleaned), kSign);
  }
  static __device__ uint32_t key_at(const Chunk& c, int j) { return key_of_bits(c.word[j], kSign); }
  static __device__ uint32_t key_near(float x) { return key(x); }
  static __device__ float value(uint32_t key) { return bits_as<float>(bits_of_key(key, kSign)); }

  struct Pivot {
    float value;
  };
  static __device__ Pivot pivot(uint32_t key) { return {value(key)}; }

  static __device__ bool any_between(const Chunk& c, Pivot p, Pivot q) {
    bool any = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) any |= item(c, i) >= p.value && !(item(c, i) >= q.value);
    return any;
  }

  struct Tally {
    static constexpr uint32_t kMost = 1u << 30;
    uint32_t count = 0;

    __device__ void add(const Chunk& c, Pivot p) {
#pragma unroll
      for (int i = 0; i < 4; ++i) count += item(c, i) >= p.value;
    }
    __device__ uint32_t total() const { return count; }
  };

  static __device__ Chunk kept(const Chunk& c, Pivot p) {
    Chunk result;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      result.word[i] = bits_as<uint32_t>(item(c, i) >= p.value ? item(c, i) : -INFINITY);
    }
    return result;
  }
};

}  // namespace
}  // namespace nar
