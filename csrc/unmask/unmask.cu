// `unmask` on the GPU: a block of threads a row, which it reads from memory once.
#include <algorithm>

#include "rng/philox.h"
#include "runtime/cuda_check.h"
#include "unmask/gpu/terms.h"
#include "unmask/gpu/top_k.h"
#include "unmask/unmask_cuda.h"

namespace nar {
namespace {

// What a thread, and then the block, finds in its columns.
struct Found {
  uint64_t exp = 0, exp_times_gap = 0;  // sums in units
  uint32_t num_largest = 0;
  float second = -INFINITY;  // the largest difference from the largest logit, below 0
  float score = -INFINITY;
  int token = INT32_MAX;

  __device__ void offer(float other, int column) {
    if (other > score || (other == score && column < token)) score = other, token = column;
  }
};

struct Sampler {
  const UnmaskKernelArgs& a;
  const RoundKeys keys;
  const uint64_t slot;
  const float largest;
  const bool has_noise;

  // Adds a column by its logit less the largest.
  __device__ void add_sums(float from_largest, Found* found) const {
    const float e = exp_of_negative(from_largest);
    found->exp += units(e);
    if (a.confidence_type == ConfidenceType::kEntropy) {
      found->exp_times_gap += units(e * fminf(-from_largest, 87.0f));
    }
    if (a.confidence_type == ConfidenceType::kMargin) {
      found->num_largest += from_largest == 0.0f;
      if (from_largest < 0.0f) found->second = fmaxf(found->second, from_largest);
    }
  }

  __device__ float score(float from_largest, uint32_t word) const {
    return has_noise ? from_largest * a.inverse_temperature + gumbel(word) : from_largest;
  }

  // Whether the score may be `best` or more.
  __device__ bool may_win(float from_largest, uint32_t word, float best) const {
    constexpr float kSlack =
        1e-6f;  // scores are rounded, and so is this: more where they are large
    return from_largest * (a.inverse_temperature * (1 - kSlack)) + gumbel_bound(word) >= best;
  }

  __device__ Words4 words(int block) const {
    return random_block(keys, kDecodeNoise, slot, static_cast<uint32_t>(block));
  }
};

// The score to beat: of any warp, as far as it has been told.
__device__ float best_so_far(const Block& block) {
  return *const_cast<volatile float*>(&block.memory.best);
}

__device__ void tell(Block& block, float score) {  // as a maximum of bits
  if (score > best_so_far(block)) {
    if (score >= 0.0f) {
      atomicMax(reinterpret_cast<int*>(&block.memory.best), __float_as_int(score));
    } else {
      atomicMin(reinterpret_cast<unsigned*>(&block.memory.best), bits_of_float(score));
    }
  }
}

// A first score to beat: that of a column with the largest logit, by the thread that has it.
template <typename T>
__device__ __attribute__((noinline)) void tell_first(const Row<T>& row, Block& block,
                                                     const Sampler& sampler) {
  for (int i = block.thread; i < row.num_vectors(); i += block.num_threads) {
    const Vector<T> vector = row.vector(i);
    for (int j = 0; j < Row<T>::kSize; ++j) {
      if (Row<T>::difference(vector[j], sampler.largest) != 0.0f) continue;
      const int column = i * Row<T>::kSize + j;
      return tell(block, sampler.score(0.0f, sampler.words(column / 4).word[column % 4]));
    }
  }
}

// All columns of the row. Noise is made exactly only for those that a cheap bound does not rule
// out.
template <typename T>
__device__ Found sample_all(const Row<T>& row, Block& block, const Sampler& sampler,
                            const TermTable* terms) {
  constexpr int kSize = Row<T>::kSize;
  const auto from_largest = [&](float logit) { return Row<T>::difference(logit, sampler.largest); };
  Found found;
  const int rounds = (row.num_vectors() + block.num_threads - 1) / block.num_threads;
  for (int round = 0; round < rounds; ++round) {
    const int i = round * block.num_threads + block.thread;
    Vector<T> x;
    if (i < row.num_vectors()) {
      x = row.vector(i);
    } else {
      x.fill(T::kNever);
    }
    if (T::kTabulates && terms) {
      if constexpr (T::kTabulates) found.exp += terms->sum(x, sampler.largest);
    } else {
#pragma unroll
      for (int j = 0; j < kSize; ++j) sampler.add_sums(from_largest(x[j]), &found);
    }
    if (!sampler.has_noise) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) found.offer(from_largest(x[j]), i * kSize + j);
      continue;
    }
    uint32_t word[kSize];
#pragma unroll
    for (int j = 0; j < kSize; j += 4) {
      const Words4 words = sampler.words((i * kSize + j) / 4);
#pragma unroll
      for (int k = 0; k < 4; ++k) word[j + k] = words.word[k];
    }
    float highest = x[0];
    uint32_t lowest = word[0];
#pragma unroll
    for (int j = 1; j < kSize; ++j) highest = fmaxf(highest, x[j]), lowest = min(lowest, word[j]);
    const float best = best_so_far(block);
    if (!__any_sync(kAllLanes, sampler.may_win(from_largest(highest), lowest, best))) continue;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const float one = from_largest(x[j]);
      if (!__any_sync(kAllLanes, sampler.may_win(one, word[j], best))) continue;
      found.offer(sampler.score(one, word[j]), i * kSize + j);
    }
    tell(block, found.score);
  }
  return found;
}

// Those that a filter keeps: few.
template <typename Columns>
__device__ Found sample_kept(const Columns& columns, const Sampler& sampler, const TopK& top) {
  Found found;
  columns.each([&](float x, int column) {
    if (!top.keeps(key_of(x), column)) return;
    const float from_largest = x - sampler.largest;
    sampler.add_sums(from_largest, &found);
    const uint32_t word = sampler.has_noise ? sampler.words(column / 4).word[column % 4] : 0;
    found.offer(sampler.score(from_largest, word), column);
  });
  return found;
}

// Of all threads.
__device__ Found combined(Found found, Block& block, ConfidenceType type) {
  found.exp = block.sum(found.exp);
  if (type == ConfidenceType::kEntropy) found.exp_times_gap = block.sum(found.exp_times_gap);
  if (type == ConfidenceType::kMargin) {
    found.num_largest = static_cast<uint32_t>(block.sum(found.num_largest));
    found.second = from_ordered(static_cast<uint32_t>(block.largest(ordered(found.second))));
  }
  // Of equal scores, -0 and 0 too, the first column.
  const uint64_t best = block.largest(uint64_t{ordered(found.score + 0.0f)} << 32 |
                                      ~static_cast<uint32_t>(found.token));
  found.score = from_ordered(static_cast<uint32_t>(best >> 32));
  found.token = static_cast<int>(~static_cast<uint32_t>(best));
  return found;
}

__device__ float confidence(const Found& found, float total, ConfidenceType type) {
  if (type == ConfidenceType::kEntropy) {
    return -(log_of_positive(total) + from_units(found.exp_times_gap) / total);
  }
  const float gap = found.num_largest > 1 ? 0.0f : found.second;
  return (1.0f - exp_of_negative(gap)) / total;
}

template <typename T, bool kSelects>
__global__ void __launch_bounds__(kMaxWarps* kWarp)
    unmask_kernel(const __grid_constant__ UnmaskKernelArgs a, bool holds) {
  NAR_DYNAMIC_SHARED(Vector<T>, held);
  __shared__ BlockMemory memory;
  Block block(memory);
  const int64_t index = blockIdx.x;
  const Row<T> row(a, index, holds ? held : nullptr);

  float thread_largest = -INFINITY;
  for (int i = block.thread; i < row.num_vectors(); i += block.num_threads) {
    thread_largest = fmaxf(thread_largest, row.read(i));
  }
  if (block.thread == 0) memory.best = -INFINITY;
  float largest = from_ordered(static_cast<uint32_t>(block.largest(ordered(thread_largest))));
  const bool allows_none = largest == -INFINITY;
  if (allows_none) largest = 0.0f;  // -inf - -inf would be NaN
  __syncthreads();                  // the score to beat is there

  const int64_t given = a.given ? a.given[index] : -1;
  const Sampler sampler = {a, RoundKeys(a.seed), static_cast<uint64_t>(a.noise_slots[index]),
                           largest, given < 0 && a.inverse_temperature > 0};
  Found found;
  TopK top;
  if constexpr (kSelects) {
    __shared__ Candidates candidates;
    const uint32_t k = static_cast<uint32_t>(a.top_k);
    int count = Candidates::kMost + 1;
    uint32_t reached = 0;
    if (k <= static_cast<uint32_t>(block.num_threads)) {
      reached = likely_key(block, thread_largest, k);
      count = collect(row, block, reached, candidates);
    }
    if (count <= Candidates::kMost) {
      const FewColumns few = {candidates, block, count};
      top = find_top_k(few, block, k);
      top.key = max(top.key, reached);  // columns that are no candidates are below that
      found = sample_kept(few, sampler, top);
    } else {
      const AllColumns<T> all = {row, block};
      top = find_top_k(all, block, k);
      found = sample_kept(all, sampler, top);
    }
  } else {
    if (sampler.has_noise && thread_largest == largest) tell_first(row, block, sampler);
    const TermTable* terms = nullptr;
    if constexpr (T::kTabulates) {
      __shared__ TermTable table;
      if (a.confidence_type == ConfidenceType::kProbability &&
          a.vocabulary >= 2 * TermTable::kEntries) {
        table.fill(block, largest);
        terms = &table;
      }
    }
    __syncthreads();
    found = sample_all(row, block, sampler, terms);
  }
  found = combined(found, block, a.confidence_type);
  if (block.thread != 0) return;

  const int64_t token = given >= 0 ? given : allows_none ? a.fallback : found.token;
  const float total = from_units(found.exp);
  float logit = row.logit(token);
  if (kSelects && !top.keeps(key_of(logit), static_cast<int>(token))) logit = -INFINITY;
  a.tokens[index] = token;
  a.log_prob[index] = allows_none ? -INFINITY : (logit - largest) - log_of_positive(total);
  if (a.confidence) {
    a.confidence[index] = allows_none ? -INFINITY : confidence(found, total, a.confidence_type);
  }
}

template <typename T>
void launch(const UnmaskKernelArgs& a, int device, cudaStream_t stream) {
  const int64_t vectors = (a.vocabulary + Vector<T>::kSize - 1) / Vector<T>::kSize;
  // A few vectors a thread.
  int threads = kWarp;
  while (threads < kMaxWarps * kWarp && threads * 8 < vectors) threads *= 2;
  auto* kernel = a.top_k < a.vocabulary ? unmask_kernel<T, true> : unmask_kernel<T, false>;

  int most = 0;
  check_cuda(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "cudaDeviceGetAttribute");
  const int64_t bytes = vectors * static_cast<int64_t>(sizeof(Vector<T>));
  constexpr int64_t kOther =
      sizeof(BlockMemory) + std::max(sizeof(Candidates), sizeof(TermTable)) + 1024;
  const bool holds = bytes + kOther <= most;
  if (holds) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(bytes)),
               "cudaFuncSetAttribute");
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(a.rows));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = holds ? static_cast<size_t>(bytes) : 0;
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, a, holds), "the launch of unmask_kernel");
}

}  // namespace

void unmask_cuda(const UnmaskArgs& args, GpuLogitType type, const int64_t* more_forbidden,
                 int device, cudaStream_t stream) {
  check_cuda(cudaSetDevice(device), "cudaSetDevice");
  if (args.rows == 0) return;
  UnmaskKernelArgs a = {};
  a.logits = args.logits, a.rows = args.rows, a.vocabulary = args.vocabulary;
  a.stride = args.stride;
  a.noise_slots = args.noise_slots, a.given = args.given;
  a.num_forbidden = static_cast<int>(args.num_forbidden);
  for (int i = 0; i < std::min(a.num_forbidden, kForbiddenArguments); ++i) {
    a.forbidden[i] = static_cast<int>(args.forbidden[i]);
  }
  a.more_forbidden = more_forbidden;
  a.fallback = args.fallback, a.seed = args.seed;
  a.top_k = std::min(args.top_k, args.vocabulary);
  a.inverse_temperature = args.inverse_temperature;
  a.confidence_type = args.confidence_type;
  a.tokens = args.tokens, a.log_prob = args.log_prob, a.confidence = args.confidence;
  switch (type) {
    case GpuLogitType::kFloat32: return launch<Float32>(a, device, stream);
    case GpuLogitType::kBfloat16: return launch<Bfloat16>(a, device, stream);
    case GpuLogitType::kFloat16: return launch<Float16>(a, device, stream);
  }
}

}  // namespace nar
