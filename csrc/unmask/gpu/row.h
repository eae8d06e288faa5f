// A row of logits on a GPU: the warps that share it, and where its logits are.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "runtime/warp.h"
#include "unmask/gpu/logits.h"
#include "unmask/unmask_cuda.h"

namespace nar {
namespace {

constexpr int kMaxWarps = 24;
constexpr uint32_t kNoColumn = 0xFFFFFFFF;

// Shared by the warps of a row.
struct alignas(16) RowMemory {
  uint64_t of_warps[2][kMaxWarps];
  // A bit for each tile, modulo 1024: it has a forbidden id, or reaches over the end of the row.
  uint32_t is_unusual[32];
  uint32_t pivots[2];      // keys, from a sample
  uint32_t num_listed;     // see TopKSearch
  uint32_t first_largest;  // column
  uint32_t last_tie;       // column
  uint32_t start, best;    // the first score and the best so far: see Sampler
  Chunk last_kept;         // the chunk with last_tie, without what is not kept
};

// How a row is taken: by a warp or by a block, which hold it in shared memory, or by a block that
// holds a part of it.
enum class Mapping { kWarp, kBlock, kPart };

// The warps of a row.
template <Mapping kMapping>
struct Team {
  RowMemory* memory;
  uint32_t warp, lane;
  uint32_t turn = 0;

  __device__ uint32_t num_warps() const {
    return kMapping == Mapping::kWarp ? 1 : blockDim.x / kWarp;
  }
  __device__ uint32_t thread() const { return warp * kWarp + lane; }
  __device__ uint32_t num_threads() const { return num_warps() * kWarp; }

  __device__ void sync() const {
    if (kMapping == Mapping::kWarp) {
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
                             lane < num_warps() ? static_cast<uint32_t>(of_warps[lane]) : 0);
  }

  // -0 counts as 0.
  __device__ float largest(float x) { return Logits<float>::value(largest(Logits<float>::key(x))); }

  __device__ uint64_t largest(uint64_t x) {
    const uint64_t* of_warps = exchange(largest_of_lanes(x));
    return largest_of_lanes(lane < num_warps() ? of_warps[lane] : 0);
  }

  __device__ const uint64_t* last_exchange() const { return memory->of_warps[turn]; }

  // Of two counts.
  __device__ void sum(uint32_t* counts) {
#pragma unroll
    for (int j = 0; j < 2; ++j) counts[j] = __reduce_add_sync(kAllLanes, counts[j]);
    const uint64_t* of_warps = exchange(uint64_t{counts[1]} << 32 | counts[0]);
    const uint64_t both = lane < num_warps() ? of_warps[lane] : 0;
    counts[0] = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(both));
    counts[1] = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(both >> 32));
  }

  __device__ uint64_t sum(uint64_t x) {
    const uint64_t* of_warps = exchange(sum_of_lanes(x));
    return sum_of_lanes(lane < num_warps() ? of_warps[lane] : 0);
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

// A warp takes tiles of a chunk a lane: about as many as any other warp, side by side. If it holds
// a part, that is the first ones; the others are read again from global memory, the cache at best,
// in every pass.
template <typename T, Mapping kMapping>
class Row {
 public:
  using L = Logits<T>;
  using Warps = Team<kMapping>;
  static constexpr uint32_t kTile = kWarp * L::kItems;

  __device__ Row(const UnmaskLaunch& p, int64_t index, const Warps& team, Chunk* held)
      : p_(p),
        from_(static_cast<const T*>(p.args.logits) + index * p.args.stride),
        vocabulary_(static_cast<uint32_t>(p.args.vocabulary)),
        num_forbidden_(static_cast<uint32_t>(p.args.num_forbidden)),
        memory_(team.memory),
        lane_(team.lane) {
    const uint32_t num_tiles = (vocabulary_ + kTile - 1) / kTile;
    first_ = share(num_tiles, team.warp, team.num_warps());
    num_tiles_ = share(num_tiles, team.warp + 1, team.num_warps()) - first_;
    held_ = held;
    if (kMapping == Mapping::kPart) {
      const uint32_t first_held = share(p.held_tiles, team.warp, team.num_warps());
      num_held_ = share(p.held_tiles, team.warp + 1, team.num_warps()) - first_held;
      held_ = held + (static_cast<int>(first_held) - static_cast<int>(first_)) * kWarp;
    }
    if (team.thread() == 0 && vocabulary_ % kTile != 0) mark(num_tiles - 1);
    for (uint32_t f = team.thread(); f < num_forbidden_; f += team.num_threads()) {
      mark(forbidden(f) / kTile);
    }
    team.sync();
  }

  __device__ uint32_t vocabulary() const { return vocabulary_; }
  __device__ uint32_t num_tiles() const { return num_tiles_; }

  // The first column of the lane's chunk of a tile.
  __device__ uint32_t column(uint32_t i) const { return (first_ + i) * kTile + lane_ * L::kItems; }

  // The one pass over global memory: fills the memory that is shared, and returns the largest of
  // the lane's logits.
  __device__ float load() {
    const uint32_t address = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(from_));
    if (address % 16 == 0) return load_by<16>();
    if (address % 4 == 0) return load_by<4>();
    return load_by<sizeof(T)>();
  }

  // The lane's chunk of a tile, `column` its first column.
  __device__ Chunk chunk(uint32_t i, uint32_t column) const {
    if (kMapping != Mapping::kPart || i < num_held_) return *held(column);
    const uint32_t tile = first_ + i;
    if (memory_->is_unusual[tile / 32 % 32] >> tile % 32 & 1) return read_unusual(column);
    const uint32_t address = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(from_));
    const T* at = from_ + column;
    return address % 16 == 0 ? read<16>(at) : read<sizeof(T)>(at);
  }

  // A logit, cleaned; also where its id is forbidden.
  __device__ float at(uint32_t column) const { return clean(static_cast<float>(from_[column])); }

  __device__ bool forbids(uint32_t column) const {
    const uint32_t f = first_forbidden_from(column);
    return f < num_forbidden_ && forbidden(f) == column;
  }

 private:
  // Where the share of a warp begins.
  static __device__ uint32_t share(uint32_t count, uint32_t warp, uint32_t num_warps) {
    return static_cast<uint32_t>(uint64_t{count} * warp / num_warps);
  }

  // Where the chunk from a column on is held: one from 16 / sizeof(T) columns on has 16 bytes.
  __device__ Chunk* held(uint32_t column) const {
    return reinterpret_cast<Chunk*>(reinterpret_cast<T*>(held_) + column);
  }

  __device__ uint32_t forbidden(uint32_t f) const {
    return static_cast<uint32_t>(
        f < kForbiddenArguments ? p_.forbidden[f] : p_.more_forbidden[f - kForbiddenArguments]);
  }

  // The number of the first forbidden id that is not below a column.
  __device__ uint32_t first_forbidden_from(uint32_t column) const {
    uint32_t first = 0, end = num_forbidden_;
    while (first < end) {
      const uint32_t middle = (first + end) / 2;
      if (forbidden(middle) < column) {
        first = middle + 1;
      } else {
        end = middle;
      }
    }
    return first;
  }

  __device__ void mark(uint32_t tile) const {
    atomicOr(&memory_->is_unusual[tile / 32 % 32], 1u << tile % 32);
  }

  // Which of the 32 tiles from a tile on are unusual.
  __device__ uint32_t unusual_from(uint32_t tile) const {
    return __funnelshift_r(memory_->is_unusual[tile / 32 % 32],
                           memory_->is_unusual[(tile / 32 + 1) % 32], tile % 32);
  }

  template <int kBytes>
  static __device__ Chunk read(const T* at) {
    using Piece = std::conditional_t<kBytes == 16, Chunk,
                                     std::conditional_t<kBytes == 4, uint32_t, uint16_t>>;
    Piece pieces[sizeof(Chunk) / kBytes];
#pragma unroll
    for (unsigned j = 0; j < sizeof(Chunk) / kBytes; ++j) {
      pieces[j] = reinterpret_cast<const Piece*>(at)[j];
    }
    Chunk c;
    memcpy(&c, pieces, sizeof c);
    return L::checked(c);
  }

  // One of a tile that is marked: -inf behind the end of the row and in place of forbidden ids.
  __device__ Chunk read_unusual(uint32_t first) const {
    uint32_t allowed = 0;
    for (int j = 0; j < L::kItems; ++j) {
      if (first + j < vocabulary_) allowed |= 1u << j;
    }
    for (uint32_t f = first_forbidden_from(first); f < num_forbidden_; ++f) {
      const uint32_t item = forbidden(f) - first;
      if (item >= L::kItems) break;
      allowed &= ~(1u << item);
    }
    Chunk c = L::nothing();
#pragma unroll
    for (int j = 0; j < L::kItems; ++j) {
      if (allowed >> j & 1) L::set(&c, j, from_[first + j]);
    }
    return L::checked(c);
  }

  template <int kBytes>
  __device__ float load_by() {
    constexpr uint32_t kGroup = 32, kAtOnce = kBytes == 2 ? 2 : 4;  // loads in flight
    Chunk most = L::nothing();
    const auto take = [&](uint32_t i, const Chunk& c) {
      if (kMapping != Mapping::kPart || i < num_held_) *held(column(i)) = c;
      most = L::larger(most, c);
    };
    for (uint32_t first = 0; first < num_tiles_; first += kGroup) {
      const uint32_t left = num_tiles_ - first;
      const uint32_t here = left < kGroup ? (1u << left) - 1 : ~0u;
      const uint32_t marked = unusual_from(first_ + first);
      const T* at = from_ + column(first);
      uint32_t i = first;
      for (uint32_t todo = here & ~marked; todo; todo >>= kAtOnce) {
        Chunk c[kAtOnce];
#pragma unroll
        for (uint32_t t = 0; t < kAtOnce; ++t) {
          if (todo >> t & 1) c[t] = read<kBytes>(at + t * kTile);
        }
#pragma unroll
        for (uint32_t t = 0; t < kAtOnce; ++t) {
          if (todo >> t & 1) take(i + t, c[t]);
        }
        i += kAtOnce, at += kAtOnce * kTile;
      }
      for (uint32_t todo = here & marked; todo; todo &= todo - 1) {
        const uint32_t tile = first + __ffs(todo) - 1;
        take(tile, read_unusual(column(tile)));
      }
    }
    return clean(L::largest(most));
  }

  const UnmaskLaunch& p_;
  const T* const from_;
  const uint32_t vocabulary_, num_forbidden_;
  RowMemory* const memory_;
  const uint32_t lane_;
  Chunk* held_;  // as if all tiles of the row were
  uint32_t first_, num_tiles_, num_held_;
};

}  // namespace
}  // namespace nar
