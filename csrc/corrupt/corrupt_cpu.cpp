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
constexpr int64_t kTokensPerRow = 16;     // that take as long as what a row takes beside its own
constexpr int64_t kKeysPerChunk = 16384;  // when keys are only counted

void check_sample(const CorruptArgs& a, int64_t row) {
  const int64_t sample = static_cast<int64_t>(a.slot(row)), blocks = a.division.blocks_per_slot;
  if (sample < 0) {
    throw std::invalid_argument("sample id " + std::to_string(sample) +
                                " is negative: slots count from 0");
  }
  if (sample >= INT64_MAX / blocks) {
    throw std::invalid_argument("sample id " + std::to_string(sample) + " is too large: with " +
                                std::to_string(blocks) + " blocks a sample it must be less than " +
                                std::to_string(INT64_MAX / blocks));
  }
}

void check_samples(const CorruptArgs& a) {
  const int64_t last = a.windows.batch - 1;
  if (last >= 0 && !a.sample_ids) check_sample(a, 0), check_sample(a, last);  // they ascend
  for (int64_t row = 0; a.sample_ids && row <= last; ++row) check_sample(a, row);
}

std::vector<uint32_t> all_times(const CorruptArgs& a, int num_threads) {
  const int64_t of_view = a.windows.batch * a.division.num_blocks;
  const bool is_paired = a.division.pairing != Pairing::kIndependent;  // one time for all views
  const int64_t num_chunks = (of_view + kDrawsAtOnce - 1) / kDrawsAtOnce;
  std::vector<uint32_t> t16(a.num_draws());
  parallel_for((is_paired ? 1 : a.division.views) * num_chunks, num_threads, [&](int64_t c, int) {
    const int64_t at = c % num_chunks * kDrawsAtOnce, first = c / num_chunks * of_view + at;
    kernels().corrupt.draw_times(a, first, std::min(of_view - at, kDrawsAtOnce), &t16[first]);
  });
  for (int64_t v = 1; is_paired && v < a.division.views; ++v) {
    std::copy(t16.begin(), t16.begin() + of_view, t16.begin() + v * of_view);
  }
  return t16;
}

}  // namespace

void count_masked(const CorruptArgs& a, int64_t* counts, int num_threads) {
  check_samples(a);
  const CorruptKernels& k = kernels().corrupt;
  const std::vector<uint32_t> t16 = all_times(a, num_threads);
  const int64_t work = a.exact ? 1 : std::max<int64_t>(a.windows.seq_len, 1);
  const int64_t chunk = (kKeysPerChunk + work - 1) / work, rows = num_rows(a);
  parallel_for((rows + chunk - 1) / chunk, num_threads, [&](int64_t c, int) {
    const int64_t end = std::min((c + 1) * chunk, rows);
    for (int64_t r = c * chunk; r < end; ++r) {
      counts[r] = k.count_row(a, r, t16.data() + r * a.division.num_blocks);
    }
  });
}

void corrupt_cpu(const CorruptArgs& args, int num_threads) {
  CorruptArgs a = args;
  if (a.seed_tensor) a.seed = *a.seed_tensor;
  const int64_t seq_len = a.windows.seq_len;
  check_samples(a);
  const CorruptKernels& k = kernels().corrupt;
  std::vector<int64_t> starts;
  if (a.order.num_windows) {
    starts = k.ordered_starts(a);
    a.windows.starts = starts.data();
  }
  check_windows(a.windows);
  const int64_t rows = num_rows(a), num_blocks = a.division.num_blocks;
  const int64_t positions = a.division.views * a.windows.num_positions();
  const int64_t work = std::max<int64_t>(positions + kTokensPerRow * rows, 1);
  const int64_t chunk = std::max<int64_t>((kTokensPerChunk * rows + work - 1) / work, 1);
  const int64_t num_chunks = (rows + chunk - 1) / chunk;
  num_threads =
      static_cast<int>(std::clamp<int64_t>(num_threads, 1, std::max<int64_t>(num_chunks, 1)));

  const std::vector<uint32_t> t16 = all_times(a, num_threads);

  constexpr int64_t kAlign = 64;
  const auto padded_to = [](int64_t n) {
    return (n + kWordPadding - 1) / kWordPadding * kWordPadding;
  };
  const int64_t padded = padded_to(seq_len);
  const int64_t num_words = padded_to(num_blocks * ((a.division.block_length + 3) / 4 * 4));
  const int64_t num_groups = num_blocks == 1 ? 0 : num_words / 4;
  std::vector<uint64_t> groups(2 * num_groups);
  const BlockCounters counters = {num_groups, groups.data(), groups.data() + num_groups};
  if (num_groups) k.count_blocks(a.division, num_groups, groups.data(), groups.data() + num_groups);
  const int64_t of_words = num_groups && a.division.block_length % 4 ? num_words : 0;
  const int64_t of_labels = a.labels ? 0 : padded * (a.narrow ? 4 : 8);
  const bool has_runs = a.windows.runs.count || a.loss_mask.runs.count;  // which are gathered
  const int64_t of_window = has_runs ? padded * size_of(a.windows.token_type) : 0;
  const int64_t bytes = (2 * padded + of_words) * sizeof(uint32_t) +
                        padded * (sizeof(int16_t) + 2) + kAlign + of_labels + of_window;
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
  std::vector<int64_t> first_row(rows + 1, 0);
  for (int64_t r = 0; counts_known && a.row_buffer && r < rows; ++r) {
    first_row[r + 1] = first_row[r] + k.count_row(a, r, t16.data() + r * num_blocks);
  }

  // Row indices of r; the space up to those of `end` may be overwritten.
  const auto write_rows = [&](int64_t r, int64_t end, const uint8_t* masked) {
    if (a.masked_indices) masked = a.masked_indices + Row(a, r).span.begin;
    k.write_rows(a, r, masked, first_row[r], first_row[end] - first_row[r]);
  };

  parallel_for(num_chunks, num_threads, [&](int64_t c, int worker) {
    uint32_t* keys = reinterpret_cast<uint32_t*>(aligned + worker * bytes);
    uint32_t* words = keys + padded;
    int32_t* clean = reinterpret_cast<int32_t*>(words + of_words);
    int16_t* upper = reinterpret_cast<int16_t*>(clean + padded);
    uint8_t* can_mask = reinterpret_cast<uint8_t*>(upper + padded) + kAlign;  // kTilePadding
    uint8_t* labels = can_mask + 2 * padded;
    const RowScratch scratch = {
        keys, words, clean, upper, can_mask, can_mask + padded, labels, labels + of_labels};
    const int64_t end = std::min((c + 1) * chunk, rows);
    for (int64_t r = c * chunk; r < end; ++r) {
      const uint32_t* times = t16.data() + r * num_blocks;
      k.corrupt_row(a, r, times, counters, scratch, &invalid[worker]);
      if (a.row_buffer && counts_known) write_rows(r, end, scratch.masked);
    }
  });

  if (a.row_buffer && !counts_known) {
    for (int64_t r = 0; r < rows; ++r) {
      first_row[r + 1] = first_row[r];
      for (int64_t j = 0; j < num_blocks; ++j) {
        first_row[r + 1] += a.num_masked[r * num_blocks + j];
      }
    }
    parallel_for(num_chunks, num_threads, [&](int64_t c, int) {
      const int64_t end = std::min((c + 1) * chunk, rows);
      for (int64_t r = c * chunk; r < end; ++r) write_rows(r, end, nullptr);
    });
  }

  for (int worker = 1; worker < num_threads; ++worker) invalid[0].merge(invalid[worker]);
  // The views of a sample have the same ids, which count once.
  invalid[0].count /= a.division.views;
  write_record(invalid[0], a.invalid);
  a.invalid[3] = a.invalid[4] = 0;  // bad rows have thrown
}

}  // namespace nar
