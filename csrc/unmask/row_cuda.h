// A row of logits on a GPU: the warps that share it, and where its logits are.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "unmask/logits_cuda.h"
#include "unmask/unmask_cuda.h"

namespace nar {
namespace {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xFFFFFFFF;
constexpr int kMaxWarps = 32;
constexpr uint32_t kNoColumn = 0xFFFFFFFF;

// An order-preserving map of floats to integers; -0 is below 0.
__device__ inline uint32_t ordered(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}
__device__ inline float from_ordered(uint32_t order) {
  return bits_as<float>(order & 0x80000000 ? order & 0x7FFFFFFF : ~order);
}

// Shared by the warps of a row.
struct alignas(16) RowMemory {
  uint64_t of_warps[2][kMaxWarps];
  uint32_t has_forbidden[32];  // a bit for each tile, modulo 1024
  uint32_t pivots[2];          // keys, from a sample
  uint32_t first_largest;      // column
  uint32_t last_tie;           // column
  uint32_t best;               // ordered: the best score so far
};

// The warps of a row: one, or all of the block.
struct Team {
  RowMemory* memory;
  uint32_t num_warps, warp, lane;
  uint32_t turn = 0;

  __device__ uint32_t thread() const { return warp * kWarp + lane; }
  __device__ uint32_t num_threads() const { return num_warps * kWarp; }

  __device__ void sync() const {
    if (num_warps == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // What every warp gives; `mine` is the same in all lanes. The memory takes turns, so that one
  // barrier is enough.
  __device__ const uint64_t* exchange(uint64_t mine) {
    uint64_t* of_warps = memory->of_warps[turn ^= 1];
    if (lane == 0) of_warps[warp] = mine;
    sync();
    return of_warps;
  }

  __device__ uint32_t largest(uint32_t x) {
    const uint64_t* of_warps = exchange(__reduce_max_sync(kAllLanes, x));
    return __reduce_max_sync(kAllLanes,
                             lane < num_warps ? static_cast<uint32_t>(of_warps[lane]) : 0);
  }

  __device__ uint64_t largest(uint64_t x) {
    const uint64_t* of_warps = exchange(largest_of_lanes(x));
    return largest_of_lanes(lane < num_warps ? of_warps[lane] : 0);
  }

  __device__ uint64_t sum(uint64_t x) {
    const uint64_t* of_warps = exchange(sum_of_lanes(x));
    return sum_of_lanes(lane < num_warps ? of_warps[lane] : 0);
  }

  static __device__ uint64_t sum_of_lanes(uint64_t x) {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
    return x;
  }
  static __device__ uint64_t largest_of_lanes(uint64_t x) {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const uint64_t other = __shfl_xor_sync(kAllLanes, x, step);
      x = other > x ? other : x;
    }
    return x;
  }
};

// A warp takes tiles of a chunk a lane: about as many as any other warp, side by side. The first of
// them are held in shared memory, all of them where the row fits; the others are read again from
// global memory, the cache at best, in every pass.
template <typename T>
class Row {
 public:
  using L = Logits<T>;
  static constexpr uint32_t kTile = kWarp * L::kItems;

  __device__ Row(const UnmaskLaunch& p, int64_t index, const Team& team, Chunk* held)
      : p_(p),
        from_(static_cast<const T*>(p.args.logits) + index * p.args.stride),
        vocabulary_(static_cast<uint32_t>(p.args.vocabulary)),
        memory_(team.memory),
        lane_(team.lane) {
    const uint32_t num_tiles = (vocabulary_ + kTile - 1) / kTile;
    first_ = share(num_tiles, team.warp, team.num_warps);
    num_tiles_ = share(num_tiles, team.warp + 1, team.num_warps) - first_;
    const uint32_t first_held = share(p.held_tiles, team.warp, team.num_warps);
    num_held_ = share(p.held_tiles, team.warp + 1, team.num_warps) - first_held;
    held_ = held + first_held * kWarp + lane_;
    for (uint32_t f = team.thread(); f < p.args.num_forbidden; f += team.num_threads()) {
      const uint32_t tile = forbidden(f) / kTile;
      atomicOr(&memory_->has_forbidden[tile / 32 % 32], 1u << tile % 32);
    }
    team.sync();
  }

  __device__ uint32_t vocabulary() const { return vocabulary_; }
  __device__ uint32_t num_tiles() const { return num_tiles_; }

  // The first column of the lane's chunk of a tile.
  __device__ uint32_t column(uint32_t i) const {
    return (first_ + i) * kTile + lane_ * L::kItems;
  }

  // The one read from global memory: fills the memory that is shared, and returns the largest of
  // the lane's logits.
  __device__ float load() {
    switch (width()) {
      case 16:
        return load_by<16>();
      case 8:
      case 4:
        return load_by<4>();
      default:
        return load_by<sizeof(T)>();
    }
  }

  __device__ Chunk chunk(uint32_t i) const {
    if (i < num_held_) return held_[i * kWarp];
    switch (width()) {
      case 16:
        return allowed(i, read<16>(i));
      case 8:
      case 4:
        return allowed(i, read<4>(i));
      default:
        return allowed(i, read<sizeof(T)>(i));
    }
  }

  // A logit, cleaned; also where its id is forbidden.
  __device__ float at(uint32_t column) const { return clean(static_cast<float>(from_[column])); }

  __device__ bool forbids(uint32_t column) const {
    for (uint32_t f = 0; f < p_.args.num_forbidden; ++f) {
      if (forbidden(f) == column) return true;
    }
    return false;
  }

 private:
  // Where the share of a warp begins.
  static __device__ uint32_t share(uint32_t count, uint32_t warp, uint32_t num_warps) {
    return static_cast<uint32_t>(uint64_t{count} * warp / num_warps);
  }

  __device__ uint32_t forbidden(uint32_t f) const {
    return static_cast<uint32_t>(f < kInlineForbidden ? p_.forbidden[f]
                                                      : p_.more_forbidden[f - kInlineForbidden]);
  }

  // Of the largest loads that its address allows.
  __device__ uint32_t width() const {
    const uint32_t address = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(from_));
    return min(address & (0u - address), 16u) | (address % 16 == 0 ? 16 : 0);
  }

  // A whole chunk; -inf where it reaches over the end of the row.
  template <int kBytes>
  __device__ Chunk read(uint32_t i) const {
    using Piece = std::conditional_t<kBytes == 16, Chunk,
                                     std::conditional_t<kBytes == 4, uint32_t, uint16_t>>;
    Chunk c = L::nothing();
    if (column(i) + L::kItems <= vocabulary_) {
      const Piece* from = reinterpret_cast<const Piece*>(from_ + column(i));
      Piece pieces[sizeof(Chunk) / kBytes];
#pragma unroll
      for (unsigned j = 0; j < sizeof(Chunk) / kBytes; ++j) pieces[j] = from[j];
      memcpy(&c, pieces, sizeof c);
    }
    return c;
  }

  // What `read` gave, with the logits at the end of the row and without those of forbidden ids.
  __device__ Chunk allowed(uint32_t i, const Chunk& c) const {
    const uint32_t tile = first_ + i;
    const bool has_forbidden = memory_->has_forbidden[tile / 32 % 32] >> tile % 32 & 1;
    const bool is_last = (tile + 1) * kTile > vocabulary_;
    return L::checked(has_forbidden || is_last ? mended(column(i), c) : c);
  }

  __device__ Chunk mended(uint32_t column, Chunk c) const {
    if (column + L::kItems > vocabulary_) {
#pragma unroll
      for (int j = 0; j < L::kItems; ++j) {
        if (column + j < vocabulary_) set(&c, j, from_[column + j]);
      }
    }
    uint32_t gone = 0;
    for (uint32_t f = 0; f < p_.args.num_forbidden; ++f) {
      const uint32_t item = forbidden(f) - column;
      if (item < L::kItems) gone |= 1u << item;
    }
#pragma unroll
    for (int j = 0; j < L::kItems; ++j) {
      if (gone >> j & 1) L::set(&c, j, L::minus_infinity());
    }
    return c;
  }
  static __device__ void set(Chunk* c, int j, __nv_bfloat16 x) {
    L::set(c, j, bits_as<uint16_t>(x));
  }
  static __device__ void set(Chunk* c, int j, __half x) { L::set(c, j, bits_as<uint16_t>(x)); }
  static __device__ void set(Chunk* c, int j, float x) { L::set(c, j, x); }

  template <int kBytes>
  __device__ float load_by() {
    constexpr uint32_t kAtOnce = 4;  // loads in flight
    Chunk most = L::nothing();
    for (uint32_t i = 0; i < num_tiles_; i += kAtOnce) {
      Chunk c[kAtOnce];
#pragma unroll
      for (uint32_t t = 0; t < kAtOnce; ++t) {
        if (i + t < num_tiles_) c[t] = read<kBytes>(i + t);
      }
#pragma unroll
      for (uint32_t t = 0; t < kAtOnce; ++t) {
        if (i + t >= num_tiles_) break;
        c[t] = allowed(i + t, c[t]);
        if (i + t < num_held_) held_[(i + t) * kWarp] = c[t];
        most = L::larger(most, c[t]);
      }
    }
    return clean(L::largest(most));
  }

  const UnmaskLaunch& p_;
  const T* const from_;
  const uint32_t vocabulary_;
  RowMemory* const memory_;
  const uint32_t lane_;
  Chunk* held_;  // the lane's first
  uint32_t first_, num_tiles_, num_held_;
};

}  // namespace
}  // namespace nar
