// `mask_tokens` on the CPU: threads.
#include <algorithm>
#include <memory>

#include "levels/kernels.h"
#include "mask_tokens/mask_tokens.h"
#include "rng/philox.h"
#include "runtime/parallel_for.h"

namespace nar {
namespace {

// Minimum work per chunk, some 10 microseconds.
constexpr int64_t kPositionsPerChunk = 16384;

}  // namespace

void mask_tokens_cpu(const MaskTokensArgs& a, int num_threads) {
  if (a.batch == 0 || a.length == 0) return;
  const MaskTokensRows mask_rows = kernels().mask_tokens_rows;
  const int64_t chunk = std::max<int64_t>(kPositionsPerChunk / a.length, 1);
  const int64_t num_chunks = (a.batch + chunk - 1) / chunk;
  num_threads = static_cast<int>(std::clamp<int64_t>(num_threads, 1, num_chunks));
  const int64_t scratch = a.length + kWordPadding;
  const std::unique_ptr<uint32_t[]> words(new uint32_t[num_threads * scratch]);
  parallel_for(num_chunks, num_threads, [&](int64_t c, int worker) {
    const int64_t end = std::min((c + 1) * chunk, a.batch);
    mask_rows(a, c * chunk, end, words.get() + worker * scratch);
  });
}

}  // namespace nar
