// `corrupt` on the GPU in one launch: a warp for a short row, a block for a longer one.
//
// A warp takes tiles of 128 positions, four to a lane, and holds them in registers where the row is
// short enough. What differs from the CPU is that the row indices of the batch are compacted in the
// same launch: each row publishes how many positions it masks and adds up what those before it
// published (decoupled look-back: Merrill, Garland, "Single-pass Parallel Prefix Scan", 2016).
#include <cuda_runtime.h>

#include <type_traits>

#include "corrupt/corrupt_cuda.h"
#include "rng/permutation.h"
#include "runtime/cuda_check.h"
#include "select/order_statistic.h"

namespace nar {
namespace {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xFFFFFFFF;
constexpr int kItems = 4;  // positions of a lane in a tile
constexpr int kTile = kWarp * kItems;
constexpr int kMaxWarps = 16;
constexpr int kRowsPerBlock = 4;  // of those that take a single warp

// A published word: 0 before anything is known, then one of these flags and a count.
constexpr uint64_t kOwn = uint64_t{1} << 60;   // the positions that the row masks
constexpr uint64_t kUpTo = uint64_t{2} << 60;  // those of all rows up to it
constexpr uint64_t kCountBits = kOwn - 1;

using Atomic = unsigned long long;

__device__ Atomic* lock_of(const CorruptArgs& a) {
  return reinterpret_cast<Atomic*>(a.invalid) + kNumInvalid;
}

__device__ Atomic* published_by(const CorruptArgs& a, int64_t b) { return lock_of(a) + 1 + b; }

// ---- the threads of a row

struct TeamMemory {
  uint32_t counts[2][kMaxWarps][kNumRanks];
  uint32_t feistel_keys[kFeistelRounds];
  uint32_t time;
  int64_t start;
  uint64_t rows_before;
};

// The warps that share a row: one, or all of the block.
struct Team {
  TeamMemory* memory;
  int num_warps, warp, lane;
  int turn = 0;

  __device__ void sync() const {
    if (num_warps == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // Sums over lanes, and then over warps, or only over those before this one. The memory takes
  // turns, so that one barrier is enough.
  __device__ void sum(uint32_t* counts, int num_counts) {
    for (int j = 0; j < num_counts; ++j) counts[j] = __reduce_add_sync(kAllLanes, counts[j]);
    if (num_warps == 1) return;
    share(counts, num_counts);
    for (int j = 0; j < num_counts; ++j) counts[j] = sum_of_warps(j, num_warps);
    turn ^= 1;
  }

  // The total over the team of what each lane counts, and how much of it is in warps before.
  __device__ uint32_t sum(uint32_t count, uint32_t* in_warps_before) {
    count = __reduce_add_sync(kAllLanes, count);
    *in_warps_before = 0;
    if (num_warps == 1) return count;
    share(&count, 1);
    *in_warps_before = sum_of_warps(0, warp);
    count = sum_of_warps(0, num_warps);
    turn ^= 1;
    return count;
  }

 private:
  __device__ void share(const uint32_t* counts, int num_counts) {
    if (lane == 0) {
      for (int j = 0; j < num_counts; ++j) memory->counts[turn][warp][j] = counts[j];
    }
    __syncthreads();
  }

  __device__ uint32_t sum_of_warps(int j, int end) const {
    return __reduce_add_sync(kAllLanes, lane < end ? memory->counts[turn][lane][j] : 0);
  }
};

// ---- a row, and a tile of it

struct Row {
  int64_t b, start;
  uint64_t sample, seed;
  uint32_t length;
};

// What a lane knows of its positions: lane l has 2l, 2l + 1, 64 + 2l and 65 + 2l of a tile, so that
// a warp reads and writes whole lines, 16 bytes a lane where ids are int64.
struct Tile {
  int32_t clean[kItems];
  uint32_t can_mask;  // bit i: item i
  uint32_t key[kItems];
};

__device__ uint32_t position_of(uint32_t tile, int lane, int item) {
  return tile * kTile + (item & 2) * kWarp + 2 * lane + (item & 1);
}

// The random words at a lane's positions. Lanes 2j and 2j + 1 make the blocks j and 16 + j, of four
// neighbours each, and swap halves.
__device__ Words4 tile_words(const Row& row, uint32_t stream, uint32_t tile, int lane) {
  const bool odd = lane & 1;
  const uint32_t block = tile * kWarp + (lane >> 1) + (odd ? 16 : 0);
  const Words4 own = random_block(row.seed, stream, row.sample, block);
  const uint32_t a = __shfl_xor_sync(kAllLanes, odd ? own.word[0] : own.word[2], 1);
  const uint32_t b = __shfl_xor_sync(kAllLanes, odd ? own.word[1] : own.word[3], 1);
  return odd ? Words4{{a, b, own.word[2], own.word[3]}} : Words4{{own.word[0], own.word[1], a, b}};
}

// Two neighbours from an address of any alignment; `both` or only the first.
template <typename T>
__device__ void load_pair(const T* at, bool both, T* pair) {
  struct alignas(2 * sizeof(T)) Pair {
    T first, second;
  };
  if (both && reinterpret_cast<uintptr_t>(at) % sizeof(Pair) == 0) {
    const Pair two = *reinterpret_cast<const Pair*>(at);
    pair[0] = two.first, pair[1] = two.second;
  } else {
    pair[0] = at[0];
    if (both) pair[1] = at[1];
  }
}

template <typename T>
__device__ void store_pair(T* at, bool both, T first, T second) {
  struct alignas(2 * sizeof(T)) Pair {
    T first, second;
  };
  if (both && reinterpret_cast<uintptr_t>(at) % sizeof(Pair) == 0) {
    *reinterpret_cast<Pair*>(at) = {first, second};
  } else {
    at[0] = first;
    if (both) at[1] = second;
  }
}

// Ids, bad ones replaced by a safe one. Returns which were bad, as bits.
__device__ uint32_t load_ids(const CorruptArgs& a, const Row& row, uint32_t tile, int lane,
                             int32_t* clean) {
  const uint32_t num_tokens = static_cast<uint32_t>(a.windows.num_tokens);
  const int32_t safe = static_cast<int32_t>(a.windows.safe_id());
  uint32_t bad = 0;
  visit_tokens(a.windows, [&](const auto* tokens) {
    using Token = std::decay_t<decltype(*tokens)>;
#pragma unroll
    for (int item = 0; item < kItems; item += 2) {
      const uint32_t position = position_of(tile, lane, item);
      Token pair[2];
      pair[0] = pair[1] = static_cast<Token>(safe);  // behind the end of the row
      if (position < row.length) {
        load_pair(tokens + row.start + position, position + 1 < row.length, pair);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool is_bad = outside_vocabulary(pair[i], num_tokens) || pair[i] == a.windows.mask_id;
        clean[item + i] = is_bad ? safe : static_cast<int32_t>(pair[i]);
        bad |= static_cast<uint32_t>(is_bad) << (item + i);
      }
    }
  });
  return bad;
}

// Adds a warp's bad ids to the record, independent of the order of warps. Rare.
__device__ void record_bad(const CorruptArgs& a, const Row& row, uint32_t tile, int lane,
                           uint32_t bad) {
  const uint32_t count = __reduce_add_sync(kAllLanes, __popc(bad));
  const uint32_t mine = bad ? position_of(tile, lane, __ffs(bad) - 1) : 0xFFFFFFFF;
  if (mine != __reduce_min_sync(kAllLanes, mine)) return;
  const int64_t offset = row.start + mine;
  int64_t token = 0;
  visit_tokens(a.windows, [&](const auto* tokens) { token = tokens[offset]; });

  Atomic* record = reinterpret_cast<Atomic*>(a.invalid);
  while (atomicCAS(lock_of(a), 0, 1) != 0) __nanosleep(100);
  __threadfence();
  const Atomic others = atomicAdd(&record[0], count);
  if (others == 0 || static_cast<Atomic>(offset) < atomicAdd(&record[1], 0)) {
    atomicExch(&record[1], static_cast<Atomic>(offset));
    atomicExch(&record[2], static_cast<Atomic>(token));
  }
  __threadfence();
  atomicExch(lock_of(a), 0);
}

// Which positions may be masked, as bits.
__device__ uint32_t find_maskable(const CorruptArgs& a, const Row& row, uint32_t tile, int lane,
                                  const int32_t* clean) {
  uint32_t can_mask = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const uint32_t position = position_of(tile, lane, i);
    bool can = position < row.length;
    if (can && a.maskable) can = a.maskable[row.b * row.length + position];
    if (can && a.never_mask) can = !a.never_mask[clean[i]];
    can_mask |= static_cast<uint32_t>(can) << i;
  }
  return can_mask;
}

// Keys, from clean ids where `never_mask` asks for them. Those of positions that may not be masked
// are the largest, so that they are below no bound.
__device__ void make_keys(const CorruptArgs& a, const Row& row, uint32_t tile, int lane, Tile* t) {
  t->can_mask = find_maskable(a, row, tile, lane, t->clean);
  const Words4 words = tile_words(row, kMaskKey, tile, lane);
#pragma unroll
  for (int i = 0; i < kItems; ++i) t->key[i] = t->can_mask >> i & 1 ? words.word[i] : 0xFFFFFFFF;
}

// The tiles of a warp: kHeld in registers, or, where that is 0, as many as there are, each made
// again in every pass, which costs less than to store and read them.
template <int kHeld>
class Tiles {
 public:
  __device__ Tiles(const CorruptArgs& a, const Row& row, const Team& team)
      : a_(a), row_(row), lane_(team.lane) {
    const uint32_t num_tiles = (row.length + kTile - 1) / kTile;
    const uint32_t share = (num_tiles + team.num_warps - 1) / team.num_warps;
    first_ = min(team.warp * share, num_tiles);
    end_ = min(first_ + share, num_tiles);
    uint32_t bad = 0;
    // All loads first, so that their latencies overlap.
#pragma unroll
    for (int t = 0; t < kHeld; ++t) {
      if (first_ + t < end_) {
        bad |= load_ids(a, row, first_ + t, lane_, held_[t].clean) << (t * kItems);
      }
    }
    if (__any_sync(kAllLanes, bad)) {
      for (int t = 0; t < kHeld; ++t) {
        const uint32_t here = bad >> (t * kItems) & ((1u << kItems) - 1);
        if (__any_sync(kAllLanes, here)) record_bad(a, row, first_ + t, lane_, here);
      }
    }
#pragma unroll
    for (int t = 0; t < kHeld; ++t) {
      if (first_ + t < end_) make_keys(a, row, first_ + t, lane_, &held_[t]);
    }
  }

  // Calls use(number, tile) for each; only `with_ids` may it look at the ids, and they are checked.
  template <typename Use>
  __device__ void each(bool with_ids, Use use) const {
#pragma unroll
    for (int t = 0; t < kHeld; ++t) {
      if (first_ + t < end_) use(first_ + t, held_[t]);
    }
    for (uint32_t tile = first_; kHeld == 0 && tile < end_; ++tile) {
      Tile made;
      uint32_t bad = 0;
      if (with_ids || a_.never_mask) bad = load_ids(a_, row_, tile, lane_, made.clean);
      if (with_ids && __any_sync(kAllLanes, bad)) record_bad(a_, row_, tile, lane_, bad);
      make_keys(a_, row_, tile, lane_, &made);
      use(tile, made);
    }
  }

 private:
  const CorruptArgs& a_;
  const Row& row_;
  const int lane_;
  uint32_t first_, end_;
  Tile held_[kHeld ? kHeld : 1];
};

// ---- what a row does

// Where a permutation of [0, n) sends an index, as Permutation of permutation_cpu.h does; made by
// one warp.
__device__ uint64_t permute(const Row& row, const Team& team, uint32_t stream, uint64_t round,
                            uint64_t n, uint64_t index) {
  if (n <= uint64_t{kExactPermutationMax}) {  // the rank of its word
    const Words4 around = random_block(row.seed, stream, round, static_cast<uint32_t>(index / 4));
    const uint32_t item = index % 4;
    const uint32_t own = item == 0   ? around.word[0]
                         : item == 1 ? around.word[1]
                         : item == 2 ? around.word[2]
                                     : around.word[3];
    uint32_t before = 0;
    for (uint32_t block = team.lane; block * 4 < n; block += kWarp) {
      const Words4 words = random_block(row.seed, stream, round, block);
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) {
        const uint32_t position = block * 4 + i;
        const bool less = words.word[i] < own || (words.word[i] == own && position < index);
        before += position < n && less;
      }
    }
    return __reduce_add_sync(kAllLanes, before);
  }
  uint32_t* keys = team.memory->feistel_keys;
  __syncwarp();  // those of the permutation before have been read
  if (team.lane < kFeistelRounds / 4) {
    const Words4 words = random_block(row.seed, stream, round, team.lane);
#pragma unroll
    for (int i = 0; i < 4; ++i) keys[4 * team.lane + i] = words.word[i];
  }
  __syncwarp();
  return feistel_permute(index, n, keys);
}

// The first token of the row's window, by its slot.
__device__ int64_t ordered_start(const CorruptArgs& a, const Row& row, const Team& team) {
  const uint64_t n = static_cast<uint64_t>(a.order.num_windows);
  const uint64_t epoch = row.sample / n, position = row.sample - epoch * n;
  return a.order.start(a.order.shuffle ? permute(row, team, kWindowOrder, epoch, n, position)
                                       : position);
}

// The 16-bit time of the row's slot.
__device__ uint32_t row_time(const CorruptArgs& a, const Row& row, const Team& team) {
  const uint32_t word = random_block(row.seed, kTime, row.sample, 0).word[0];
  if (!a.stratified) return word >> 16;
  const uint64_t n = static_cast<uint64_t>(a.global_batch);
  const uint64_t step = row.sample / n, index = row.sample - step * n;
  return stratified_time(permute(row, team, kStratum, step, n, index), word, n);
}

// Key bounds of a row: the masked are below the first, the kept or random below the second, the
// kept below the third. Without kept or random ones only the first is there.
struct RowBounds {
  KeyBound mask, replace, keep;
};

__device__ bool is_below(const Tile& t, int item, uint32_t position, KeyBound bound) {
  return t.can_mask >> item & 1 && (KeyBound{t.key[item]} << 32 | position) < bound;
}

// Rare: equal keys straddle the boundary. The bound is behind the `wanted`-th of them. Every warp
// goes through the whole row by itself.
__device__ KeyBound tied_bound(const CorruptArgs& a, const Row& row, int lane, uint32_t key,
                               uint32_t wanted) {
  for (uint32_t tile = 0;; ++tile) {
    Tile t;
    if (a.never_mask) load_ids(a, row, tile, lane, t.clean);
    make_keys(a, row, tile, lane, &t);
#pragma unroll
    for (int item = 0; item < kItems; item += 2) {  // pairs of all lanes, then the next pairs
      const bool equal0 = t.key[item] == key && t.can_mask >> item & 1;
      const bool equal1 = t.key[item + 1] == key && t.can_mask >> (item + 1) & 1;
      const uint32_t all0 = __ballot_sync(kAllLanes, equal0);
      const uint32_t all1 = __ballot_sync(kAllLanes, equal1);
      const uint32_t here = __popc(all0) + __popc(all1);
      if (here < wanted) {
        wanted -= here;
        continue;
      }
      const uint32_t lanes_before = (1u << lane) - 1;
      const uint32_t before = __popc(all0 & lanes_before) + __popc(all1 & lanes_before);
      const uint32_t position = position_of(tile, lane, item);
      uint32_t end = 0;
      if (equal0 && before + 1 == wanted) end = position + 1;
      if (equal1 && before + equal0 + 1 == wanted) end = position + 2;
      return KeyBound{key} << 32 | __reduce_max_sync(kAllLanes, end);
    }
  }
}

// Bounds of the k smallest keys, and of two parts of them. Each lane follows one of the ranks.
template <int kHeld>
__device__ RowBounds select_keys(const CorruptArgs& a, const Row& row, Team& team,
                                 const Tiles<kHeld>& tiles, int num_ranks, const int32_t* ranks,
                                 int32_t n) {
  const int mine = team.lane < num_ranks ? team.lane : 0;
  PivotSearch search(mine == 0 ? ranks[0] : mine == 1 ? ranks[1] : ranks[2], n);
  for (int pass = 0; !__all_sync(kAllLanes, search.is_done()); ++pass) {
    if (!search.is_done()) search.propose(pass);
    uint32_t pivot[kNumRanks], below[kNumRanks] = {};
#pragma unroll
    for (int j = 0; j < kNumRanks; ++j) pivot[j] = __shfl_sync(kAllLanes, search.pivot, j);
    tiles.each(false, [&](uint32_t, const Tile& t) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        below[0] += t.key[i] < pivot[0];
        if (num_ranks > 1) {
          below[1] += t.key[i] < pivot[1];
          below[2] += t.key[i] < pivot[2];
        }
      }
    });
    team.sum(below, num_ranks);
    if (!search.is_done()) search.learn(mine == 0 ? below[0] : mine == 1 ? below[1] : below[2]);
  }
  // Each lane its own bound; those of ties by the whole warp, one after the other.
  KeyBound bound = KeyBound{search.pivot} << 32;
  uint32_t tied = __ballot_sync(kAllLanes, search.is_tie() && team.lane < num_ranks);
  for (; tied != 0; tied &= tied - 1) {
    const int j = __ffs(tied) - 1;
    const uint32_t key = __shfl_sync(kAllLanes, static_cast<uint32_t>(search.low), j);
    const int32_t wanted = __shfl_sync(kAllLanes, search.rank - search.below_low, j);
    const KeyBound behind = tied_bound(a, row, team.lane, key, wanted);
    if (team.lane == j) bound = behind;
  }
  return {__shfl_sync(kAllLanes, bound, 0), __shfl_sync(kAllLanes, bound, 1),
          __shfl_sync(kAllLanes, bound, 2)};
}

// Masked positions in all rows before row b, by one warp.
__device__ uint64_t find_rows_before(const CorruptArgs& a, int64_t b, int lane) {
  uint64_t total = 0;
  for (int64_t end = b; end > 0;) {
    const int64_t at = end - kWarp + lane;
    uint64_t word = kUpTo;
    if (at >= 0) word = *const_cast<volatile Atomic*>(published_by(a, at));
    // Those after the newest word that sums up all before it must be there.
    const uint32_t up_to = __ballot_sync(kAllLanes, word >= kUpTo);
    const uint32_t missing = __ballot_sync(kAllLanes, word == 0);
    if (missing > up_to) {  // the highest bit of either decides
      __nanosleep(40);
      continue;
    }
    uint64_t count = kAllLanes << lane & up_to & ~(1u << lane) ? 0 : word & kCountBits;
    for (int step = kWarp / 2; step > 0; step /= 2) {
      count += __shfl_xor_sync(kAllLanes, count, step);
    }
    total += count;
    end = up_to ? 0 : end - kWarp;
  }
  return total;
}

__device__ void publish(const CorruptArgs& a, int64_t b, uint64_t flag, uint64_t count) {
  atomicExch(published_by(a, b), flag + count);
}

// All outputs of a tile; `rows` is where its first masked position goes. Returns how many it has.
__device__ uint32_t write_tile(const CorruptArgs& a, const Row& row, uint32_t tile, int lane,
                               const Tile& t, const RowBounds& bounds, bool corrupts,
                               int64_t* rows) {
  const int32_t mask_id = static_cast<int32_t>(a.windows.mask_id);
  const int32_t num_tokens = static_cast<int32_t>(a.windows.num_tokens);
  const int64_t base = row.b * row.length;
  bool masked[kItems];
  int32_t ids[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    masked[i] = is_below(t, i, position_of(tile, lane, i), bounds.mask);
    ids[i] = masked[i] ? mask_id : t.clean[i];
  }
  if (corrupts) {
    const Words4 random = tile_words(row, kRandomToken, tile, lane);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const uint32_t position = position_of(tile, lane, i);
      if (is_below(t, i, position, bounds.replace)) {
        ids[i] = random_token(random.word[i], num_tokens, mask_id);
      }
      if (is_below(t, i, position, bounds.keep)) ids[i] = t.clean[i];
    }
  }
  uint32_t num_masked = 0;
#pragma unroll
  for (int i = 0; i < kItems; i += 2) {
    const uint32_t position = position_of(tile, lane, i);
    const int64_t at = base + position;
    if (position < row.length) {
      const bool both = position + 1 < row.length;
      store_pair<int64_t>(a.input_ids + at, both, ids[i], ids[i + 1]);
      store_pair<int64_t>(a.labels + at, both, masked[i] ? t.clean[i] : kIgnoreIndex,
                          masked[i + 1] ? t.clean[i + 1] : kIgnoreIndex);
      store_pair<uint8_t>(a.masked_indices + at, both, masked[i], masked[i + 1]);
    }
    const uint32_t all0 = __ballot_sync(kAllLanes, masked[i]);
    const uint32_t all1 = __ballot_sync(kAllLanes, masked[i + 1]);
    const uint32_t lanes_before = (1u << lane) - 1;
    int64_t* to = rows + num_masked + __popc(all0 & lanes_before) + __popc(all1 & lanes_before);
    if (masked[i]) *to++ = at;
    if (masked[i + 1]) *to = at + 1;
    num_masked += __popc(all0) + __popc(all1);
  }
  return num_masked;
}

// ---- the kernel: a row top to bottom

template <int kHeld>
__global__ void __launch_bounds__(kMaxWarps* kWarp)
    corrupt_kernel(const __grid_constant__ CorruptArgs a) {
  __shared__ TeamMemory memory[kRowsPerBlock];
  Team team{&memory[threadIdx.y], static_cast<int>(blockDim.x / kWarp),
            static_cast<int>(threadIdx.x / kWarp), static_cast<int>(threadIdx.x % kWarp)};
  const int64_t b = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (b >= a.windows.batch) return;  // only where a team is one warp: no barrier misses it

  Row row;
  row.b = b;
  row.length = static_cast<uint32_t>(a.windows.seq_len);
  row.seed = a.seed_tensor ? *a.seed_tensor : a.seed;
  row.sample = a.sample(b);
  row.start = a.windows.start(b);
  if (a.order.num_windows) {
    if (team.warp == 0) {
      const int64_t start = ordered_start(a, row, team);
      if (team.lane == 0) team.memory->start = start;
    }
    team.sync();
    row.start = team.memory->start;
  }
  const bool outside = row.start < 0 || row.start > a.windows.num_corpus_tokens - a.windows.seq_len;
  if (outside) row.start = 0;
  if (threadIdx.x == 0) {
    Atomic* record = reinterpret_cast<Atomic*>(a.invalid);
    if (outside) atomicAdd(&record[3], 1);
    if (static_cast<int64_t>(row.sample) < 0) atomicAdd(&record[4], 1);
  }

  const Tiles<kHeld> tiles(a, row, team);
  if (team.warp == 0) {
    const uint32_t time = row_time(a, row, team);
    if (team.lane == 0) team.memory->time = time;
  }
  team.sync();
  const uint32_t t16 = team.memory->time;

  int32_t n = row.length;
  if (a.maskable || a.never_mask) {
    uint32_t can_mask = 0;
    tiles.each(false, [&](uint32_t, const Tile& t) { can_mask += __popc(t.can_mask); });
    team.sum(&can_mask, 1);
    n = can_mask;
  }

  // Which keys: the k smallest of n, or those below the ratio.
  const CorruptionShares shares = corruption_shares(a, row.seed, row.sample);
  const bool corrupts = shares.replace != 0;
  RowBounds bounds;
  if (a.exact) {
    const int32_t k = exact_count(a, t16, n);
    if (threadIdx.x == 0) publish(a, b, kOwn, k);
    const int32_t ranks[kNumRanks] = {k, shares.of_count(shares.replace, k),
                                      shares.of_count(shares.keep, k)};
    bounds = select_keys(a, row, team, tiles, corrupts ? kNumRanks : 1, ranks, n);
  } else {
    const uint64_t ratio = a.ratio_table[t16];
    bounds = {ratio << 32, (ratio * shares.replace >> 31) << 32, (ratio * shares.keep >> 31) << 32};
  }

  uint32_t num_masked = 0, in_warps_before;
  tiles.each(false, [&](uint32_t tile, const Tile& t) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      num_masked += is_below(t, i, position_of(tile, team.lane, i), bounds.mask);
    }
  });
  num_masked = team.sum(num_masked, &in_warps_before);

  if (team.warp == 0) {
    if (!a.exact && team.lane == 0) publish(a, b, kOwn, num_masked);
    const uint64_t rows_before = find_rows_before(a, b, team.lane);
    if (team.lane == 0) {
      publish(a, b, kUpTo, rows_before + num_masked);
      team.memory->rows_before = rows_before;
      write_scalars(a, b, t16, n, num_masked);
    }
  }
  team.sync();
  int64_t* rows = a.row_buffer + team.memory->rows_before + in_warps_before;
  tiles.each(true, [&](uint32_t tile, const Tile& t) {
    rows += write_tile(a, row, tile, team.lane, t, bounds, corrupts, rows);
  });
}

// How many warps take a row, and how many tiles each holds.
struct Shape {
  void (*kernel)(CorruptArgs);
  unsigned warps, rows_per_block;
};

Shape launch_shape(int64_t batch, int64_t seq_len) {
  // Small batches are faster with more warps a row, large ones with more work a warp.
  constexpr int64_t kFewTokens = 1 << 20;
  constexpr int kDeep = 4;
  const int64_t tiles = (seq_len + kTile - 1) / kTile;
  if (tiles <= (batch * seq_len <= kFewTokens ? kMaxWarps : 1)) {
    return {corrupt_kernel<1>, static_cast<unsigned>(tiles), tiles == 1 ? kRowsPerBlock : 1u};
  }
  if (tiles <= kDeep * kMaxWarps) {
    const unsigned warps = static_cast<unsigned>((tiles + kDeep - 1) / kDeep);
    return {corrupt_kernel<kDeep>, warps, warps == 1 ? kRowsPerBlock : 1u};
  }
  return {corrupt_kernel<0>, kMaxWarps, 1};
}

}  // namespace

void corrupt_cuda(const CorruptArgs& a, int device, cudaStream_t stream) {
  const int64_t batch = a.windows.batch;
  check_cuda(cudaSetDevice(device), "cudaSetDevice");
  check_cuda(cudaMemsetAsync(a.invalid, 0, workspace_size(batch) * sizeof(int64_t), stream),
             "cudaMemsetAsync");
  if (batch == 0) return;
  const Shape shape = launch_shape(batch, a.windows.seq_len);
  cudaLaunchConfig_t config = {};
  config.gridDim =
      dim3(static_cast<unsigned>((batch + shape.rows_per_block - 1) / shape.rows_per_block));
  config.blockDim = dim3(shape.warps * kWarp, shape.rows_per_block);
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, shape.kernel, a), "the launch of corrupt_kernel");
}

}  // namespace nar
