// `corrupt` on the CPU: its kernels, which are compiled once per instruction set, and the whole
// batch.
#pragma once

#include <vector>

#include "corrupt/corrupt.h"

namespace nar {

// Where the words of the blocks of a row are: of each group of four neighbours, the counter in its
// block, and the block. The order is that of the instruction set.
struct BlockCounters {
  int64_t num_groups;               // 0: the row is one block
  const uint64_t *counter, *block;  // [num_groups, rounded up to kWordPadding / 4]
};

// Scratch memory of one thread.
struct RowScratch {
  uint32_t* keys;     // [seq_len, rounded up to kWordPadding]
  uint32_t* words;    // [4 * num_groups, likewise], if blocks do not begin at multiples of 4
  int32_t* clean;     // [seq_len]
  int16_t* upper;     // [seq_len, likewise, and kTilePadding]
  uint8_t* can_mask;  // [seq_len]
  // In place of outputs that are not wanted.
  uint8_t* masked;  // [seq_len]
  void* labels;     // [seq_len]
  void* window;     // [seq_len] of the corpus's type, if that or its loss mask lies in runs
};

// A sample in one of its views: row `index` of those of all views.
struct Row {
  int64_t sample, view_index;
  View view;
  int64_t given;  // where the row begins in inputs of the batch
  Span span;      // in outputs

  Row(const CorruptArgs& a, int64_t index)
      : sample(index % a.windows.batch), view_index(index / a.windows.batch) {
    view = a.division.view(view_index);
    span = a.windows.span(sample);
    given = span.begin;
    span.begin += view_index * a.windows.num_positions();
  }
};

inline int64_t num_rows(const CorruptArgs& a) { return a.division.views * a.windows.batch; }

// A row, whose blocks have the times t16 [num_blocks]: all outputs but its row indices, whose place
// depends on the counts of the rows before.
using CorruptRow = void (*)(const CorruptArgs&, int64_t index, const uint32_t* t16,
                            const BlockCounters&, const RowScratch&, InvalidTokens*);
// The masked positions of a row, as indices into the batch, from number `first` of the row buffer
// on. May overwrite up to `room` numbers.
using WriteRows = void (*)(const CorruptArgs&, int64_t index, const uint8_t* masked, int64_t first,
                           int64_t room);

// Of so many groups.
using CountBlocks = void (*)(const Division&, int64_t num_groups, uint64_t* counter,
                             uint64_t* block);

// The 16-bit times of up to kDrawsAtOnce draws from `first` on, all of one view.
constexpr int64_t kDrawsAtOnce = 1024;
using DrawTimes = void (*)(const CorruptArgs&, int64_t first, int64_t count, uint32_t* t16);
// Where the windows of its slots begin.
using OrderedStarts = std::vector<int64_t> (*)(const CorruptArgs&);

// How many positions a row masks, if none is excluded.
using CountRow = int64_t (*)(const CorruptArgs&, int64_t index, const uint32_t* t16);

struct CorruptKernels {
  DrawTimes draw_times;
  OrderedStarts ordered_starts;
  CountBlocks count_blocks;
  CountRow count_row;
  CorruptRow corrupt_row;
  WriteRows write_rows;
};

// The whole batch on up to num_threads threads. Throws std::out_of_range for a window outside the
// corpus, std::invalid_argument for a negative sample slot.
void corrupt_cpu(const CorruptArgs& args, int num_threads);

// How many positions each draw masks where none is excluded: known on the host, which avoids a sync
// with the device. Reads only the arguments that times and keys depend on, in host memory.
void count_masked(const CorruptArgs& args, int64_t* counts, int num_threads);

}  // namespace nar
