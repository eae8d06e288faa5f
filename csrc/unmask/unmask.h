// `unmask`: a token for each row of logits, and how probable it is.
#pragma once

#include <cstdint>

#include "nll/nll.h"
#include "runtime/host_device.h"

namespace nar {

// How the confidence of a row is measured.
enum class ConfidenceType { kProbability = 0, kMargin = 1, kEntropy = 2 };

// Shares and probabilities are in fixed point: sums of integers are the same in any order.
constexpr int64_t kWhole = int64_t{1} << 30;

// A share of a sum, rounded up.
NAR_HOST_DEVICE inline int64_t share_of(int64_t sum, int64_t share) {
  return sum / kWhole * share + (sum % kWhole * share + kWhole - 1) / kWhole;
}

struct UnmaskArgs {
  const void* logits;  // [rows, vocabulary], a row every `stride`
  LogitType logit_type;
  int64_t rows, vocabulary, stride;
  const int64_t* noise_slots;  // [rows], the sample slots of the noise
  const int64_t* given;        // [rows], a token to score in place of a sample, or -1; or null
  const int64_t* forbidden;    // [num_forbidden], ids in [0, vocabulary) that are never sampled
  int64_t num_forbidden;
  int64_t fallback;  // the token of a row that allows none
  uint64_t seed;
  int64_t top_k;              // at least 1
  int64_t top_p;              // in [1, kWhole], a share; kWhole filters nothing
  float inverse_temperature;  // 0: the most probable token
  ConfidenceType confidence_type;

  int64_t* tokens;    // [rows]
  float* log_prob;    // [rows]
  float* confidence;  // [rows], for a type other than kProbability; or null
};

// Rows are padded to a multiple of this: four vectors of any instruction set.
constexpr int64_t kRowPadding = 64;

inline int64_t padded_row(int64_t vocabulary) {
  return (vocabulary + kRowPadding - 1) / kRowPadding * kRowPadding;
}

// Scratch memory of one thread: a padded row, and kRowPadding more.
struct UnmaskScratch {
  float* logits;
  int32_t* ids;
  int16_t* upper;
};

using UnmaskRow = void (*)(const UnmaskArgs&, int64_t row_index, const UnmaskScratch&);

void unmask_cpu(const UnmaskArgs& args, int num_threads);

}  // namespace nar
