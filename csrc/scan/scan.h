// `scan`: the least and the greatest id of a corpus, how often each occurs, and where bad ones are.
#pragma once

#include <cstdint>

#include "corrupt/token_windows.h"

namespace nar {

// Of the tokens from `start` to `stop`, those that a window covers; one begins every `stride`
// tokens from `phase` on, which is at most `start`.
struct ScanArgs {
  const void* tokens;  // if there are no runs; need not be aligned
  Runs runs;
  TokenType token_type;
  int64_t start, stop;
  int64_t phase, stride, seq_len;
  int64_t highest;   // ids outside [0, highest] are bad,
  int64_t mask_id;   // and so is this one; -1: none is
  int64_t num_bins;  // ids in [0, num_bins) are counted
  int64_t* counts;   // [num_bins], added to; or null
  int64_t max_places;
  int64_t* places;  // [max_places]: the lowest offsets of bad ids
};

struct Scanned {
  int64_t least = INT64_MAX, greatest = INT64_MIN;
  int64_t outside = 0;    // of the vocabulary
  int64_t masked = 0;     // equal to mask_id
  int64_t uncounted = 0;  // without a bin
  int64_t num_places = 0;

  void merge(const Scanned& other) {
    if (other.least < least) least = other.least;
    if (other.greatest > greatest) greatest = other.greatest;
    outside += other.outside, masked += other.masked, uncounted += other.uncounted;
  }
};

// Neighbours are counted apart: most of ids are a few, and an increment that waits for the one
// before takes several cycles.
constexpr int64_t kHistograms = 2;

// Of one thread, and in it of one block of ids.
struct ScanPart {
  Scanned found;
  uint32_t* counts;  // [num_bins, kHistograms], if wanted
  int64_t* places;   // [max_places], the first found.num_places of which are set
};

// Ids that are aligned and lie together, at least one. `offset` is that of the first.
using ScanBlock = void (*)(const ScanArgs&, const void* ids, int64_t count, int64_t offset,
                           ScanPart*);

// Below 2**32 tokens, if they are counted.
Scanned scan_cpu(const ScanArgs& args, int num_threads);

}  // namespace nar
