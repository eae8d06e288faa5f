// A keyed random permutation of [0, n) by index. Same as `permute` in nar_kernels/philox.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "philox.h"

namespace nar {

// Up to this size a permutation is the rank of random words: uniform over all n! orders.
constexpr uint64_t kExactPermutationMax = 256;
constexpr int kFeistelRounds = 24;

namespace {

NAR_HOST_DEVICE inline uint32_t feistel_mix(uint32_t x) {  // lowbias32 (Wellons)
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// Larger ones: a bijection of [0, n), n > 1, from kFeistelRounds random words.
NAR_HOST_DEVICE inline uint64_t feistel_permute(uint64_t x, uint64_t n, const uint32_t* keys) {
  int bits = 0;
  while (bits < 64 && (n - 1) >> bits != 0) ++bits;
  const int right_bits = bits - bits / 2;
  const uint64_t left_mask = (uint64_t{1} << (bits / 2)) - 1;
  const uint64_t right_mask = (uint64_t{1} << right_bits) - 1;
  do {  // walk the cycle of the next power of two until it lands below n
    uint64_t left = x >> right_bits, right = x & right_mask;
    for (int r = 0; r < kFeistelRounds; r += 2) {
      left ^= feistel_mix(static_cast<uint32_t>(right) ^ keys[r]) & left_mask;
      right ^= feistel_mix(static_cast<uint32_t>(left) ^ keys[r + 1]) & right_mask;
    }
    x = left << right_bits | right;
  } while (x >= n);
  return x;
}

}  // namespace

class Permutation {
 public:
  // `round` is which permutation: an epoch, or a step.
  Permutation(uint64_t seed, uint32_t stream, uint64_t round, uint64_t n) : n_(n) {
    const bool exact = n <= kExactPermutationMax;
    const size_t num_blocks = exact ? (n + 3) / 4 : kFeistelRounds / 4;
    std::vector<uint32_t> words(4 * num_blocks);
    for (size_t b = 0; b < num_blocks; ++b) {
      const Words4 block = random_block(seed, stream, round, static_cast<uint32_t>(b));
      std::copy(block.word, block.word + 4, &words[4 * b]);
    }
    if (!exact) {
      std::copy(words.begin(), words.end(), keys_);
      return;
    }
    std::vector<uint64_t> order(n);
    for (uint32_t i = 0; i < n; ++i) order[i] = uint64_t{words[i]} << 32 | i;
    std::sort(order.begin(), order.end());
    rank_.resize(n);
    for (uint32_t i = 0; i < n; ++i) rank_[static_cast<uint32_t>(order[i])] = i;
  }

  uint64_t operator()(uint64_t index) const {
    return rank_.empty() ? feistel_permute(index, n_, keys_) : rank_[index];
  }

 private:
  uint64_t n_;
  uint32_t keys_[kFeistelRounds] = {};
  std::vector<uint32_t> rank_;
};

}  // namespace nar
