// `unmask` on the CPU: threads.
#include <algorithm>
#include <memory>

#include "levels/kernels.h"
#include "runtime/parallel_for.h"
#include "unmask/unmask.h"

namespace nar {
namespace {

// Minimum work per chunk, some 10 microseconds.
constexpr int64_t kLogitsPerChunk = 8192;

// Aligned to cache lines: no vector load or store straddles two.
struct alignas(64) CacheLine {
  unsigned char bytes[64];
};

template <typename T>
std::unique_ptr<CacheLine[]> lines_of(int64_t count) {
  constexpr int64_t kPerLine = sizeof(CacheLine) / sizeof(T);
  return std::unique_ptr<CacheLine[]>(new CacheLine[(count + kPerLine - 1) / kPerLine]);
}

}  // namespace

void unmask_cpu(const UnmaskArgs& a, int num_threads) {
  const UnmaskRow row = kernels().unmask_row;
  const int64_t padded = padded_row(a.vocabulary);
  const int64_t chunk = std::max<int64_t>(kLogitsPerChunk / std::max<int64_t>(padded, 1), 1);
  const int64_t num_chunks = (a.rows + chunk - 1) / chunk;
  num_threads =
      static_cast<int>(std::clamp<int64_t>(num_threads, 1, std::max<int64_t>(num_chunks, 1)));
  const int64_t size = padded + kRowPadding;
  const std::unique_ptr<CacheLine[]> logits = lines_of<float>(num_threads * size);
  const std::unique_ptr<CacheLine[]> ids = lines_of<int32_t>(num_threads * size);
  const std::unique_ptr<CacheLine[]> upper = lines_of<int16_t>(num_threads * size);
  parallel_for(num_chunks, num_threads, [&](int64_t c, int worker) {
    const UnmaskScratch scratch = {reinterpret_cast<float*>(logits.get()) + worker * size,
                                   reinterpret_cast<int32_t*>(ids.get()) + worker * size,
                                   reinterpret_cast<int16_t*>(upper.get()) + worker * size};
    for (int64_t r = c * chunk; r < std::min((c + 1) * chunk, a.rows); ++r) row(a, r, scratch);
  });
}

}  // namespace nar
