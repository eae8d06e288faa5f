// `unmask` on the CPU: threads, choice of instruction set.
#include <algorithm>
#include <memory>

#include "cpu_features.h"
#include "parallel_for.h"
#include "unmask.h"

namespace nar {
namespace {

// What a thread takes at a time, at least: worth some 10 microseconds.
constexpr int64_t kLogitsPerChunk = 8192;

UnmaskRow kernel() {
  switch (simd_level()) {
#if defined(NAR_X86)
    case SimdLevel::kAvx512: return unmask_row_avx512();
    case SimdLevel::kAvx2: return unmask_row_avx2();
#endif
    default: return unmask_row_generic();
  }
}

}  // namespace

void unmask_cpu(const UnmaskArgs& a, int num_threads) {
  const UnmaskRow row = kernel();
  const int64_t padded = padded_row(a.vocabulary);
  const int64_t chunk = std::max<int64_t>(kLogitsPerChunk / std::max<int64_t>(padded, 1), 1);
  const int64_t num_chunks = (a.rows + chunk - 1) / chunk;
  num_threads =
      static_cast<int>(std::clamp<int64_t>(num_threads, 1, std::max<int64_t>(num_chunks, 1)));
  const std::unique_ptr<float[]> logits(new float[num_threads * padded]);
  const std::unique_ptr<int32_t[]> ids(new int32_t[num_threads * padded]);
  const std::unique_ptr<int16_t[]> upper(new int16_t[num_threads * padded]);
  parallel_for(num_chunks, num_threads, [&](int64_t c, int seat) {
    const UnmaskScratch scratch = {&logits[seat * padded], &ids[seat * padded],
                                   &upper[seat * padded]};
    for (int64_t r = c * chunk; r < std::min((c + 1) * chunk, a.rows); ++r) row(a, r, scratch);
  });
}

}  // namespace nar
