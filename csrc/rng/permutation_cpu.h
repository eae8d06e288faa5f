// Keyed permutations on the CPU: many indices at once.
#pragma once

#include <algorithm>
#include <cstdint>

#include "rng/permutation.h"
#include "rng/philox_simd.h"

namespace nar {

// Compiled once per instruction set (see levels/kernels.h).
namespace {

class Permutation {
 public:
  // `round` is which permutation: an epoch, or a step.
  Permutation(uint64_t seed, uint32_t stream, uint64_t round, int64_t n) : n_(n) {
    fill_words(words_, is_exact() ? n : kFeistelRounds, seed, stream, round);
    if (is_exact()) sort_into_bins();
  }

  // Replaces each x, in [0, n), by its image.
  void apply(int64_t* x, int64_t count) const {
    if (is_exact()) {
      for (int64_t i = 0; i < count; ++i) x[i] = rank(x[i]);
    } else {
      for (int64_t i = 0; i < count; i += kBlock) {
        walk(x + i, static_cast<int>(std::min<int64_t>(kBlock, count - i)));
      }
    }
  }

 private:
  // So many that the latency of a round is hidden by those of others.
  static constexpr int kBlock = 128, kBins = 256;

  bool is_exact() const { return n_ <= kExactPermutationMax; }

  // Indices by the upper byte of their word: about as many bins as there are words, or more.
  void sort_into_bins() {
    for (int64_t i = 0; i < n_; ++i) ++bin_end_[words_[i] >> 24];
    for (int bin = 1; bin < kBins; ++bin) bin_end_[bin] += bin_end_[bin - 1];
    for (int64_t i = n_; i-- > 0;) binned_[--bin_end_[words_[i] >> 24]] = static_cast<uint8_t>(i);
    for (int bin = 1; bin < kBins; ++bin) bin_end_[bin - 1] = bin_end_[bin];
    bin_end_[kBins - 1] = static_cast<uint16_t>(n_);
  }

  // Of the word at an index among all; of equal ones the first comes first.
  int64_t rank(int64_t index) const {
    const uint32_t word = words_[index], bin = word >> 24;
    const int64_t begin = bin ? bin_end_[bin - 1] : 0;
    int64_t rank = begin;
    for (int64_t at = begin; at < bin_end_[bin]; ++at) {
      const uint32_t other = words_[binned_[at]];
      rank += other < word || (other == word && binned_[at] < index);
    }
    return rank;
  }

  // Cycle walking: applies the network again to those that are not below n yet.
  void walk(int64_t* x, int count) const {
    const FeistelNetwork network(static_cast<uint64_t>(n_));
    uint32_t left[kBlock], right[kBlock];
    int place[kBlock];
    for (int i = 0; i < count; ++i) {
      left[i] = network.left(x[i]), right[i] = network.right(x[i]), place[i] = i;
    }
    if (network.size() == static_cast<uint64_t>(n_)) {  // of which none is outside
      network(left, right, count, words_);
      for (int i = 0; i < count; ++i) {
        x[i] = static_cast<int64_t>(network.join(left[i], right[i]));
      }
      return;
    }
    while (count > 0) {
      network(left, right, count, words_);
      int outside = 0;
      for (int i = 0; i < count; ++i) {
        x[place[i]] = static_cast<int64_t>(network.join(left[i], right[i]));
        left[outside] = left[i], right[outside] = right[i], place[outside] = place[i];
        outside += x[place[i]] >= n_;
      }
      count = outside;
    }
  }

  int64_t n_;
  uint32_t words_[kExactPermutationMax];
  uint16_t bin_end_[kBins] = {};
  uint8_t binned_[kExactPermutationMax];
};

// Replaces each sample slot by its image: slot g is index g % n under permutation g / n.
inline void permute_slots(int64_t* slots, int64_t count, int64_t n, uint64_t seed,
                          uint32_t stream) {
  for (int64_t first = 0, end = 0; first < count; first = end) {
    const int64_t round = slots[first] / n, begin = round * n;
    for (; end < count && slots[end] >= begin && slots[end] - begin < n; ++end) {
      slots[end] -= begin;
    }
    Permutation(seed, stream, round, n).apply(slots + first, end - first);
  }
}

}  // namespace
}  // namespace nar
