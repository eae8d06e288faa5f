// Softmax cross-entropy of rows of logits, and its gradient in place.
#pragma once

#include <cstdint>

namespace nar {

enum class LogitType { kFloat32, kBfloat16 };

struct NllArgs {
  // [rows, vocabulary], a row every `stride`; overwritten by the gradient if `gradient`.
  void* logits;
  LogitType logit_type;
  int64_t rows, vocabulary, stride;
  const float* bias;      // [vocabulary], added to the logits; or null
  const int64_t* labels;  // [rows]; outside of the vocabulary and of weight 0: loss 0, gradient 0
  const float* weight;    // [rows], scales the gradient; null: 1
  bool gradient;
  float* nll;  // [rows]
};

// One row. `row` is float32 scratch for its logits, unused where they are float32 already.
using NllRow = void (*)(const NllArgs&, int64_t row_index, float* row);

void nll_cpu(const NllArgs& args, int num_threads);

}  // namespace nar
