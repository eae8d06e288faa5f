// The loss of rows of logits on the CPU: threads.
#include <algorithm>
#include <memory>

#include "levels/kernels.h"
#include "nll/nll.h"
#include "runtime/parallel_for.h"

namespace nar {
namespace {

// Minimum work per chunk, some 10 microseconds.
constexpr int64_t kLogitsPerChunk = 16384;

}  // namespace

void nll_cpu(const NllArgs& a, int num_threads) {
  const NllRow row = kernels().nll_row;
  const int64_t chunk = std::max<int64_t>(kLogitsPerChunk / std::max<int64_t>(a.vocabulary, 1), 1);
  const int64_t num_chunks = (a.rows + chunk - 1) / chunk;
  num_threads =
      static_cast<int>(std::clamp<int64_t>(num_threads, 1, std::max<int64_t>(num_chunks, 1)));
  const int64_t scratch = a.logit_type == LogitType::kFloat32 ? 0 : a.vocabulary;
  const std::unique_ptr<float[]> memory(new float[num_threads * scratch]);
  parallel_for(num_chunks, num_threads, [&](int64_t c, int worker) {
    for (int64_t r = c * chunk; r < std::min((c + 1) * chunk, a.rows); ++r) {
      row(a, r, memory.get() + worker * scratch);
    }
  });
}

}  // namespace nar
