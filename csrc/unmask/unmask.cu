// `unmask` on the GPU in one launch, a block a row or, for short rows, a warp. The row is read once
// and held in shared memory, as far as it fits.
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "runtime/cuda_check.h"
#include "runtime/shared_memory.h"
#include "unmask/gpu/row.h"
#include "unmask/gpu/sample.h"
#include "unmask/gpu/sums.h"
#include "unmask/gpu/top_k.h"
#include "unmask/gpu/top_p.h"
#include "unmask/unmask_cuda.h"

namespace nar {
namespace {

constexpr unsigned kRowsPerBlock = 4;  // of those that take a single warp

// The column of the first of the largest logits.
template <typename Row>
__device__ uint32_t find_first_largest(const Row& row, const typename Row::Warps& team,
                                       float largest, float largest_of_lane) {
  using L = typename Row::L;
  if (__any_sync(kAllLanes, largest_of_lane == largest)) {
    for (uint32_t i = 0;; ++i) {
      const Chunk c = row.chunk(i, row.column(i));
      const bool has_it = clean(L::largest(c)) == largest;
      const uint32_t lanes = __ballot_sync(kAllLanes, has_it);
      if (!lanes) continue;
      if (static_cast<int>(team.lane) == __ffs(lanes) - 1) {
        int item = L::kItems;
#pragma unroll
        for (int j = L::kItems - 1; j >= 0; --j) item = clean(L::item(c, j)) == largest ? j : item;
        atomicMin(&team.memory->first_largest, row.column(i) + item);
      }
      break;
    }
  }
  team.sync();
  return team.memory->first_largest;
}

// Calls take(chunk, column, gap) for the chunks of a warp, without what is not kept. `gap` is that
// of the largest logit; chunks that keep nothing down to the lowest gap are passed over.
template <typename Row, typename Take>
__device__ void each_kept(const Row& row, const Filter<typename Row::L>* filter, float largest,
                          float lowest_gap, Take take) {
  uint32_t column = row.column(0);
  for (uint32_t i = 0; i < row.num_tiles(); ++i, column += Row::kTile) {
    Chunk c = row.chunk(i, column);
    if (filter) c = filter->kept(column, c);
    const float gap = Row::L::largest(c) - largest;
    if (filter && !__any_sync(kAllLanes, gap >= lowest_gap)) continue;
    take(c, column, gap);
  }
}

// exp of the gap between the largest and the second-largest logit.
template <typename Row>
__device__ float exp_of_second(const Row& row, typename Row::Warps& team,
                               const Filter<typename Row::L>* filter, float largest) {
  using L = typename Row::L;
  float second = -INFINITY;
  uint32_t ties = 0;
  each_kept(row, filter, largest, -INFINITY, [&](const Chunk& c, uint32_t, float) {
#pragma unroll
    for (int j = 0; j < L::kItems; ++j) {
      const float x = clean(L::item(c, j));
      if (x < largest) second = fmaxf(second, x);
      ties += x == largest;
    }
  });
  second = team.largest(second);
  if (team.sum(ties) > 1) return 1;
  return exp_of_negative(second - largest);
}

// The logit of any id; -inf unless it is kept.
template <typename Row>
__device__ float kept_logit(const Row& row, const TopK& top, int64_t id) {
  if (id >= row.vocabulary()) return -INFINITY;
  const uint32_t column = static_cast<uint32_t>(id);
  if (row.forbids(column)) return -INFINITY;
  const float logit = row.at(column);
  return top.keeps(Row::L::key(logit), column) ? logit : -INFINITY;
}

__device__ void write(const UnmaskArgs& a, int64_t r, int64_t token, float log_prob,
                      float confidence) {
  a.tokens[r] = token;
  a.log_prob[r] = log_prob;
  if (a.confidence) a.confidence[r] = confidence;
}

template <typename T, Mapping kMapping, bool kTopP>
__device__ void unmask_row(const UnmaskLaunch& p, int64_t r, Team<kMapping>& team) {
  using L = Logits<T>;
  using RowOfT = Row<T, kMapping>;
  const UnmaskArgs& a = p.args;
  unsigned char* scratch = reinterpret_cast<unsigned char*>(team.memory + 1);
  RowOfT row(p, r, team, reinterpret_cast<Chunk*>(scratch + p.scratch));
  const float largest_of_lane = row.load();
  const float largest = team.largest(largest_of_lane);
  const int64_t given = a.given ? a.given[r] : -1;  // -1: the token is drawn
  if (largest == -INFINITY) {
    if (team.thread() == 0) write(a, r, given >= 0 ? given : a.fallback, -INFINITY, -INFINITY);
    return;
  }

  TopK top = {};
  const bool selects = a.top_k < a.vocabulary;
  if (selects) {
    top = TopKSearch<RowOfT>(row, team, largest, static_cast<uint32_t>(a.top_k)).find();
  }
  if constexpr (kTopP) {
    const Filter<L> of_top_k(top, team.memory);
    const float scale = a.inverse_temperature > 0 ? a.inverse_temperature : 1;
    const uint32_t size =
        NucleusSearch<RowOfT>(row, team, selects ? &of_top_k : nullptr, largest, scale)
            .size(a.top_p);
    if (team.thread() == 0) team.memory->num_listed = 0;
    team.sync();
    top = TopKSearch<RowOfT>(row, team, largest, size).find();
  }
  const Filter<L> filter_of_top(top, team.memory);
  const Filter<L>* filter = kTopP || selects ? &filter_of_top : nullptr;
  // Infinity stands for the largest float, which is no bfloat16.
  constexpr bool kCanHaveTable = std::is_same_v<T, __nv_bfloat16> && kMapping != Mapping::kWarp;
  const bool has_table = kCanHaveTable && p.has_table && largest < kLargestFloat;
  ExpTable table = {reinterpret_cast<uint32_t*>(scratch) + ExpTable::kSize, 0};
  if (has_table) table.build(team, largest);
  uint32_t column = find_first_largest(row, team, largest, largest_of_lane);
  Sampler<L> sampler(p, static_cast<uint64_t>(a.noise_slots[r]), largest, team.memory);
  const bool samples = given < 0 && a.inverse_temperature > 0;
  float lowest_gap = -26.0f;  // exp(-26) * 26 is less than half a unit of the sums
  if (samples) {
    if (team.thread() == 0) sampler.start(column);
    team.sync();
    lowest_gap = fminf(lowest_gap, sampler.lowest_gap());
  }

  const bool is_entropy = a.confidence && a.confidence_type == ConfidenceType::kEntropy;
  Sums sums;
  const auto pass = [&](auto add_to_sums) {
    each_kept(row, filter, largest, lowest_gap, [&](const Chunk& c, uint32_t at, float gap) {
      add_to_sums(c, at);
      if (samples) sampler.add(c, at, gap, team.lane);
    });
  };
  if constexpr (kCanHaveTable) {
    if (has_table) pass([&](const Chunk& c, uint32_t at) { sums.add(table, c, row, at, largest); });
  }
  if (!has_table) {
    pass([&](const Chunk& c, uint32_t) { sums.template add<L>(c, largest, is_entropy); });
  }
  const float sum = from_units(team.sum(sums.exp));
  const float log_of_sum = log_of_positive(sum);
  if (samples) column = sampler.best_column(team);

  float confidence = 0;
  if (is_entropy) {
    confidence = -(log_of_sum + from_units(team.sum(sums.exp_times_gap)) / sum);
  } else if (a.confidence) {
    confidence = (1.0f - exp_of_second(row, team, filter, largest)) / sum;
  }
  if (team.thread() != 0) return;
  const float logit = given < 0 ? row.at(column) : kept_logit(row, top, given);
  write(a, r, given < 0 ? column : given, (logit - largest) - log_of_sum, confidence);
}

template <typename T, Mapping kMapping, bool kTopP>
__global__ void __launch_bounds__(kMaxWarps* kWarp)
    unmask_kernel(const __grid_constant__ UnmaskLaunch p) {
  int64_t r = blockIdx.x;
  NAR_DYNAMIC_SHARED(unsigned char, shared);
  if (kMapping == Mapping::kWarp) {
    r = r * kRowsPerBlock + threadIdx.y;
    shared += threadIdx.y * p.bytes;
  }
  if (r >= p.args.rows) return;  // a warp on its own
  Team<kMapping> team = {reinterpret_cast<RowMemory*>(shared), threadIdx.x / kWarp,
                         threadIdx.x % kWarp};
  if (team.warp == 0) {
    team.memory->is_unusual[team.lane] = 0;
    team.memory->first_largest = kNoColumn;
    team.memory->num_listed = 0;
  }
  team.sync();
  unmask_row<T, kMapping, kTopP>(p, r, team);
}

// How many warps take a row.
struct Division {
  void (*kernel)(UnmaskLaunch);
  unsigned warps, rows_per_block;
};

int64_t attribute_of(int device, cudaDeviceAttr attribute) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

template <typename T, bool kTopP>
Division divide(int device, UnmaskLaunch* p) {
  constexpr int64_t kTilesOfWarp = 4;
  constexpr int64_t kWorthTable = 8192;  // logits
  constexpr int64_t kTileBytes = sizeof(Chunk) * kWarp;
  const UnmaskArgs& a = p->args;
  const int64_t tiles =
      (a.vocabulary + Row<T, Mapping::kBlock>::kTile - 1) / Row<T, Mapping::kBlock>::kTile;
  const bool is_entropy = a.confidence && a.confidence_type == ConfidenceType::kEntropy;
  p->has_table = std::is_same_v<T, __nv_bfloat16> && a.vocabulary >= kWorthTable && !is_entropy;
  p->held_tiles = static_cast<uint32_t>(tiles);
  p->scratch = std::max(p->has_table ? ExpTable::kBytes : 0,
                        kTopP || a.top_k < a.vocabulary ? LogitList::kBytes : 0);
  const int64_t fixed = sizeof(RowMemory) + p->scratch;
  p->bytes = static_cast<uint32_t>(fixed + tiles * kTileBytes);
  if (tiles <= kTilesOfWarp) return {unmask_kernel<T, Mapping::kWarp, kTopP>, 1, kRowsPerBlock};

  const int64_t warps = (tiles + kTilesOfWarp - 1) / kTilesOfWarp;
  const int64_t most = attribute_of(device, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int64_t half = attribute_of(device, cudaDevAttrMaxSharedMemoryPerMultiprocessor) / 2 -
                       attribute_of(device, cudaDevAttrReservedSharedMemoryPerBlock);
  if (fixed + tiles * kTileBytes <= std::min(half, most)) {  // two rows a multiprocessor
    const unsigned enough = static_cast<unsigned>(std::min<int64_t>(warps, kMaxWarps / 2));
    return {unmask_kernel<T, Mapping::kBlock, kTopP>, enough, 1};
  }
  const int64_t held = std::clamp<int64_t>((most - fixed) / kTileBytes, 0, tiles);
  p->held_tiles = static_cast<uint32_t>(held);
  p->bytes = static_cast<uint32_t>(fixed + held * kTileBytes);
  if (held == tiles) return {unmask_kernel<T, Mapping::kBlock, kTopP>, kMaxWarps, 1};
  return {unmask_kernel<T, Mapping::kPart, kTopP>, kMaxWarps, 1};
}

template <typename T>
Division divide(int device, UnmaskLaunch* p) {
  return p->args.top_p < kWhole ? divide<T, true>(device, p) : divide<T, false>(device, p);
}

Division divide(GpuLogitType type, int device, UnmaskLaunch* p) {
  switch (type) {
    case GpuLogitType::kFloat32: return divide<float>(device, p);
    case GpuLogitType::kBfloat16: return divide<__nv_bfloat16>(device, p);
    default: return divide<__half>(device, p);
  }
}

}  // namespace

void unmask_cuda(const UnmaskArgs& args, GpuLogitType type, const int64_t* more_forbidden,
                 int device, cudaStream_t stream) {
  check_cuda(cudaSetDevice(device), "cudaSetDevice");
  if (args.rows == 0) return;
  UnmaskLaunch p = {args, RoundKeys(args.seed), {}, more_forbidden, 0, 0, 0, false};
  p.args.forbidden = nullptr;  // on the host
  for (int64_t f = 0; f < std::min<int64_t>(args.num_forbidden, kForbiddenArguments); ++f) {
    p.forbidden[f] = static_cast<int32_t>(args.forbidden[f]);
  }
  const Division division = divide(type, device, &p);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(
      static_cast<unsigned>((args.rows + division.rows_per_block - 1) / division.rows_per_block));
  config.blockDim = dim3(division.warps * kWarp, division.rows_per_block);
  config.dynamicSmemBytes = size_t{division.rows_per_block} * p.bytes;
  config.stream = stream;
  // Always the most that there is: another thread may be about to launch the same kernel with more.
  const int most = static_cast<int>(attribute_of(device, cudaDevAttrMaxSharedMemoryPerBlockOptin));
  check_cuda(
      cudaFuncSetAttribute(division.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
      "cudaFuncSetAttribute");
  check_cuda(cudaLaunchKernelEx(&config, division.kernel, p), "the launch of unmask_kernel");
}

}  // namespace nar
