// Philox4x32-10 (Salmon et al., SC 2011) and the layout of its counters: the only C++ copy.
// A word is a pure function of (seed, stream, sample, position); docs/design.md has the contract.
#pragma once

#include <cstdint>

#include "runtime/host_device.h"

namespace nar {

// Domains of randomness. The values are frozen: they pin results. Same as
// nar_kernels/spec/philox.py.
enum Stream : uint32_t {
  kTime = 0,
  kStratum = 1,
  kMaskKey = 2,
  kRandomToken = 3,
  kCorruption = 4,
  kWindowOrder = 5,
  kDecodeNoise = 7,
  kCriticNoise = 8,
};

constexpr uint32_t kPhiloxM0 = 0xD2511F53, kPhiloxM1 = 0xCD9E8D57;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9, kPhiloxW1 = 0xBB67AE85;

// On the CPU, runs of words are made in whole multiples of this many (philox_simd.h).
constexpr int64_t kWordPadding = 128;

struct Words4 {
  uint32_t word[4];
};

// The keys of all rounds, for many blocks.
struct RoundKeys {
  uint32_t low[10], high[10];

  NAR_HOST_DEVICE uint32_t low_of(int round) const { return low[round]; }
  NAR_HOST_DEVICE uint32_t high_of(int round) const { return high[round]; }

  NAR_HOST_DEVICE explicit RoundKeys(uint64_t seed) {
    for (int round = 0; round < 10; ++round) {
      low[round] = static_cast<uint32_t>(seed) + round * kPhiloxW0;
      high[round] = static_cast<uint32_t>(seed >> 32) + round * kPhiloxW1;
    }
  }
};

// Made in each round, for a single block.
struct SeedKeys {
  uint64_t seed;

  NAR_HOST_DEVICE uint32_t low_of(int round) const {
    return static_cast<uint32_t>(seed) + round * kPhiloxW0;
  }
  NAR_HOST_DEVICE uint32_t high_of(int round) const {
    return static_cast<uint32_t>(seed >> 32) + round * kPhiloxW1;
  }
};

// Both halves of a product.
NAR_HOST_DEVICE inline uint32_t multiply(uint32_t a, uint32_t b, uint32_t* high) {
#ifdef __CUDA_ARCH__
  *high = __umulhi(a, b);  // of a 64-bit product nvcc adds the upper halves of a and b, too: 0
  return a * b;
#else
  const uint64_t product = uint64_t{a} * b;
  *high = static_cast<uint32_t>(product >> 32);
  return static_cast<uint32_t>(product);
#endif
}

template <typename Keys>
NAR_HOST_DEVICE Words4 philox4x32(Words4 counter, const Keys& keys) {
  uint32_t c0 = counter.word[0], c1 = counter.word[1];
  uint32_t c2 = counter.word[2], c3 = counter.word[3];
  for (int round = 0; round < 10; ++round) {
    uint32_t high0, high1;
    const uint32_t low0 = multiply(kPhiloxM0, c0, &high0);
    const uint32_t low1 = multiply(kPhiloxM1, c2, &high1);
    c0 = high1 ^ c1 ^ keys.low_of(round);
    c1 = low1;
    c2 = high0 ^ c3 ^ keys.high_of(round);
    c3 = low0;
  }
  return {{c0, c1, c2, c3}};
}

// The four words at positions 4 * block .. 4 * block + 3 of a sample.
template <typename Keys>
NAR_HOST_DEVICE Words4 random_block(const Keys& keys, uint32_t stream, uint64_t sample,
                                    uint32_t block) {
  return philox4x32(
      {{block, static_cast<uint32_t>(sample), static_cast<uint32_t>(sample >> 32), stream}}, keys);
}

NAR_HOST_DEVICE inline Words4 random_block(uint64_t seed, uint32_t stream, uint64_t sample,
                                           uint32_t block) {
  return random_block(SeedKeys{seed}, stream, sample, block);
}

NAR_HOST_DEVICE inline uint32_t random_word(uint64_t seed, uint32_t stream, uint64_t sample,
                                            int64_t position) {
  return random_block(seed, stream, sample, static_cast<uint32_t>(position / 4)).word[position % 4];
}

}  // namespace nar
