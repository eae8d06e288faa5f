// `mask_tokens`: an independent coin for each position, at ratios that the caller gives.
#pragma once

#include <cstdint>

namespace nar {

struct MaskTokensArgs {
  const void* tokens;  // [batch, length]
  bool narrow;         // tokens are int32, else int64
  int64_t mask_id;
  const int64_t* bounds;       // in [0, 2**32]: a position is masked where its key is below
  int64_t row_stride, stride;  // of the bounds; the latter is 0 for one a row, or 1
  const int64_t* sample_ids;   // [batch]
  int64_t batch, length;
  uint64_t seed;
  uint32_t stream;

  void* ids;      // like tokens
  uint8_t* mask;  // [batch, length]
};

// Rows from `begin` to `end`. `words`: scratch memory for a row and kWordPadding more.
using MaskTokensRows = void (*)(const MaskTokensArgs&, int64_t begin, int64_t end, uint32_t* words);

void mask_tokens_cpu(const MaskTokensArgs& args, int num_threads);

}  // namespace nar
