// The selection of few keys on the CPU, such as those of blocks: as key_bounds, but for many blocks
// side by side, one a lane, by bisection, without branches that depend on the keys.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <cstring>

#include "select/key_bounds.h"

namespace nar {

// The most keys, and how many blocks are looked at together.
constexpr int64_t kShort = 256;
constexpr int kBlocksAtOnce = 32;

// How much of `upper` is read behind the last block.
constexpr int64_t kTilePadding = 8;

// Compiled once per instruction set (see levels/kernels.h).
namespace {

// Whether it is faster than one block after the other: lanes cost the same without a block.
inline bool pays_side_by_side(int64_t of_block, int64_t num_blocks) {
  return of_block <= kShort && of_block <= 32 * num_blocks;
}

// Some neighbouring blocks of a row.
struct ShortBlocks {
  const uint32_t* keys;     // of the first block, as the next two
  const int16_t* upper;     // upper halves
  const uint8_t* can_take;  // or null
  int64_t of_block;         // keys, at most kShort
  int count;                // blocks, at most kBlocksAtOnce
  int64_t length;           // of all of them: the last may be shorter, or some empty
};

// A number of each block. Vector extensions of GCC and clang.
typedef int16_t Lanes __attribute__((vector_size(2 * kBlocksAtOnce)));

// Upper halves: those at place i of all blocks are neighbours.
struct Transposed {
  Lanes at[kShort + kTilePadding];

  explicit Transposed(const ShortBlocks& blocks) {
    for (int64_t i = 0; i < blocks.of_block; i += 8) {
      for (int u = 0; u < kBlocksAtOnce; u += 8) {
        const int16_t* from[8];
        for (int j = 0; j < 8; ++j) {
          from[j] = blocks.upper + std::min(u + j, blocks.count - 1) * blocks.of_block + i;
        }
        transpose(from, i, u);
      }
    }
    // The largest is below no pivot.
    const int64_t whole = std::max<int64_t>(blocks.length, 0) / blocks.of_block;
    for (int u = static_cast<int>(whole); u < blocks.count; ++u) {
      const int64_t end = std::max<int64_t>(blocks.length - u * blocks.of_block, 0);
      for (int64_t i = end; i < blocks.of_block; ++i) at[i][u] = INT16_MAX;
    }
  }

 private:
  void transpose(const int16_t* const (&from)[8], int64_t first, int block) {
#if defined(__SSE2__)
    __m128i row[8], next[8];
    for (int j = 0; j < 8; ++j) row[j] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from[j]));
    for (int j = 0; j < 4; ++j) {
      next[2 * j] = _mm_unpacklo_epi16(row[j], row[j + 4]);
      next[2 * j + 1] = _mm_unpackhi_epi16(row[j], row[j + 4]);
    }
    for (int j = 0; j < 4; ++j) {
      row[2 * j] = _mm_unpacklo_epi16(next[j], next[j + 4]);
      row[2 * j + 1] = _mm_unpackhi_epi16(next[j], next[j + 4]);
    }
    for (int j = 0; j < 4; ++j) {
      next[2 * j] = _mm_unpacklo_epi16(row[j], row[j + 4]);
      next[2 * j + 1] = _mm_unpackhi_epi16(row[j], row[j + 4]);
    }
    for (int j = 0; j < 8; ++j) {
      _mm_store_si128(reinterpret_cast<__m128i*>(&at[first + j]) + block / 8, next[j]);
    }
#else
    for (int j = 0; j < 8; ++j) {
      for (int i = 0; i < 8; ++i) at[first + i][block + j] = from[j][i];
    }
#endif
  }
};

// How many upper halves of each block are below its pivot, which is flipped as they are. (By
// reference: how vectors are passed depends on the instruction set.)
inline void count_below(const Transposed& upper, int64_t of_block, const Lanes& pivot,
                        Lanes* below) {
  Lanes count = {};
  for (int64_t i = 0; i < of_block; ++i) count -= upper.at[i] < pivot;
  *below = count;
}

// Bounds of the rank[u] smallest keys of each block. `flip`: as of bound_within.
inline void short_bounds(const ShortBlocks& blocks, const Transposed& upper, const Lanes& rank,
                         uint32_t flip, KeyBound* bounds) {
  // The upper half of the key of that rank: fewer are below it. Flipped: from INT16_MIN on.
  Lanes half = Lanes{} + INT16_MIN, below;
  for (int bit = 15; bit >= 0; --bit) {
    const Lanes trial = half + static_cast<int16_t>(1 << bit);
    count_below(upper, blocks.of_block, trial, &below);
    half = below < rank ? trial : half;
  }
  count_below(upper, blocks.of_block, half + 1, &below);
  uint16_t of_key[kBlocksAtOnce];
  int16_t is_rare[kBlocksAtOnce];
  const Lanes key = half ^ static_cast<int16_t>(kFlip);
  const Lanes rare = (below != rank) & (rank != 0);
  std::memcpy(of_key, &key, sizeof(key)), std::memcpy(is_rare, &rare, sizeof(rare));
  int any_rare = 0;
  for (int u = 0; u < blocks.count; ++u) {
    bounds[u] = KeyBound{of_key[u] + 1u} << 48;  // never of the largest, behind which nothing is
    any_rare |= is_rare[u];
  }
  for (int u = 0; u < blocks.count; ++u) bounds[u] = rank[u] == 0 ? 0 : bounds[u];
  for (int u = 0; any_rare && u < blocks.count; ++u) {
    if (!is_rare[u]) continue;  // rare: others have the same upper half
    const int64_t first = u * blocks.of_block;
    const int16_t* own = blocks.upper + first;
    const int64_t length = std::min(blocks.of_block, blocks.length - first);
    int32_t before = 0;
    for (int64_t i = 0; i < length; ++i) before += own[i] < half[u];
    bounds[u] =
        bound_within(blocks.keys + first, blocks.can_take ? blocks.can_take + first : nullptr,
                     length, own, static_cast<int32_t>(of_key[u]), rank[u] - before, flip);
  }
}

}  // namespace
}  // namespace nar
