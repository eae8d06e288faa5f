// `corrupt` on the CPU: its kernels, which are compiled once per instruction set, and the whole
// batch.
#pragma once

#include <vector>

#include "corrupt/corrupt.h"

namespace nar {

// Scratch memory of one thread.
struct RowScratch {
  uint32_t* keys;     // [seq_len, rounded up to kWordPadding]
  int32_t* clean;     // [seq_len]
  int16_t* upper;     // [seq_len]
  uint8_t* can_mask;  // [seq_len]
  // In place of outputs that are not wanted.
  uint8_t* masked;  // [seq_len]
  void* labels;     // [seq_len]
  void* window;     // [seq_len] of the corpus's type, if that or its loss mask lies in runs
};

// Row b: all outputs but its row indices, whose place depends on the counts of the rows before.
using CorruptRow = void (*)(const CorruptArgs&, int64_t b, uint32_t t16, const RowScratch&,
                            InvalidTokens*);
// The masked positions of row b, as indices into [num_positions], from number `first` of the row
// buffer on. May overwrite up to `room` numbers.
using WriteRows = void (*)(const CorruptArgs&, int64_t b, const uint8_t* masked, int64_t first,
                           int64_t room);

// The 16-bit times of the batch.
using DrawTimes = std::vector<uint32_t> (*)(const CorruptArgs&);
// Where the windows of its slots begin.
using OrderedStarts = std::vector<int64_t> (*)(const CorruptArgs&);

// How many positions row b masks, if none is excluded.
using CountRow = int64_t (*)(const CorruptArgs&, int64_t b, uint32_t t16);

struct CorruptKernels {
  DrawTimes draw_times;
  OrderedStarts ordered_starts;
  CountRow count_row;
  CorruptRow corrupt_row;
  WriteRows write_rows;
};

// The whole batch on up to num_threads threads. Throws std::out_of_range for a window outside the
// corpus, std::invalid_argument for a negative sample slot.
void corrupt_cpu(const CorruptArgs& args, int num_threads);

// How many positions each row masks where none is excluded: known on the host, which avoids a sync
// with the device. Reads only the arguments that times and keys depend on, in host memory.
void count_masked(const CorruptArgs& args, int64_t* counts, int num_threads);

}  // namespace nar
