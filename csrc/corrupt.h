// `corrupt`: windows, validation, masks and labels. Arguments and entry points.
#pragma once

#include <cstdint>

#include "token_windows.h"

namespace nar {

struct CorruptArgs {
  // Inputs.
  Windows windows;
  const int64_t* sample_ids;    // [batch], or null: 0, 1, ...
  const uint8_t* maskable;      // [batch, seq_len] or null
  const uint32_t* ratio_table;  // [65536], 0.32 fixed point
  const float* weight_table;    // [65536]
  const uint8_t* never_mask;    // [num_tokens] or null
  uint64_t seed;
  int64_t global_batch;
  bool exact, stratified;
  uint64_t keep_share, random_share, coin_share;  // 2**31 stands for 1

  // Outputs.
  int64_t* input_ids;       // [batch, seq_len]
  int64_t* labels;          // [batch, seq_len]
  uint8_t* masked_indices;  // [batch, seq_len]
  float* times;             // [batch]
  float* loss_weight;       // [batch]
  int64_t* num_masked;      // [batch]
  int64_t* num_maskable;    // [batch]
  int64_t* row_buffer;      // [batch * seq_len]

  uint64_t sample(int64_t b) const { return static_cast<uint64_t>(sample_ids ? sample_ids[b] : b); }
};

// How many of n maskable positions an exact draw masks at time t16: ceil(m n), at least one.
static inline int64_t exact_count(const CorruptArgs& a, uint32_t t16, int64_t n) {
  const int64_t k = static_cast<int64_t>(
      (uint64_t{a.ratio_table[t16]} * static_cast<uint64_t>(n) + 0xFFFFFFFF) >> 32);
  return k > n ? n : k < 1 && n > 0 ? 1 : k;
}

// Memory for the rows of one thread.
struct RowScratch {
  uint32_t* keys;     // [seq_len, rounded up to kWordPadding]
  uint32_t* random;   // the same
  int32_t* clean;     // [seq_len]
  uint8_t* can_mask;  // [seq_len]
};

// One row b: all its outputs but the rows, which need the counts of the rows before.
using CorruptRow = void (*)(const CorruptArgs&, int64_t b, uint32_t t16, const RowScratch&,
                            InvalidTokens*);
// The masked positions of row b, as indices into [batch * seq_len].
using WriteRows = void (*)(const CorruptArgs&, int64_t b, int64_t* rows);

struct CorruptKernels {
  CorruptRow corrupt_row;
  WriteRows write_rows;
};

// One file an instruction set, the same source.
CorruptKernels corrupt_kernels_generic();
CorruptKernels corrupt_kernels_avx2();
CorruptKernels corrupt_kernels_avx512();

// The whole batch on up to num_threads threads. Throws std::out_of_range for a window outside the
// corpus.
InvalidTokens corrupt_cpu(const CorruptArgs& args, int num_threads);

}  // namespace nar
