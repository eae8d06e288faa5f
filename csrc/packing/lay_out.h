// `lay_out`: where the documents of a ragged or packed batch lie.
#pragma once

#include <cstdint>

namespace nar {

// Positions of a batch, and lengths in it, are below.
constexpr int64_t kMostPositions = int64_t{1} << 31;

struct LayOutArgs {
  const int64_t* lengths;      // [count], of ids in the corpus
  const int64_t* eos_lengths;  // [count], of ends of sequence behind them, or null
  const int64_t* places;       // [count], where in the batch each begins; null: at that of a row of
                               // its own, or without rows behind the one before
  const int64_t* sample_ids;   // [count], or null: first_sample, first_sample + sample_step, ...
  int64_t first_sample, sample_step;
  int64_t count;
  int64_t row_length;  // 0: no rows
  int64_t num_rows;    // of less than kMostPositions in all

  int64_t* table;  // [4, count + 1]: the spans of CorruptArgs, and the sample slots
};

// What is known of a batch then.
struct Extent {
  int64_t num_positions;
  int64_t longest;         // space of a document, up to where the next begins; at least 1
  int64_t longest_stored;  // length of one in the corpus
  bool has_ends;           // of sequence
};

// Returns whether the arguments are right: nothing negative; documents that ascend and do not
// overlap, none over the end of its row, one at the beginning of each row; less than kMostPositions
// positions.
bool lay_out(const LayOutArgs& args, Extent* extent);

}  // namespace nar
