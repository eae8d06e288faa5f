// The loss of rows of logits, and its gradient in their place.
#pragma once

#include <cstdint>

namespace nar {

enum class LogitType { kFloat32, kBfloat16 };

struct NllArgs {
  // [rows, vocabulary], a row every `stride`; becomes the gradient where that is asked for.
  void* logits;
  LogitType logit_type;
  int64_t rows, vocabulary, stride;
  const float* bias;      // [vocabulary], is added to the logits; or null
  const int64_t* labels;  // [rows]
  const float* weight;    // [rows], of the gradient; null: 1
  bool gradient;
  float* nll;  // [rows]
};

// One row. `row` has room for its logits in float32, unless that is what they are.
using NllRow = void (*)(const NllArgs&, int64_t row_index, float* row);

void nll_cpu(const NllArgs& args, int num_threads);

}  // namespace nar
