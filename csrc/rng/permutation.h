// A keyed random permutation of [0, n) by index. Same as `permute` in nar_kernels/spec/philox.py.
#pragma once

#include <cstdint>

#include "rng/philox.h"

namespace nar {

// Up to this size a permutation is the rank of random words: uniform over all n! orders.
constexpr int64_t kExactPermutationMax = 256;
constexpr int kFeistelRounds = 24;

namespace {

NAR_HOST_DEVICE inline int bit_length(uint64_t x) {  // x > 0
#ifdef __CUDA_ARCH__
  return 64 - __clzll(static_cast<long long>(x));
#else
  return 64 - __builtin_clzll(x);
#endif
}

NAR_HOST_DEVICE inline uint32_t feistel_mix(uint32_t x) {  // lowbias32 (Wellons)
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// Larger ones: a bijection of the smallest power of two that holds [0, n), n > 1.
struct FeistelNetwork {
  int right_bits;
  uint32_t left_mask, right_mask;

  NAR_HOST_DEVICE explicit FeistelNetwork(uint64_t n) {
    const int bits = bit_length(n - 1);
    right_bits = bits - bits / 2;
    left_mask = static_cast<uint32_t>((uint64_t{1} << (bits / 2)) - 1);
    right_mask = static_cast<uint32_t>((uint64_t{1} << right_bits) - 1);
  }

  NAR_HOST_DEVICE uint64_t size() const { return join(left_mask, right_mask) + 1; }

  NAR_HOST_DEVICE uint32_t left(uint64_t x) const { return static_cast<uint32_t>(x >> right_bits); }
  NAR_HOST_DEVICE uint32_t right(uint64_t x) const { return static_cast<uint32_t>(x) & right_mask; }
  NAR_HOST_DEVICE uint64_t join(uint32_t left, uint32_t right) const {
    return uint64_t{left} << right_bits | right;
  }

  // All rounds for `count` numbers, from kFeistelRounds random words.
  NAR_HOST_DEVICE void operator()(uint32_t* left, uint32_t* right, int count,
                                  const uint32_t* keys) const {
    for (int r = 0; r < kFeistelRounds; r += 2) {
      for (int i = 0; i < count; ++i) left[i] ^= feistel_mix(right[i] ^ keys[r]) & left_mask;
      for (int i = 0; i < count; ++i) right[i] ^= feistel_mix(left[i] ^ keys[r + 1]) & right_mask;
    }
  }
};

// Where a permutation of [0, n) sends x: it walks the cycle of the network until it is below n.
NAR_HOST_DEVICE inline uint64_t feistel_permute(uint64_t x, uint64_t n, const uint32_t* keys) {
  const FeistelNetwork network(n);
  uint32_t left = network.left(x), right = network.right(x);
  do {
    network(&left, &right, 1, keys);
  } while (network.join(left, right) >= n);
  return network.join(left, right);
}

}  // namespace
}  // namespace nar
