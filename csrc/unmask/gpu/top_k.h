// The k largest logits of a row; of equal ones, those that come first.
#pragma once

#include "unmask/gpu/row.h"

namespace nar {
namespace {

// Kept are larger logits, and, up to a column, equal ones.
struct TopK {
  uint32_t key = 0;  // of the last one, see `ordered`
  int last_tie = INT32_MAX;

  __device__ bool keeps(uint32_t other, int column) const {
    return other > key || (other == key && column <= last_tie);
  }
};

// Bits that the types of 16 bits lack are then equal in all keys.
__device__ inline uint32_t key_of(float x) { return ordered(x == kLargestFloat ? INFINITY : x); }

// A few logits among which the k largest are, in shared memory.
struct Candidates {
  static constexpr int kMost = 1024;
  float logit[kMost];
  int column[kMost];
};

// Calls use(logit, column) for what the thread has of all columns.
template <typename T>
struct AllColumns {
  const Row<T>& row;
  const Block& block;

  template <typename Use>
  __device__ void each(Use use) const {
    for (int i = block.thread; i < row.num_vectors(); i += block.num_threads) {
      const Vector<T> vector = row.vector(i);
#pragma unroll
      for (int j = 0; j < Row<T>::kSize; ++j) {
        use(Row<T>::clean(vector[j]), i * Row<T>::kSize + j);
      }
    }
  }
};

struct FewColumns {
  const Candidates& candidates;
  const Block& block;
  int count;

  template <typename Use>
  __device__ void each(Use use) const {
    for (int i = block.thread; i < count; i += block.num_threads) {
      use(candidates.logit[i], candidates.column[i]);
    }
  }
};

// Bit by bit, the largest number for which at least `wanted` of what `count` counts over the block
// are left; down to bit `last`.
template <typename Count>
__device__ uint32_t largest_with(Block& block, uint32_t wanted, int last, Count count) {
  uint32_t found = 0;
  for (int bit = 31; bit >= last; --bit) {
    const uint32_t tried = found | 1u << bit;
    const uint64_t left = block.sum(count(tried));
    if (left >= wanted) found = tried;
    if (left == wanted) break;
  }
  return found;
}

// A key that at least k columns reach, but few more, if k is less than the number of threads: the
// k-th largest of what is the largest of each thread's.
__device__ inline uint32_t likely_key(Block& block, float thread_largest, uint32_t k) {
  const uint32_t key = key_of(thread_largest);
  return largest_with(block, k, 0, [&](uint32_t tried) { return key >= tried ? 1u : 0u; });
}

// Collects the columns that reach a key; their number may be more than what fits.
template <typename T>
__device__ int collect(const Row<T>& row, Block& block, uint32_t key, Candidates& candidates) {
  if (block.thread == 0) block.memory.num_candidates = 0;
  __syncthreads();
  AllColumns<T>{row, block}.each([&](float x, int column) {
    if (key_of(x) < key) return;
    const uint32_t at = atomicAdd(&block.memory.num_candidates, 1u);
    if (at >= Candidates::kMost) return;
    candidates.logit[at] = x, candidates.column[at] = column;
  });
  __syncthreads();
  return static_cast<int>(block.memory.num_candidates);
}

template <typename Columns>
__device__ TopK find_top_k(const Columns& columns, Block& block, uint32_t k) {
  TopK top;
  top.key = largest_with(block, k, 0, [&](uint32_t tried) {
    uint32_t count = 0;
    columns.each([&](float x, int) { count += key_of(x) >= tried; });
    return count;
  });
  uint32_t above = 0, equal = 0;
  columns.each([&](float x, int) {
    above += key_of(x) > top.key;
    equal += key_of(x) == top.key;
  });
  const uint64_t both = block.sum(uint64_t{above} << 32 | equal);
  above = static_cast<uint32_t>(both >> 32), equal = static_cast<uint32_t>(both);
  if (above + equal <= k) return top;
  // The columns in reverse, so that the wanted ones are those that are large.
  const uint32_t wanted = k - above;
  const uint32_t reversed = largest_with(block, wanted, 0, [&](uint32_t tried) {
    uint32_t count = 0;
    columns.each([&](float x, int column) {
      count += key_of(x) == top.key && ~static_cast<uint32_t>(column) >= tried;
    });
    return count;
  });
  top.last_tie = static_cast<int>(~reversed);
  return top;
}

}  // namespace
}  // namespace nar
