// `corrupt` on the CPU: checks, threads.
#include "corrupt/corrupt_cpu.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "levels/kernels.h"
#include "runtime/parallel_for.h"

namespace nar {
namespace {

// Work per chunk: some 10 microseconds, well above the cost of scheduling it.
constexpr int64_t kTokensPerChunk = 4096;
constexpr int64_t kKeysPerChunk = 16384;  // when keys are only counted

void check_samples(const CorruptArgs& a) {
  for (int64_t b = 0; b < a.windows.batch; ++b) {
    const int64_t sample = static_cast<int64_t>(a.sample(b));
    if (sample < 0) {
      throw std::invalid_argument("sample id " + std::to_string(sample) +
                                  " is negative: slots count from 0");
    }
    if (!a.sample_ids) return;  // they ascend
  }
}

}  // namespace

void count_masked(const CorruptArgs& a, int64_t* counts, int num_threads) {
  check_samples(a);
  const CorruptKernels& k = kernels().corrupt;
  const std::vector<uint32_t> t16 = k.draw_times(a);
  const int64_t work = a.exact ? 1 : std::max<int64_t>(a.windows.seq_len, 1);
  const int64_t chunk = (kKeysPerChunk + work - 1) / work;
  const int64_t num_chunks = (a.windows.batch + chunk - 1) / chunk;
  parallel_for(num_chunks, num_threads, [&](int64_t c, int) {
    const int64_t end = std::min((c + 1) * chunk, a.windows.batch);
    for (int64_t b = c * chunk; b < end; ++b) counts[b] = k.count_row(a, b, t16[b]);
  });
}

void corrupt_cpu(const CorruptArgs& args, int num_threads) {
  CorruptArgs a = args;
  if (a.seed_tensor) a.seed = *a.seed_tensor;
  const int64_t batch = a.windows.batch, seq_len = a.windows.seq_len;
  check_samples(a);
  const CorruptKernels& k = kernels().corrupt;
  std::vector<int64_t> starts;
  if (a.order.num_windows) {
    starts = k.ordered_starts(a);
    a.windows.starts = starts.data();
  }
  check_windows(a.windows);
  const int64_t positions = a.windows.num_positions();
  const int64_t chunk =
      std::max<int64_t>(kTokensPerChunk * batch / std::max<int64_t>(positions, 1), 1);
  const int64_t num_chunks = (batch + chunk - 1) / chunk;
  num_threads =
      static_cast<int>(std::clamp<int64_t>(num_threads, 1, std::max<int64_t>(num_chunks, 1)));

  const std::vector<uint32_t> t16 = k.draw_times(a);

  constexpr int64_t kAlign = 64;
  const int64_t padded = (seq_len + kWordPadding - 1) / kWordPadding * kWordPadding;
  const int64_t of_labels = a.labels ? 0 : padded * (a.narrow ? 4 : 8);
  const bool has_runs = a.windows.runs.count || a.loss_mask.runs.count;  // which are gathered
  const int64_t of_window = has_runs ? padded * size_of(a.windows.token_type) : 0;
  const int64_t bytes =
      padded * (2 * sizeof(uint32_t) + sizeof(int16_t) + 2) + of_labels + of_window;
  std::unique_ptr<uint8_t[]> memory(new uint8_t[num_threads * bytes + kAlign]);
  uint8_t* aligned =
      memory.get() + (kAlign - reinterpret_cast<uintptr_t>(memory.get()) % kAlign) % kAlign;
  std::vector<InvalidTokens> invalid(num_threads);

  // Prefix sums of the counts, where those are known before anything is drawn. Otherwise row
  // indices are written at the end, from the masks of all rows.
  const bool counts_known = a.exact && !is_restricted(a);
  std::unique_ptr<uint8_t[]> masks;
  if (a.row_buffer && !counts_known && !a.masked_indices) {
    masks.reset(new uint8_t[positions]);
    a.masked_indices = masks.get();
  }
  std::vector<int64_t> first_row(batch + 1, 0);
  for (int64_t b = 0; counts_known && b < batch; ++b) {
    first_row[b + 1] = first_row[b] + exact_count(a, t16[b], a.windows.span(b).length);
  }

  // Row indices of b; the space up to those of `end` may be overwritten.
  const auto write_rows = [&](int64_t b, int64_t end, const uint8_t* masked) {
    if (a.masked_indices) masked = a.masked_indices + a.windows.span(b).begin;
    k.write_rows(a, b, masked, first_row[b], first_row[end] - first_row[b]);
  };

  parallel_for(num_chunks, num_threads, [&](int64_t c, int worker) {
    uint32_t* keys = reinterpret_cast<uint32_t*>(aligned + worker * bytes);
    int32_t* clean = reinterpret_cast<int32_t*>(keys + padded);
    int16_t* upper = reinterpret_cast<int16_t*>(clean + padded);
    uint8_t* can_mask = reinterpret_cast<uint8_t*>(upper + padded);
    uint8_t* labels = can_mask + 2 * padded;
    const RowScratch scratch = {
        keys, clean, upper, can_mask, can_mask + padded, labels, labels + of_labels};
    const int64_t end = std::min((c + 1) * chunk, batch);
    for (int64_t b = c * chunk; b < end; ++b) {
      k.corrupt_row(a, b, t16[b], scratch, &invalid[worker]);
      if (a.row_buffer && counts_known) write_rows(b, end, scratch.masked);
    }
  });

  if (a.row_buffer && !counts_known) {
    for (int64_t b = 0; b < batch; ++b) first_row[b + 1] = first_row[b] + a.num_masked[b];
    parallel_for(num_chunks, num_threads, [&](int64_t c, int) {
      const int64_t end = std::min((c + 1) * chunk, batch);
      for (int64_t b = c * chunk; b < end; ++b) write_rows(b, end, nullptr);
    });
  }

  for (int worker = 1; worker < num_threads; ++worker) invalid[0].merge(invalid[worker]);
  write_record(invalid[0], a.invalid);
  a.invalid[3] = a.invalid[4] = 0;  // bad rows have thrown
}

}  // namespace nar
