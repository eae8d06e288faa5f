// `corrupt` on the GPU in one launch. What differs from the CPU: a row is held in the registers of
// the warps that share it, and the row indices of the batch are compacted in the same launch.
#include <algorithm>

#include "corrupt/corrupt_cuda.h"
#include "corrupt/gpu/look_back.h"
#include "corrupt/gpu/slots.h"
#include "corrupt/gpu/write.h"
#include "runtime/cuda_check.h"
#include "runtime/shared_memory.h"

namespace nar {
namespace {

// How many positions a row masks is known once its time is.
__device__ bool counts_are_known(const KernelArgs& a) { return a.exact && !a.restricted; }

// What the rows of a launch are, a kernel for each: windows; documents; or, of either, blocks or
// views.
constexpr int kWindows = 0, kDocuments = 1, kParts = 2;

template <bool kDivided>
__device__ int64_t rows_of_batch(const KernelArgs& a) {
  return kDivided ? a.num_draws() : a.windows.batch;
}

// The warp of a block that works on no row.
template <bool kDivided>
__device__ void lead_block(const KernelArgs& a, BlockMemory& memory) {
  const int lane = threadIdx.x % kWarp;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * a.shape.rows;
  const int num_rows =
      static_cast<int>(min(rows_of_batch<kDivided>(a) - first, int64_t{a.shape.rows}));
  draw_slots<kDivided>(a, first, num_rows, lane, memory);
  sync_block();
  const auto finish = [&](uint32_t n, uint32_t k) {
    finish_rows<kDivided>(a, blockIdx.x, first, num_rows, lane, n, k, memory);
  };
  if (counts_are_known(a)) {  // other blocks need not wait for the keys of this one
    uint32_t n = 0, k = 0;
    if (lane < num_rows) {
      const Draw draw = draw_at<kDivided>(a, first + lane);
      n = static_cast<uint32_t>(span_of<kDivided>(a, draw).length);
      const View view = kDivided ? a.division.view(draw.view) : View{};
      k = exact_count(a, view, memory.time[lane], n);
    }
    finish(n, k);
    sync_block();
  } else {
    sync_block();  // the counts of all warps are there
    uint32_t n = 0, k = 0;
    if (lane < num_rows) {
      n = memory.num_maskable[lane];
      for (int i = 0; i < a.shape.warps_per_row; ++i) {
        k += memory.num_masked[lane * a.shape.warps_per_row + i];
      }
    }
    finish(n, k);
  }
  sync_block();
}

// Which keys: the k smallest of n, or those below the ratio.
template <int kRanks, int kHeld>
__device__ RowBounds<kRanks> row_bounds(const KernelArgs& a, const Row& row, Team& team,
                                        const Tiles<kHeld>& tiles, uint32_t t16, int32_t n) {
  CorruptionShares shares = {};
  if (kRanks > 1) shares = corruption_shares(a, row.seed, row.view, row.slot);
  const uint64_t share[kNumRanks] = {kProbabilityOne, shares.replace, shares.keep};
  if (is_exact(a, row.view)) {
    const int32_t k = exact_count(a, row.view, t16, n);
    int32_t ranks[kRanks] = {k};
#pragma unroll
    for (int j = 1; j < kRanks; ++j) ranks[j] = shares.of_count(share[j], k);
    return select_keys(tiles, team, ranks, n);
  }
  RowBounds<kRanks> bounds;
  const uint64_t ratio = view_ratio(a, row.view, t16);
#pragma unroll
  for (int j = 0; j < kRanks; ++j) bounds.bound[j] = (ratio * share[j] >> 31) << 32;
  return bounds;
}

// The row of a warp; an empty one behind the end of the batch.
template <int kRows>
__device__ Row row_of(const KernelArgs& a, const Team& team) {
  constexpr bool kDivided = kRows == kParts;
  Row row = {};
  row.b = static_cast<int64_t>(blockIdx.x) * a.shape.rows + team.row;
  const bool is_there = row.b < rows_of_batch<kDivided>(a);
  if (!is_there) row.b = 0;
  if constexpr (kRows != kWindows) {
    const Draw draw = draw_at<kDivided>(a, row.b);
    row = row_at<kDivided>(a, row.b, draw, 0);
    if (!is_there) row.stored = row.length = row.space = 0;
    row.slot = kDivided ? a.slot(draw) : a.slot(row.b);
  } else {
    row.length = is_there ? static_cast<int32_t>(a.windows.seq_len) : 0;
    row.stored = row.space = row.length;
    row.begin = row.b * row.length;
    row.slot = a.slot(row.b);
  }
  row.seed = seed_of(a);
  return row;  // whose start is not known yet
}

// The same, once the slots are there.
template <int kRows>
__device__ Row row_with_window(const KernelArgs& a, const Team& team) {
  Row row = row_of<kRows>(a, team);
  row.start = team.memory.start[team.row];
  return row;
}

// Rows that are rare, with tied bounds or outputs that cannot be stored in pairs. Functions of
// their own, which keep the code of all other rows short.
template <int kRanks, int kRows>
__device__ __attribute__((noinline)) uint32_t count_ranked(const KernelArgs& a, BlockMemory& memory,
                                                           RowBounds<kRanks> bounds) {
  const Team team(memory, a.shape);
  const Row row = row_with_window<kRows>(a, team);
  const RankedTiles<kRanks> tiles(a, row, team, bounds);
  return count_below(tiles, tiles.bounds().pivot(0));
}

template <int kRanks, int kRows>
__device__ __attribute__((noinline)) void write_ranked(const KernelArgs& a, BlockMemory& memory,
                                                       RowBounds<kRanks> bounds) {
  const Team team(memory, a.shape);
  const Row row = row_with_window<kRows>(a, team);
  RankedTiles<kRanks> tiles(a, row, team, bounds);
  write_row<false>(a, row, team, tiles, tiles.bounds());
}

template <int kHeld, int kRanks, int kRows>
__global__ void __launch_bounds__((max_warps(kHeld) + 1) * kWarp,
                                  min_blocks(kHeld, kRows == kParts))
    corrupt_kernel(const __grid_constant__ KernelArgs a) {
  NAR_SHARED(BlockMemory, memory);
  Team team(memory, a.shape);
  if (team.row == a.shape.rows) return lead_block<kRows == kParts>(a, memory);

  Row row = row_of<kRows>(a, team);
  Tiles<kHeld> tiles(a, row, team);
  sync_block();  // the slots are there
  row.start = memory.start[team.row];
  tiles.load_ahead();

  int32_t n = row.length;
  if (a.restricted) {
    uint32_t can_mask[1] = {tiles.exclude()};
    team.sum(can_mask);
    n = static_cast<int32_t>(can_mask[0]);
  }
  const auto bounds = row_bounds<kRanks>(a, row, team, tiles, memory.time[team.row], n);
  const bool tied = bounds.any_tied();

  const uint32_t num_masked =
      tied ? count_ranked<kRanks, kRows>(a, memory, bounds) : count_below(tiles, bounds.pivot(0));
  if (team.is_first()) memory.num_maskable[team.row] = static_cast<uint32_t>(n);
  if (team.lane == 0) memory.num_masked[team.first_warp + team.warp] = num_masked;
  sync_block();  // the counts of all warps are there
  sync_block();  // and those of the blocks before
  if (tied || (kRows == kWindows && !a.in_pairs)) {
    write_ranked<kRanks, kRows>(a, memory, bounds);
  } else {
    write_row<kRows == kWindows>(a, row, team, tiles, bounds);
  }
  if constexpr (kRows != kWindows) write_padding(a, row, team);
}

// Which warps take which tiles of a batch.
struct Work {
  Shape shape;
  int held;  // tiles in the registers of a warp; 0: none
};

int rows_of(const CorruptArgs& a) {
  if (a.view_times || !a.division.is_trivial()) return kParts;
  return a.windows.spans.begins ? kDocuments : kWindows;
}

// Other rows than windows have fewer kernels, each of which takes as long to compile.
bool has_kernel(int held, int rows) {
  return rows == kWindows || (held != 1 && held != kMostTiles);
}

// As many tiles a warp as leave enough warps to fill the device.
Work divide(int64_t batch, int64_t seq_len, int64_t warps_to_fill, int rows) {
  const int64_t tiles = (seq_len + kTile - 1) / kTile;
  const auto warps_of = [&](int held) { return (tiles + held - 1) / held; };
  const auto fits = [&](int held) { return warps_of(held) <= max_warps(held); };
  const auto fills = [&](int held) { return batch * warps_of(held) >= warps_to_fill; };
  int held = 0;
  for (const int more : {1, kFewTiles, kManyTiles}) {
    const bool is_better = held == 0 || (tiles > held && fills(more));
    if (fits(more) && is_better && has_kernel(more, rows)) held = more;
  }
  if (held == 0 && fits(kMostTiles) && has_kernel(kMostTiles, rows)) held = kMostTiles;
  if (held == 0) return {{1, kMaxWarps}, 0};
  const int warps = static_cast<int>(warps_of(held));
  return {{warps == 1 && fills(held) ? kMaxRows : 1, warps}, held};
}

// Warps that hide each other's latencies.
constexpr int64_t kWarpsPerProcessor = 16;

int64_t num_processors(int device) {
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
             "cudaDeviceGetAttribute");
  return count;
}

using Kernel = void (*)(KernelArgs);

template <int kRanks, int kRows>
Kernel kernel_of(int held) {
  if constexpr (kRows == kWindows) {
    if (held == 1) return corrupt_kernel<1, kRanks, kRows>;
    if (held == kMostTiles) return corrupt_kernel<kMostTiles, kRanks, kRows>;
  }
  switch (held) {
    case 0: return corrupt_kernel<0, kRanks, kRows>;
    case kFewTiles: return corrupt_kernel<kFewTiles, kRanks, kRows>;
    default: return corrupt_kernel<kManyTiles, kRanks, kRows>;
  }
}

template <int kRanks>
Kernel kernel_of(int held, int rows) {
  if (rows == kParts) return kernel_of<kRanks, kParts>(held);
  return rows == kDocuments ? kernel_of<kRanks, kDocuments>(held)
                            : kernel_of<kRanks, kWindows>(held);
}

// Bytes of an id, and the limit of valid ones as unsigned words: negative ones are large, and
// where the type is narrow and signed the limit may be less than the vocabulary.
void describe_ids(KernelArgs* a) {
  const auto of = [&](int bytes, int64_t most) {
    a->id_bytes = bytes;
    a->id_limit = static_cast<uint32_t>(std::min(a->windows.num_tokens, most));
  };
  switch (a->windows.token_type) {
    case TokenType::kUint8: return of(1, 1 << 8);
    case TokenType::kInt8: return of(1, 1 << 7);
    case TokenType::kUint16: return of(2, 1 << 16);
    case TokenType::kInt16: return of(2, 1 << 15);
    case TokenType::kUint32:
    case TokenType::kInt32: return of(4, INT32_MAX);
    case TokenType::kInt64: return of(8, INT32_MAX);
  }
}

bool stores_pairs(const CorruptArgs& a) {
  const auto aligned = [](const void* at, uintptr_t bytes) {
    return reinterpret_cast<uintptr_t>(at) % (2 * bytes) == 0;
  };
  const uintptr_t of_id = a.narrow ? 4 : 8;
  return a.windows.seq_len % 2 == 0 && aligned(a.input_ids, of_id) && aligned(a.labels, of_id) &&
         aligned(a.masked_indices, 1);
}

}  // namespace

void corrupt_cuda(const CorruptArgs& args, int device, cudaStream_t stream) {
  const int64_t draws = args.num_draws();
  check_cuda(cudaSetDevice(device), "cudaSetDevice");
  check_cuda(cudaMemsetAsync(args.invalid, 0, workspace_size(draws) * sizeof(int64_t), stream),
             "cudaMemsetAsync");
  if (draws == 0) return;
  const int rows = rows_of(args);
  const Work work =
      divide(draws, args.division.block_length, num_processors(device) * kWarpsPerProcessor, rows);
  KernelArgs a = {args, work.shape, 0, 0, stores_pairs(args), is_restricted(args)};
  describe_ids(&a);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>((draws + a.shape.rows - 1) / a.shape.rows));
  config.blockDim = dim3((a.shape.num_warps() + 1) * kWarp);
  config.stream = stream;
  const Kernel kernel = a.keep_share || a.random_share ? kernel_of<kNumRanks>(work.held, rows)
                                                       : kernel_of<1>(work.held, rows);
  check_cuda(cudaLaunchKernelEx(&config, kernel, a), "the launch of corrupt_kernel");
}

}  // namespace nar
