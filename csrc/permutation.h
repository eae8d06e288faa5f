// A keyed random permutation of [0, n) by index. Same as `permute` in nar_kernels/philox.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "philox.h"

namespace nar {

class Permutation {
 public:
  // `round` is which permutation: an epoch, or a step.
  Permutation(uint64_t seed, uint32_t stream, uint64_t round, uint64_t n) : n_(n) {
    const bool exact = n <= kExactMax;
    const size_t num_blocks = exact ? (n + 3) / 4 : kRounds / 4;
    std::vector<uint32_t> words(4 * num_blocks);
    for (size_t b = 0; b < num_blocks; ++b) {
      const Words4 block = random_block(seed, stream, round, static_cast<uint32_t>(b));
      std::copy(block.word, block.word + 4, &words[4 * b]);
    }
    if (!exact) {
      std::copy(words.begin(), words.end(), keys_);
      while (bits_ < 64 && (n - 1) >> bits_ != 0) ++bits_;
      return;
    }
    // Up to kExactMax, the rank of random words: uniform over all n! orders.
    std::vector<uint64_t> order(n);
    for (uint32_t i = 0; i < n; ++i) order[i] = uint64_t{words[i]} << 32 | i;
    std::sort(order.begin(), order.end());
    rank_.resize(n);
    for (uint32_t i = 0; i < n; ++i) rank_[static_cast<uint32_t>(order[i])] = i;
  }

  uint64_t operator()(uint64_t index) const {
    if (!rank_.empty()) return rank_[index];
    do index = feistel(index);
    while (index >= n_);  // walk the cycle of the next power of two until it lands below n
    return index;
  }

 private:
  static constexpr uint64_t kExactMax = 256;
  static constexpr int kRounds = 24;

  static uint32_t mix(uint32_t x) {  // lowbias32 (Wellons)
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
  }

  uint64_t feistel(uint64_t x) const {
    const int right_bits = bits_ - bits_ / 2;
    const uint64_t left_mask = (uint64_t{1} << (bits_ / 2)) - 1;
    const uint64_t right_mask = (uint64_t{1} << right_bits) - 1;
    uint64_t left = x >> right_bits, right = x & right_mask;
    for (int r = 0; r < kRounds; r += 2) {
      left ^= mix(static_cast<uint32_t>(right) ^ keys_[r]) & left_mask;
      right ^= mix(static_cast<uint32_t>(left) ^ keys_[r + 1]) & right_mask;
    }
    return left << right_bits | right;
  }

  uint64_t n_;
  int bits_ = 0;
  uint32_t keys_[kRounds] = {};
  std::vector<uint32_t> rank_;
};

}  // namespace nar
