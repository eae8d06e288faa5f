// `corrupt` on the CPU: checks, threads, choice of instruction set.
#include "corrupt_cpu.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu_features.h"
#include "parallel_for.h"
#include "permutation.h"

namespace nar {
namespace {

// What a thread takes at a time: worth some 10 microseconds, more than it costs to share.
constexpr int64_t kTokensPerChunk = 4096;

CorruptKernels kernels() {
  switch (simd_level()) {
#if defined(NAR_X86)
    case SimdLevel::kAvx512: return corrupt_kernels_avx512();
    case SimdLevel::kAvx2: return corrupt_kernels_avx2();
#endif
    default: return corrupt_kernels_generic();
  }
}

void check_samples(const CorruptArgs& a) {
  for (int64_t b = 0; a.sample_ids && b < a.windows.batch; ++b) {
    if (a.sample_ids[b] < 0) {
      throw std::invalid_argument("sample id " + std::to_string(a.sample_ids[b]) +
                                  " is negative: slots count from 0");
    }
  }
}

// The 16-bit time of a sample slot.
class TimeDraw {
 public:
  explicit TimeDraw(const CorruptArgs& a) : a_(a) {}

  uint32_t operator()(uint64_t sample) {
    const uint32_t word = random_block(a_.seed, kTime, sample, 0).word[0];
    if (!a_.stratified) return word >> 16;
    const uint64_t global_batch = static_cast<uint64_t>(a_.global_batch);
    const uint64_t step = sample / global_batch;
    if (!strata_ || step != step_) {
      strata_ = std::make_unique<Permutation>(a_.seed, kStratum, step, global_batch);
      step_ = step;
    }
    const uint64_t stratum = (*strata_)(sample % global_batch);
    return stratified_time(stratum, word, global_batch);
  }

 private:
  const CorruptArgs& a_;
  std::unique_ptr<Permutation> strata_;
  uint64_t step_ = 0;
};

}  // namespace

void corrupt_cpu(const CorruptArgs& args, int num_threads) {
  CorruptArgs a = args;
  if (a.seed_tensor) a.seed = *a.seed_tensor;
  const int64_t batch = a.windows.batch, seq_len = a.windows.seq_len;
  check_windows(a.windows);
  check_samples(a);
  const CorruptKernels k = kernels();
  const int64_t chunk = std::max<int64_t>(kTokensPerChunk / seq_len, 1);
  const int64_t num_chunks = (batch + chunk - 1) / chunk;
  num_threads =
      static_cast<int>(std::clamp<int64_t>(num_threads, 1, std::max<int64_t>(num_chunks, 1)));

  std::vector<uint32_t> t16(batch);
  TimeDraw draw_time(a);
  for (int64_t b = 0; b < batch; ++b) t16[b] = draw_time(a.sample(b));

  constexpr int64_t kAlign = 64;
  const int64_t padded = (seq_len + kWordPadding - 1) / kWordPadding * kWordPadding;
  const int64_t bytes = padded * (3 * sizeof(uint32_t) + 1);
  std::unique_ptr<uint8_t[]> memory(new uint8_t[num_threads * bytes + kAlign]);
  uint8_t* aligned =
      memory.get() + (kAlign - reinterpret_cast<uintptr_t>(memory.get()) % kAlign) % kAlign;
  std::vector<InvalidTokens> invalid(num_threads);

  // Where the masked rows of b begin, if the counts are known before anything is drawn.
  const bool counts_known = a.exact && !a.maskable && !a.never_mask;
  std::vector<int64_t> first_row(batch + 1, 0);
  for (int64_t b = 0; counts_known && b < batch; ++b) {
    first_row[b + 1] = first_row[b] + exact_count(a, t16[b], seq_len);
  }

  parallel_for(num_chunks, num_threads, [&](int64_t c, int seat) {
    uint8_t* base = aligned + seat * bytes;
    uint32_t* words = reinterpret_cast<uint32_t*>(base);
    const RowScratch scratch = {words, words + padded,
                                reinterpret_cast<int32_t*>(words + 2 * padded),
                                base + 3 * sizeof(uint32_t) * padded};
    for (int64_t b = c * chunk; b < std::min((c + 1) * chunk, batch); ++b) {
      k.corrupt_row(a, b, t16[b], scratch, &invalid[seat]);
      if (counts_known) k.write_rows(a, b, a.row_buffer + first_row[b]);
    }
  });

  if (!counts_known) {
    for (int64_t b = 0; b < batch; ++b) first_row[b + 1] = first_row[b] + a.num_masked[b];
    parallel_for(num_chunks, num_threads, [&](int64_t c, int) {
      for (int64_t b = c * chunk; b < std::min((c + 1) * chunk, batch); ++b) {
        k.write_rows(a, b, a.row_buffer + first_row[b]);
      }
    });
  }

  for (int seat = 1; seat < num_threads; ++seat) invalid[0].merge(invalid[seat]);
  write_record(invalid[0], a.invalid);
  a.invalid[3] = a.invalid[4] = 0;  // bad rows have thrown
}

}  // namespace nar
